"""Scores the pictures of a folder in a journal that survives a kill, and says when the result is no score.

    Pictures, a Judge -> score_pictures -> rows in DIR/journal/process-0000.jsonl, one line per picture, as they come
    journal           -> take_up        -> the rows that still hold for the pictures as they are
    rows              -> no_score       -> why this is no score, or None
                      -> summarize_pictures -> the summary

A row has the fields of GenEval's results.jsonl (filename, tag, prompt, correct, reason, metadata and details as JSON in
a string; details hold the objects that count, as [x0, y0, x1, y1, score]), and then index, sample and the file's
digest. A picture that cannot be read gets {"filename", "unreadable"} instead: it is tried again by the next call.

Source: GenEval (Ghosh et al. 2023, arXiv 2310.11513), evaluate_images.py. Departures: 1. officially a run in which no
object is ever found, or all pictures are the same, scores 0 without a word; here it is an error that names the cause;
2. filename is relative to the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from openunirl.evaluation.geneval import OFFICIAL, score, summarize
from openunirl.evaluation.image_folder import Picture, digest, read_picture
from openunirl.evaluation.journal import append_rows, mend
from openunirl.evaluation.no_score import ORIGINS, nothing_right
from openunirl.tasks.geneval import evaluation_prompts
from openunirl.tasks.records import read_jsonl, write_jsonl
from openunirl.tasks.worlds import Judge
from openunirl.types import Detection

PROTOCOL = 2
"""Kept in settings.json and compared: raise it with every change that may alter a row, so that no folder mixes both."""

_TEXTS = ("filename", "tag", "prompt", "reason", "metadata", "details", "digest")

Row = dict[str, Any]
Read = tuple[str, np.ndarray] | ValueError

# ------------------------------------------------------------------------------------------------ one picture


def score_picture(
    judge: Judge, picture: Picture, file_digest: str, image: np.ndarray, found: Mapping[str, Sequence[Detection]]
) -> Row:
    """The row of one picture, `image` uint8 RGB [H, W, 3], in which the judge `found` objects.

    Errors: ValueError that names the picture, for detections or colour scores that are not finite.
    """
    metadata = picture.prompt.metadata()
    try:
        verdict = score(metadata, found, lambda name, objects: judge.colors(image, objects, name))
    except ValueError as error:
        raise ValueError(f"{picture.name}: {error}") from None
    return {
        "filename": picture.name,
        "tag": picture.prompt.tag,
        "prompt": picture.prompt.prompt,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(verdict.details),
        "index": picture.index,
        "sample": picture.sample,
        "digest": file_digest,
    }


def score_pictures(judge: Judge, pictures: Sequence[Picture], batch_size: int) -> Iterator[list[Row]]:
    """The rows of `batch_size` pictures at a time; the next batch is read while the networks work on this one."""
    parts = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(_read, parts[0]) if parts else None
        for number, part in enumerate(parts, start=1):
            assert coming is not None
            loaded = coming.result()
            coming = reader.submit(_read, parts[number]) if number < len(parts) else None
            yield _score_part(judge, part, loaded)


def _read(part: Sequence[Picture]) -> list[Read]:
    loaded: list[Read] = []
    for picture in part:
        try:
            loaded.append(read_picture(picture.file))
        except ValueError as error:
            loaded.append(error)
    return loaded


def _score_part(judge: Judge, part: Sequence[Picture], loaded: Sequence[Read]) -> list[Row]:
    readable = [each[1] for each in loaded if not isinstance(each, ValueError)]
    found = iter(judge.detect(readable) if readable else [])
    rows: list[Row] = []
    for picture, each in zip(part, loaded, strict=True):
        if isinstance(each, ValueError):
            rows.append({"filename": picture.name, "unreadable": str(each)})
        else:
            rows.append(score_picture(judge, picture, *each, next(found)))
    return rows


# -------------------------------------------------------------------------------------------------- the journal


def journal(folder: Path, rank: int) -> Path:
    """The file that the process `rank` adds its rows to."""
    return folder / "journal" / f"process-{rank:04d}.jsonl"


def take_up(folder: Path, pictures: Sequence[Picture]) -> None:
    """Makes journal/kept.jsonl of all rows, of earlier calls, that still hold; one process calls it before any scores.

    results.jsonl and evaluation.json go unless they are of exactly these pictures. A kill at any point loses no row.
    """
    for file in (folder / "journal").glob(".*.tmp"):  # what write_jsonl had not renamed yet
        file.unlink(missing_ok=True)
    mend(_journals(folder))
    before = rows_of([folder / "results.jsonl"])
    kept = finished([*before, *rows_of(_journals(folder))], pictures)
    (folder / "journal").mkdir(exist_ok=True)
    write_jsonl(folder / "journal" / "kept.jsonl", kept)
    for file in _journals(folder):
        if file.name != "kept.jsonl":
            file.unlink()
    if before != kept or len(kept) < len(pictures):
        for name in ("evaluation.json", "results.jsonl"):
            (folder / name).unlink(missing_ok=True)


def _journals(folder: Path) -> list[Path]:
    return sorted((folder / "journal").glob("*.jsonl"))


def journal_rows(folder: Path) -> dict[str, Row]:
    """filename -> its row in the journal, after take_up: each picture has one."""
    return {row["filename"]: row for row in rows_of(_journals(folder))}


def rows_of(files: Sequence[Path]) -> list[Row]:
    """All rows of the files that are there. Errors: ValueError for a row that is not ours."""
    rows: list[Row] = []
    for file in files:
        if not file.exists() or not file.stat().st_size:
            continue
        for number, row in enumerate(read_jsonl(file), start=1):
            if not _sound(row):
                raise ValueError(
                    f"{file}:{number} is no row of this command: delete it, or choose another --output-dir"
                )
            rows.append(row)
    return rows


def _sound(row: Row) -> bool:
    """Whether it is a row that this file wrote."""
    if isinstance(row.get("unreadable"), str):
        return isinstance(row.get("filename"), str)
    if not all(isinstance(row.get(key), str) for key in _TEXTS) or not isinstance(row.get("correct"), bool):
        return False
    if not all(type(row.get(key)) is int and row[key] >= 0 for key in ("index", "sample")):
        return False
    try:
        return isinstance(json.loads(row["details"]), dict)
    except ValueError:
        return False


def finished(rows: Sequence[Row], pictures: Sequence[Picture]) -> list[Row]:
    """The rows, in the pictures' order, whose picture and metadata are still what was scored.

    A picture that was drawn again since, or could not be read, is left out: it is to be scored (again).
    """
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        if "unreadable" not in row:
            by_name.setdefault(row["filename"], []).append(row)
    kept: list[Row] = []
    for picture in pictures:
        candidates = by_name.get(picture.name)
        if not candidates:
            continue
        try:
            now = (
                digest(picture.file.read_bytes()),
                json.dumps(picture.prompt.metadata()),
                picture.index,
                picture.sample,
            )
        except OSError:
            continue  # scoring it will say what is wrong
        now = {"digest": now[0], "metadata": now[1], "index": picture.index, "sample": picture.sample}
        kept += [row for row in candidates if all(row[name] == value for name, value in now.items())][:1]
    return kept


def check_moved(settings: Path, images: Path, read: Callable[[], Sequence[Picture]]) -> None:
    """Whether the rows beside the file `settings` are of the pictures in `images`, wherever these lay when they were
    scored. In the place that the file names, pictures may have been drawn again; from another place, at least half of
    the rows must hold for what `read` finds there.

    Errors: ValueError that names both places; and what `read` raises.
    """
    was = json.loads(settings.read_text(encoding="utf-8")).get("images")
    if was == str(images.resolve()):
        return
    rows = _rows_so_far(settings.parent)
    names = {row["filename"] for row in rows if "unreadable" not in row}
    place = was if isinstance(was, str) and len(was) <= 300 else "another place"
    if names and 2 * len(finished(rows, read())) < len(names):
        raise ValueError(
            f"{settings.parent} was made with the pictures of {place}, and those in {images} are others, not the same "
            "moved here: choose another --output-dir"
        )


def _rows_so_far(folder: Path) -> list[Row]:
    rows: list[Row] = []
    for file in (folder / "results.jsonl", *_journals(folder)):
        for line in file.read_bytes().splitlines() if file.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # take_up says what is wrong with it, or cuts it off
                continue
            rows += [row] if isinstance(row, dict) and _sound(row) else []
    return rows


def write_results(folder: Path, rows: Sequence[Row]) -> None:
    """results.jsonl, whole or not at all; then the journal has done its work."""
    write_jsonl(folder / "results.jsonl", rows)
    shutil.rmtree(folder / "journal", ignore_errors=True)  # a file browser may have left something of its own there


# ------------------------------------------------------------------------------------------------ is it a score?


def unreadable(rows: Sequence[Row], images: Path, origin: str = "given") -> str | None:
    """The error for pictures of the folder `images` that could not be read, or None."""
    bad = [row for row in rows if "unreadable" in row]
    if not bad:
        return None
    told = "; ".join(f"{row['filename']}: {row['unreadable']}" for row in bad[:3])
    return (
        f"{len(bad)} of {len(rows)} pictures in {images} cannot be read ({told}{'; ...' if len(bad) > 3 else ''}): "
        f"{ORIGINS[origin].again}"
    )


def no_score(rows: Sequence[Row], images: Path, origin: str = "given") -> str | None:
    """Why the rows are no score - nothing detected anywhere, or nothing right - and the likely cause; else None."""
    if not any(json.loads(row["details"]) for row in rows):
        return (
            f"no object was detected in any of the {len(rows)} pictures in {images}, so there is no score: either "
            f"{ORIGINS[origin].blank}, or the detector's weights are damaged or of another kind of picture (choose the "
            "--detector that fits)"
        )
    objects = sum(bool(json.loads(row["details"])) for row in rows)
    why = nothing_right(rows, objects, ORIGINS[origin].wrong, f" in {images}")
    return f"{why}; results.jsonl has them all" if why else None


def summarize_pictures(rows: Sequence[Row], label: str, **about: Any) -> dict[str, Any]:
    """The summary: accuracies with n, distinct prompts and 95 % intervals, whose verdict they are, and how much of
    GenEval's own prompt set they cover."""
    geneval = asdict(summarize(rows))
    geneval["distinct_prompts"] = len({row["prompt"] for row in rows})
    for tag, task in geneval["tasks"].items():
        task["distinct_prompts"] = len({row["prompt"] for row in rows if row["tag"] == tag})
    return {
        "geneval": geneval,
        "label": label,
        "pictures": len(rows),
        "distinct_pictures": len({row["digest"] for row in rows}),
        "official_prompts": _official_prompts(rows),
        "params": asdict(OFFICIAL),
        **about,
    }


def _official_prompts(rows: Sequence[Row]) -> dict[str, int] | None:
    """How many of GenEval's own prompts the rows cover, however their fields are ordered; None where this numpy cannot
    tell them (evaluation_prompts)."""
    try:
        official = {json.dumps(prompt.metadata(), sort_keys=True) for prompt in evaluation_prompts()}
    except RuntimeError:
        return None
    scored = {json.dumps(json.loads(row["metadata"]), sort_keys=True) for row in rows}
    return {"scored": len(official & scored), "of": len(official)}


Report = Callable[[int], None]
"""Called with the number of pictures scored since the last call."""


def score_into_journal(
    judge: Judge, pictures: Sequence[Picture], file: Path, batch_size: int, report: Report = lambda _: None
) -> None:
    """Scores pictures; each batch's rows are on disk before the next begins."""
    for rows in score_pictures(judge, pictures, batch_size):
        append_rows(file, rows)
        report(len(rows))
