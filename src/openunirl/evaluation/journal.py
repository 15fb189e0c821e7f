"""Rows on disk as they come, so that a call that was killed goes on and does nothing twice.

    jobs -> without those that have a row -> this process's share -> batches of rows, each kept before the next begins

In: jobs, each under a key, and code that makes their rows. Out: a row of every job. Evaluation's stages all go through
`complete`: those of an evaluation within a run keep their rows in memory, the others in a file of each process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from openunirl.disk import naming

K = TypeVar("K", bound=Hashable)
J = TypeVar("J")
V = TypeVar("V")
Row = dict[str, Any]


class Peers(Protocol):
    """What is needed of distributed.Processes."""

    @property
    def rank(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    def wait(self) -> None: ...


class Alone:
    """One process."""

    rank, count, is_main = 0, 1, True

    def wait(self) -> None:
        """For nobody."""


@dataclass(frozen=True, kw_only=True)
class Rows(Generic[K, V]):
    """Where a stage keeps its rows. Example: Rows.in_files(Path("answers"), 0, read_answers)"""

    read: Callable[[], dict[K, V]]
    """key -> what is kept under it."""
    add: Callable[[Sequence[Row]], None]
    mend: Callable[[], None] = field(default=lambda: None)
    """Takes away what a kill left half-written; one process calls it before any reads."""

    @classmethod
    def in_files(cls, folder: Path, rank: int, read: Callable[[Path], dict[K, V]]) -> Rows[K, V]:
        """One file of each process."""
        return cls(
            read=lambda: read(folder),
            add=lambda rows: append_rows(folder / f"process-{rank:04d}.jsonl", rows),
            mend=lambda: mend(folder.glob("*.jsonl")),
        )

    @classmethod
    def in_memory(cls, key: Callable[[Row], K]) -> Rows[K, Row]:
        held: list[Row] = []
        return Rows(read=lambda: {key(row): row for row in held}, add=held.extend)


def complete(
    jobs: Mapping[K, J],
    rows: Rows[K, V],
    make: Callable[[list[J]], Iterable[Sequence[Row]]],
    *,
    peers: Peers | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[K, V]:
    """What is kept under the key of every job, in their order; `make` is called with those that have nothing, of them
    this process's share, and makes their rows batch by batch. report(done, total) counts this process's share and,
    where it is alone, what was there before. Errors: ValueError where rows are lost meanwhile."""
    peers = peers or Alone()
    if peers.is_main:
        rows.mend()
    peers.wait()
    there = rows.read()
    peers.wait()  # all have read before any adds
    missing = [job for key, job in jobs.items() if key not in there][peers.rank :: peers.count]
    before = len(jobs) - len(missing) if peers.count == 1 else 0
    total, done = before + len(missing), before
    report(done, total)
    for batch in make(missing):
        rows.add(batch)
        done += len(batch)
        report(done, total)
    peers.wait()
    there = rows.read()
    lost = [key for key in jobs if key not in there]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(jobs)} rows are not there although all were made, the first is that of {lost[0]}: "
            "another call worked there meanwhile, or the processes do not share a disk; let one call at a time write "
            "there, on a disk that all processes see, and repeat it"
        )
    return {key: there[key] for key in jobs}


def batches(jobs: Sequence[J], size: int) -> Iterator[Sequence[J]]:
    """`size` at a time."""
    return (jobs[start : start + size] for start in range(0, len(jobs), size))


def append_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows; a kill leaves whole lines and at most one half-written one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with naming(file), open(file, "a", encoding="ascii", newline="\n") as opened:
        opened.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        opened.flush()
        os.fsync(opened.fileno())


def mend(files: Iterable[Path]) -> None:
    """Cuts off the half-written last lines that a kill may leave."""
    for file in files:
        content = file.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(file, content.rfind(b"\n") + 1)
