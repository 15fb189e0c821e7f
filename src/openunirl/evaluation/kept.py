"""What an evaluation of drawn pictures has done so far: in memory, of one process or several, or in a folder that
outlives a kill.

In: rows and pictures as they come. Out: the same again, in this call or in the next one. A picture is written before
its row; a row whose picture is gone or shows something else is as if it were not there.

    DIR/evaluation/00000/samples/0000.png, DIR/journal/drawing/process-0000.jsonl, DIR/journal/reading/...
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from openunirl.disk import PARTIAL, naming, remove
from openunirl.evaluation.image_folder import digest, read_picture
from openunirl.evaluation.journal import Rows, complete
from openunirl.tasks.records import read_jsonl

J = TypeVar("J")
Row = dict[str, Any]
Job = tuple[int, int]
"""(prompt, sample)."""

_SHOWN = "digest_of_pixels"
_TEXTS = ("tag", "prompt", "question", "expected", "answer")
_VERDICTS = ("answer_correct", "settled")


class Sharing(Protocol):
    """What is needed of distributed.Processes."""

    @property
    def rank(self) -> int: ...
    @property
    def count(self) -> int: ...
    def gather_objects(self, own: Any) -> list[Any]: ...


class Kept:
    """Example: Kept().rows("reading", {(0, 0): prompt}, make, report) -> [{"index": 0, "sample": 0, ...}]"""

    def __init__(self, folder: Path | None = None, peers: Sharing | None = None):
        """None: in memory. A folder's settings are its caller's to compare. In memory, `peers` share the jobs, and all
        get all rows and pictures."""
        assert folder is None or peers is None, "processes that share a folder take turns (journal.py)"
        self.folder, self.peers = folder, peers
        self._pictures: dict[Job, np.ndarray] = {}

    def keep(self, job: Job, picture_HWC: np.ndarray) -> None:
        self._pictures[job] = picture_HWC
        if self.folder is not None:
            file = place_of(self.folder / "evaluation", *job)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_picture(file, picture_HWC)

    def pictures(self, jobs: Sequence[Job]) -> np.ndarray:
        """uint8 [B, H, W, 3], of jobs whose rows are there."""
        return np.stack([self._pictures[job] for job in jobs])

    def rows(
        self,
        stage: str,
        jobs: Mapping[Job, J],
        make: Callable[[list[J]], Iterable[Sequence[Row]]],
        report: Callable[[str, int, int], None],
        *,
        drawn: bool = False,
    ) -> list[Row]:
        """A row of each job, in their order; `make` makes those that are not there, batch by batch. With `drawn`, it
        has handed each row's picture to `keep` before."""
        if self.peers is None or self.peers.count == 1:
            return self._own_rows(stage, jobs, make, report, drawn)
        order = list(jobs.items())
        own = dict(order[self.peers.rank :: self.peers.count])
        if len(own) < math.ceil(len(order) / self.peers.count):
            own |= dict(order[:1])  # equally many, because sharded weights are gathered for each batch
        made = {_job(row): row for row in self._own_rows(stage, own, make, report, drawn)}
        pictures = {job: self._pictures[job] for job in own} if drawn else {}
        for theirs, shown in self.peers.gather_objects((made, pictures)):
            made |= theirs
            self._pictures |= shown
        return [made[job] for job in jobs]

    def _own_rows(
        self,
        stage: str,
        jobs: Mapping[Job, J],
        make: Callable[[list[J]], Iterable[Sequence[Row]]],
        report: Callable[[str, int, int], None],
        drawn: bool,
    ) -> list[Row]:
        rows = Rows.in_memory(_job)
        if self.folder is not None:
            rows = Rows.in_files(self.folder / "journal" / stage, 0, lambda folder: self._read(folder, drawn))

        def told(missing: list[J]) -> Iterable[Sequence[Row]]:
            for part in make(missing):
                yield [row | {_SHOWN: _digest(self._pictures[_job(row)])} for row in part] if drawn else part

        found = complete(jobs, rows, told, report=lambda done, total: report(stage, done, total))
        return [{name: value for name, value in row.items() if name != _SHOWN} for row in found.values()]

    def _read(self, folder: Path, drawn: bool) -> dict[Job, Row]:
        """The rows of a stage. Errors: ValueError "file:line: ..." for one that is not ours."""
        found: dict[Job, Row] = {}
        for file in sorted(folder.glob("*.jsonl")):
            for number, row in enumerate(read_jsonl(file) if file.stat().st_size else [], start=1):
                if not _sound(row, drawn):
                    raise ValueError(f"{file}:{number} is no row of this command: delete it")
                if not drawn or self._is_there(row):
                    found[_job(row)] = row
        return found

    def _is_there(self, row: Row) -> bool:
        """Whether the picture of a row shows what it showed."""
        assert self.folder is not None
        job = _job(row)
        if job not in self._pictures:
            try:
                _, picture = read_picture(place_of(self.folder / "evaluation", *job))
            except ValueError:
                return False
            if _digest(picture) != row[_SHOWN]:
                return False
            self._pictures[job] = picture
        return _digest(self._pictures[job]) == row[_SHOWN]


def _job(row: Row) -> Job:
    return row["index"], row["sample"]


def _digest(picture_HWC: np.ndarray) -> str:
    return digest(picture_HWC.tobytes())


def _sound(row: Row, drawn: bool) -> bool:
    """Whether it is a row that this file wrote."""
    texts, verdicts = (*_TEXTS, "digest"), _VERDICTS
    if drawn:
        texts, verdicts = (*_TEXTS, "reason", "metadata", "details", _SHOWN), (*_VERDICTS, "correct")
    return (
        all(isinstance(row.get(name), str) for name in texts)
        and all(isinstance(row.get(name), bool) for name in verdicts)
        and all(type(row.get(name)) is int and row[name] >= 0 for name in ("index", "sample"))
        and (not drawn or type(row.get("objects")) is int)
    )


# ----------------------------------------------------------------------------------------------- one picture


def place_of(folder: Path, index: int, sample: int) -> Path:
    """In GenEval's layout. Example: place_of(Path("a"), 0, 1) == Path("a/00000/samples/0001.png")"""
    return folder / f"{index:05d}" / "samples" / f"{sample:04d}.png"


def write_picture(path: Path, picture_HWC: np.ndarray) -> None:
    """Atomically; the unfinished file's name is no picture's to GenEval's tools."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with naming(path, instead_of=partial), open(partial, "wb") as file:
            Image.fromarray(picture_HWC).save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        remove(partial)
