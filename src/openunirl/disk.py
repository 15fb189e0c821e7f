"""What is written is there whole or not at all, and a disk that refuses it says so with the file's name.

In: a path, and code that writes it. Out: the file or folder; or an OSError that names it, with the fix, and no trace of
what was begun. Torch-free.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Ends the name of what is being written; a kill may leave it behind, and nothing reads it."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FIXES = dict.fromkeys(FULL, "free some space") | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may write to"
)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or folder under, which takes the place of `path` at the end.

    Errors: OSError as `refusal` makes it; what was begun is then gone, and what `path` held before is untouched.
    """
    partial = path.with_name(path.name + PARTIAL)
    remove(partial)
    try:
        with naming(path, instead_of=partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if path.is_dir() and partial.is_dir():
                remove(path)
            os.replace(partial, path)
    finally:
        remove(partial)


@contextmanager
def naming(path: Path, instead_of: Path | None = None) -> Iterator[None]:
    """Inside it a disk's refusal is an OSError that names `path`, unless it names a file already (and not one in
    `instead_of`). Other errors stay as they are."""
    try:
        yield
    except Exception as error:
        named = getattr(error, "filename", None)
        elsewhere = named is not None and (instead_of is None or instead_of not in (Path(named), *Path(named).parents))
        told = None if elsewhere else refusal(path, error)
        if told is None:
            raise
        raise told from error


def refusal(path: Path, error: BaseException) -> OSError | None:
    """The OSError that says that `path` cannot be written, and the fix; None where the disk is not to blame.

    Each library tells of a full disk in its own way: torch's writer does not even say why.
    Example: refusal(Path("a"), OSError(28, "")) is [Errno 28] cannot be written: No space left on device; free some
    space: 'a'
    """
    said = re.search(r"os error (\d+)", str(error))
    if isinstance(error, OSError) and error.errno:
        number = error.errno
    elif said:
        number = int(said.group(1))
    elif isinstance(error, RuntimeError) and "inline_container" in str(error):
        number = errno.ENOSPC
    else:
        return None
    fix = _FIXES.get(number)
    return OSError(number, f"cannot be written: {os.strerror(number)}" + (f"; {fix}" if fix else ""), str(path))


def is_occupied(folder: Path) -> bool:
    """Whether a folder is there and holds anything but what a kill left of unfinished files, in folders or not."""
    if not folder.is_dir():
        return folder.exists()
    return any(not _unfinished(path) and is_occupied(path) for path in folder.iterdir())


def _unfinished(path: Path) -> bool:
    """A name of `whole`'s, or of tasks.records.write_jsonl's."""
    return path.suffix == PARTIAL or (path.name.startswith(".") and path.suffix == ".tmp")


def remove(path: Path) -> None:
    """A file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
