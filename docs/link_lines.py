"""Points the code links of a page at today's lines: [`name`](../src/file.py#L12) -> the line that defines name.

    python docs/link_lines.py [docs/method.md ...]

Run it when the test of docs/method.md's links fails because code has moved.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINK = re.compile(r"\[`([\w.]+)`\]\(([^)#]+\.py)(?:#L(\d+))?\)")


def line_of(name: str, code: str) -> int:
    """The line, from 1, that defines a function, a class, a constant or (Class.method) a method.

    Errors: ValueError if there is none.
    """
    start = 0
    for part in name.split("."):
        found = re.compile(rf"^[ ]*(?:def|class) {part}\b|^{part}\b(?::.*)? = ", re.MULTILINE).search(code, start)
        if found is None:
            raise ValueError(f"{name} is not defined there")
        start = found.start()
    return code.count("\n", 0, start) + 1


def relinked(page: Path) -> str:
    """The page's text with every link to a name at that name's line."""

    def to_line(link: re.Match[str]) -> str:
        name, path, _ = link.groups()
        try:
            line = line_of(name, (page.parent / path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{page}: [`{name}`]({path}): {error}") from error
        return f"[`{name}`]({path}#L{line})"

    return LINK.sub(to_line, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:] or ["docs/method.md"]):
        page.write_text(relinked(page), encoding="utf-8")
