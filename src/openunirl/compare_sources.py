"""What `openunirl report` compares: evaluations read from disk, and what makes their comparison unfair.

    run directories, folders of `evaluate`, GenEval's results.jsonl -> read_sources -> Sides, metrics of runs by name
    Sides                                                           -> differences  -> sentences

In: what `openunirl train`, `evaluate MODEL` and `evaluate --images` write, or GenEval's evaluate_images.py. Out: Sides
for compare.py. A run counts as its evaluation after training; the first one's evaluation before training comes first.

Source: GenEval (Ghosh et al. 2023, arXiv 2310.11513), its results.jsonl: filename, tag, prompt, correct, reason,
metadata, details; prompt and sample numbers are those of the filename (DIR/00000/samples/0000.png).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openunirl.evaluation.geneval import summarize
from openunirl.evaluation.paired import Key, answer_key, distinct, image_key, reference_key, shared
from openunirl.report import JUDGED, read_json, read_rows, read_side
from openunirl.report_numbers import Row, get
from openunirl.run_directory import RESULTS, is_evaluation

_OFFICIAL = {"filename": str, "tag": str, "prompt": str, "correct": bool, "reason": str}
_PLACE = re.compile(r"(?:(.*)/)?([0-9]{1,9})/samples/([0-9]{1,9})\.[A-Za-z]+")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One evaluation. `generated` of pictures alone hold no questions and answers, and `references` are then empty.

    Example: Side(name="a", folder=Path("a/evaluation"), summary={...}, generated=[...], references=[])
    """

    name: str
    folder: Path
    """Where its pictures are."""
    summary: dict[str, Any]
    generated: list[Row]
    references: list[Row]

    @property
    def asked(self) -> list[Row]:
        """The drawn images that the model was asked about."""
        return [row for row in self.generated if isinstance(row.get("answer_correct"), bool)]


def read_sources(places: Sequence[Path], problems: list[str]) -> tuple[list[Side], dict[str, list[Row]]]:
    """The evaluations in order, and the metrics of runs by name. Errors: ValueError for a place with neither, or named
    twice."""
    sides: list[Side] = []
    runs: dict[str, list[Row]] = {}
    names = [_name(place) for place in places]
    for place, short in zip(places, names, strict=True):
        name = short if names.count(short) == 1 else str(place)
        if name in runs or name in [side.name for side in sides]:
            raise ValueError(f"{place} is named twice: give each run once")
        if is_evaluation(place):
            sides.append(_evaluation(place, name, problems))
            continue
        found, rows = _run(place, name, problems, first=not sides)
        sides += found
        if rows:
            runs[name] = rows
    return sides, runs


def _name(place: Path) -> str:
    place = place.resolve()
    return place.name if place.is_dir() else place.parent.name if place.name == RESULTS else place.stem


def _run(folder: Path, name: str, problems: list[str], *, first: bool) -> tuple[list[Side], list[Row]]:
    """The evaluations and the metrics of a run; of the `first` source the evaluation before training, too."""
    metrics = folder / "metrics.jsonl"
    rows = read_rows(metrics, {"step": int | float}, problems) if metrics.exists() else []
    when = ("before", "after") if first else ("after",)
    found = [part for part in when if (folder / "evaluation" / f"{part}.json").exists()]
    if not rows and not found:
        raise ValueError(
            f"{folder} holds nothing to compare: neither evaluation.json (openunirl evaluate) nor metrics.jsonl "
            f"or evaluation/after.json (openunirl train) nor {RESULTS} (GenEval's evaluate_images.py)"
        )
    sides = [
        Side(
            name=name if part == "after" else f"{name}, before",
            folder=folder / "evaluation" / part,
            **read_side(folder / "evaluation" / part, problems),
        )
        for part in found
    ]
    config = read_json(folder / "config.json", []) if rows and (folder / "config.json").exists() else {}
    if get(config, "rollout", "drawn_by") == "base":
        problems.append(f"{name}: the base drew its training pictures, which its reward in training is about")
    if "after" not in found:
        problems.append(f"{name}: no evaluation after training, so only its learning curves are shown")
    return sides, rows


# --------------------------------------------------------------------------------------- evaluations without a run


def _evaluation(place: Path, name: str, problems: list[str]) -> Side:
    folder = place.parent if place.is_file() else place
    results = place if place.is_file() else place / RESULTS
    if (folder / "evaluation.json").exists() and results.name == RESULTS:
        if results.exists():
            return _pictures(folder, name, problems)
        return Side(name=name, folder=folder / "evaluation", **read_side(folder / "evaluation", problems))
    if results.name == RESULTS and (folder / "settings.json").exists():
        raise ValueError(
            f"{folder} holds {RESULTS} and no evaluation.json: `openunirl evaluate --images` ended there without a "
            "score; repeat it and read why"
        )
    return _official(results, name, problems)


def _drawn(row: Row) -> Row:
    """What is known about a picture that nobody asked about."""
    return {name: row[name] for name in JUDGED} | {"sample": row.get("sample", 0)}


def _pictures(folder: Path, name: str, problems: list[str]) -> Side:
    """What `openunirl evaluate --images` wrote; the pictures lie where its settings.json says."""
    images = get(read_json(folder / "settings.json", problems), "images")
    pictures = Path(images) if isinstance(images, str) else folder
    if not isinstance(images, str) or not pictures.is_dir():
        problems.append(f"{name}: its pictures are not shown: settings.json names their folder as {images!r}")
    return Side(
        name=name,
        folder=pictures,
        summary=read_json(folder / "evaluation.json", problems),
        generated=[_drawn(row) for row in read_rows(folder / RESULTS, JUDGED, problems, name=f"{name}/{RESULTS}")],
        references=[],
    )


def _official(file: Path, name: str, problems: list[str]) -> Side:
    """A results.jsonl of GenEval's own tool; its numbers are counted again, and whose verdict it is, is not recorded.

    Errors: ValueError where no line is a row of it.
    """
    rows, counted, roots = [], [], []
    for row in read_rows(file, _OFFICIAL, problems, name=str(file)):
        place = _PLACE.fullmatch(row["filename"].replace("\\", "/"))
        if place is None:
            problems.append(f"{file}: {row['filename']!r} is skipped: it is not like DIR/00000/samples/0000.png")
            continue
        root, index, sample = place.groups()
        roots.append(root or ".")
        counted.append(row)
        own = row["filename"][len(root) + 1 if root else 0 :].replace("\\", "/")
        rows.append(_drawn(row | {"filename": own, "index": int(index), "sample": int(sample)}))
    if not rows:
        raise ValueError(
            f"{file} holds no row of GenEval's {RESULTS}: {', '.join(_OFFICIAL)}, with a filename like "
            "DIR/00000/samples/0000.png; give what its evaluate_images.py wrote"
        )
    places = [Path(roots[0]), file.parent / roots[0], file.parent]
    pictures = next((each for each in places if (each / rows[0]["filename"]).is_file()), None)
    if pictures is None:
        problems.append(f"{name}: its pictures are not shown: they are neither in {roots[0]} nor beside {file}")
    summary = {"geneval": asdict(summarize(counted))}
    return Side(name=name, folder=pictures or Path(roots[0]), summary=summary, generated=rows, references=[])


# ------------------------------------------------------------------------------------------------ what is unfair


def _fingerprints(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Those of the detector's weights, however much else was recorded about it."""
    told = get(summary, "detector")
    return {k: v for k, v in told.items() if k.endswith("_fingerprint")} or None if isinstance(told, dict) else None


def differences(sides: Sequence[Side]) -> list[str]:
    """What makes a comparison unfair, in words."""
    told: list[str] = []
    answered = [side for side in sides if side.asked or side.references]
    settings: list[tuple[str, Sequence[Side], Callable[[dict[str, Any]], Any]]] = [
        *((name, sides, lambda summary, name=name: summary.get(name)) for name in ("label", "seed", "sampling")),
        ("the detector's weights", sides, _fingerprints),
        *((n, answered, lambda summary, n=n: summary.get(n)) for n in ("answers_judged_by", "max_new_tokens")),
    ]
    for name, among, read in settings:
        values = {side.name: read(side.summary) for side in among}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            parts = (f"{key}: {'not recorded' if value is None else value}" for key, value in values.items())
            told.append(f"the evaluations differ in {name}: {'; '.join(parts)}")
    for side in sides:
        warnings = get(side.summary, "warnings")
        told += [f"{side.name}: {line}" for line in warnings if line] if isinstance(warnings, list) else []
        for rows, key, what in (
            (side.generated, image_key, "drawn images"),
            (side.references, reference_key, "answers"),
        ):
            if more := len(rows) - len(distinct(rows, key)):
                told.append(f"{side.name}: {more} {what} cannot be told apart, so no change counts them")
    return told + [line for side in sides[1:] for line in _unlike(sides[0], side)]


def _unlike(first: Side, side: Side) -> list[str]:
    """What one side has no partner for in the first one."""
    told: list[str] = []
    both, mine, theirs = _common(first.generated, side.generated, image_key)
    if not both == mine == theirs:
        told.append(
            f"{side.name} has {theirs} drawn images and {first.name} {mine}; the changes are those of the {both} that "
            "both have"
        )
    images, _, _ = _common(first.asked, side.asked, image_key)
    answers, _, _ = _common(first.asked, side.asked, answer_key)
    if answers < images:
        told.append(
            f"{side.name} was asked something else than {first.name} about {images - answers} of {images} drawn "
            f"images; self-reward, collusion gap and imbalance are compared over the other {answers}"
        )
    both, mine, theirs = _common(first.references, side.references, reference_key)
    if mine and theirs and not both == mine == theirs:
        told.append(
            f"{side.name} holds {theirs} answers on reference pictures and {first.name} {mine}; understanding is "
            f"compared over the {both} to the same question on the same picture (before this was recorded, none)"
        )
    return told


def _common(a: Sequence[Row], b: Sequence[Row], key: Callable[[Row], Key]) -> tuple[int, int, int]:
    """How many both hold, and how many each."""
    return len(shared(a, b, key)[0]), len(distinct(a, key)), len(distinct(b, key))
