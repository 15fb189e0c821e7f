"""Accidents that happen to files, at random: for benchmarks/damaged_inputs.py.

bytes -> damaged_bytes; a JSON value -> damaged_json; rows -> damaged_lines; a folder -> damaged_folder
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

Rng = random.Random


def damaged_bytes(content: bytes, rng: Rng) -> bytes:
    """One to three accidents."""
    for _ in range(rng.randint(1, 3)):
        at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        kind = rng.randrange(8)
        if kind == 0:
            content = content[:at]
        elif kind == 1 and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        elif kind == 2:
            content = content[:at] + rng.randbytes(rng.randint(1, 40)) + content[at:]
        elif kind == 3:
            content = content[:at] + content[end:]
        elif kind == 4:
            content = content[:end] + content[at:end] + content[end:]
        elif kind == 5:
            content = content[:at] + bytes(end - at) + content[end:]
        elif kind == 6:
            content = rng.choice([b"", b"\xff\xfe", b"\n", b"null", b"[]", b"{}", b"\xef\xbb\xbf" + content])
        else:
            content = content.replace(*rng.choice([(b'"', b"'"), (b":", b"="), (b"1", b"-1"), (b"\n", b"\r")]))
    return content


ODD: list[Any] = [
    None, True, -1, 0, 10**30, 10**400, 1.5, "", " ", "a" * 5000, "\u2028", "\x00", [], {}, [[]], [None], {"a": 1},
    ["left of", 0], ["left of", 7], "left of", "purple", "café", "position", [1, 2, 3], 2, 1e308,
]  # fmt: skip


def damaged_json(value: Any, rng: Rng) -> Any:
    """A JSON value with something in it exchanged, removed, doubled or added."""
    if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return rng.choice(ODD)
    changed = dict(value) if isinstance(value, dict) else list(value)
    place = rng.choice(list(changed)) if isinstance(changed, dict) else rng.randrange(len(changed))
    kind = rng.randrange(4)
    if kind == 0:
        del changed[place]
    elif kind == 1 and isinstance(changed, dict):
        changed[str(place) + "s"] = rng.choice(ODD)
    elif kind == 1:
        changed.append(rng.choice(ODD))
    else:
        changed[place] = damaged_json(changed[place], rng)
    return changed


def damaged_lines(rows: list[dict[str, Any]], rng: Rng) -> bytes:
    """A JSONL file of which a value or some bytes are damaged."""
    rows = list(rows)
    if rng.random() < 0.6:
        place = rng.randrange(len(rows))
        rows[place] = damaged_json(rows[place], rng)
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    return damaged_bytes("".join(json.dumps(row) + "\n" for row in rows).encode(), rng)


def damaged_folder(folder: Path, rng: Rng) -> None:
    """A file or folder in it is removed, renamed, emptied or damaged, or one is added."""
    path = rng.choice(sorted(folder.rglob("*")))
    kind = rng.randrange(4)
    if kind == 0:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif kind == 1:
        path.rename(path.with_name(rng.choice(("00001", "7", "x", "0001.png", "metadata.jsonl", "samples ")) + "_"))
    elif kind == 2 and path.is_file():
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
    elif path.is_dir():
        added = [path / name for name in ("9", "00002", "0.png", "0000.jpg", "a.png", "0002.gif")]
        rng.choice([each for each in added if not each.exists()]).write_bytes(b"x")
    else:
        path.write_bytes(b"")
