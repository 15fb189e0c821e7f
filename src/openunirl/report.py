"""Writes report.html: one self-contained page about a run, from what lies in its directory.
(compare.py writes the page about several.)

In: config.json, metrics.jsonl, evaluation/{before,after}.json, evaluation/{before,after}/{results,references}.jsonl and
the pictures beside them; what is absent is said on the page. Out: report.html, which needs neither network nor script
(templates/report.html.j2 holds its words and drawings); report_numbers.py computes what it tells.

Source: METHOD 5-7 for what is measured. Where this goes beyond it:
1. Pictures are a systematic sample in order of outcome: each outcome is shown about as often as it happened.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from openunirl.disk import whole
from openunirl.evaluation.paired import image_key
from openunirl.provenance import ABOUT_A_RUN
from openunirl.report_curves import curve
from openunirl.report_numbers import (
    Row,
    by_task,
    collusion,
    detector_notice,
    get,
    headline,
    level,
    number,
    paired_changes,
    reward_title,
    score,
    tags_of,
    task_name,
    unsettled_lines,
)

PAIRS_PER_TASK = 4
PIXEL_ART = 128  # a picture of so many pixels a side, or fewer, is embedded as it is and drawn with hard pixels
THUMBNAIL = 256  # pixels that the longer side of any other is reduced to

_REFERENCE = {"tag": str, "prompt": str, "answer_correct": bool, "index": int}
JUDGED = {"tag": str, "prompt": str, "correct": bool, "reason": str, "index": int, "filename": str}
_RESULT = {**_REFERENCE, "correct": bool, "question": str, "expected": str, "answer": str, "reason": str}
JINJA: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}

# ---------------------------------------------------------------------------------------------- the pictures


_WORDS = {
    r"expected (.+)>=(\d+), found (\d+)": r"\1: wanted \2, found \3",
    r"expected (.+)>=(\d+), found (\d+) .+?; and (.+)": r"\1: wanted \2, found \3; seen: \4",
    r"expected (.+)<(\d+), found (\d+)": r"\1: wanted fewer than \2, found \3",
    r"expected (.+?) (left of|right of|above|below) target, found  target": r"\1: not clearly \2 the other",
    r"expected (.+?) (left of|right of|above|below) target, found (.+) target": r"\1: not \2 but \3 the other",
    r"no target for (.+) to be (.+)": r"\1: nothing to be \2",
}


def in_words(reason: str) -> str:
    """The scorer's reason as a reader would say it; what is unknown here stays as it is.

    Example: in_words("expected circle>=1, found 0") -> "circle: wanted 1, found 0"
    """
    told = []
    for part in reason.splitlines():
        matches = [(re.fullmatch(pattern, part), words) for pattern, words in _WORDS.items()]
        told.append(next((match.expand(words) for match, words in matches if match), part))
    return "; ".join(told)


def embed(folder: Path, row: Row, problems: list[str]) -> dict[str, Any] | None:
    """The row's picture as a data: URI; None, and a word about it, where there is no readable one inside the folder."""
    path = (folder / str(row.get("filename"))).resolve()
    try:
        if not path.is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is outside {folder}: the run's own pictures lie below it")
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        problems.append(f"{folder.name}/{row.get('filename')} is no readable picture")
        return None
    hard = max(image.size) <= PIXEL_ART
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if hard else "JPEG", optimize=True, quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"uri": f"data:image/{'png' if hard else 'jpeg'};base64,{encoded}", "hard": hard}


def choose(outcomes: Sequence[Any], number: int, offset: float) -> list[int]:
    """A systematic sample: positions at equal distances in the order of outcome, starting `offset` (0 to 1) of the way
    into the first. Every outcome comes within 1 of its share. Example: choose([1, 0, 0, 1], 2, 0.5) -> [2, 3]"""
    order = sorted(range(len(outcomes)), key=lambda i: outcomes[i])
    distance = max(1.0, len(order) / number)
    return [order[int((k + offset) * distance)] for k in range(min(number, len(order)))]


def _gallery(folder: Path, before: list[Row], after: list[Row], problems: list[str]) -> list[dict[str, Any]]:
    """For each task: its name, how often each outcome happened, and the chosen pictures before and after."""
    found = [{image_key(row): row for row in rows} for rows in (before, after)]
    keys = [key for key in found[1] if key in found[0]] or list(found[1] or found[0])
    tags, tasks = list(dict.fromkeys(key[2] for key in keys)), []
    for place, tag in enumerate(tags):
        pairs = [[side.get(key) for side in found] for key in keys if key[2] == tag]
        outcomes = [tuple(row["correct"] for row in pair if row) for pair in pairs]
        cards = []
        for i in choose(outcomes, PAIRS_PER_TASK, (place + 0.5) / len(tags)):
            shown = zip(pairs[i], ("before", "after"), strict=True)
            sides = [(when, row, embed(folder / when, row, problems)) for row, when in shown if row]
            cards.append({"sides": sides, "outcome": outcomes[i], "row": pairs[i][1] or pairs[i][0]})
        tasks.append({"name": task_name(tag), "cards": cards, "counts": Counter(sorted(outcomes)), "n": len(pairs)})
    return tasks


# ----------------------------------------------------------------------------------------- reading, the page


def read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """The object in a JSON file; {} and a word about it where there is none."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    problems.append(f"{path.name} is {'damaged' if path.is_file() else 'missing'}")
    return {}


def read_rows(path: Path, needed: Mapping[str, Any], problems: list[str], *, name: str = "") -> list[Row]:
    """The objects of a JSONL file that have the `needed` fields; the others are counted in `problems`, under `name`
    (default: where the file lies in a run)."""
    name = name or (path.name if path.name == "metrics.jsonl" else f"evaluation/{path.parent.name}/{path.name}")
    if not path.is_file():
        problems.append(f"{name} is missing")
        return []
    rows, damaged = [], 0
    for line in filter(None, map(bytes.strip, path.read_bytes().splitlines())):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and all(isinstance(row.get(field), kind) for field, kind in needed.items()):
            rows.append(row)
        else:
            damaged += 1
    problems += [f"{name}: {damaged} damaged {'line' if damaged == 1 else 'lines'} skipped"] if damaged else []
    return rows


def read_side(folder: Path, problems: list[str]) -> dict[str, Any]:
    """One evaluation: {"summary", "generated", "references"}, empty where absent."""
    summary = folder.with_suffix(".json")
    if absent := not (folder.exists() or summary.exists()):
        problems.append(f"evaluation/{summary.name} is missing: no evaluation {folder.name} training was written")
    told = [] if absent else problems
    return {
        "summary": read_json(summary, told),
        "generated": read_rows(folder / "results.jsonl", _RESULT, told),
        "references": read_rows(folder / "references.jsonl", _REFERENCE, told),
    }


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run directory from what is there, and returns its path.

    ValueError if the directory is absent, or holds neither metrics nor an evaluation.
    """
    problems: list[str] = []
    config = read_json(run_dir / "config.json", problems)
    metrics = read_rows(run_dir / "metrics.jsonl", {"step": int | float}, problems)
    folder = run_dir / "evaluation"
    before, after = (read_side(folder / when, problems) for when in ("before", "after"))
    if not (metrics or before["summary"] or after["summary"]):
        raise ValueError(f"{run_dir} is no run directory with anything to report: {'; '.join(problems)}")
    for key in (
        ("seed", "sampling", "label", "detector", "max_new_tokens") if before["summary"] and after["summary"] else ()
    ):
        old, new = (side["summary"].get(key) for side in (before, after))
        problems += [f"the evaluations differ in {key}: {old} before, {new} after"] if old != new else []
    for file in sorted(folder.glob("*.json")):  # what was measured, and is none: of the looks in between, too
        warnings = get(read_json(file, []), "warnings")
        problems += (
            [f"evaluation/{file.name}: {told}" for told in warnings if told] if isinstance(warnings, list) else []
        )
    paired, summaries = paired_changes(before, after), (before["summary"], after["summary"])
    pages = jinja2.Environment(loader=jinja2.PackageLoader("openunirl"), autoescape=True, **JINJA)
    page = pages.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        config=config,
        lines=headline(*summaries, paired),
        tables={what: by_task(what, *summaries, paired) for what in ("geneval", "understanding")},
        summaries=summaries,
        tags=tags_of("imbalance", *summaries),
        gallery=_gallery(folder, before["generated"], after["generated"], problems),
        seconds=sum(number(row.get("seconds")) or 0 for row in metrics),
        last={key: value for row in metrics for key, value in row.items() if number(value) is not None},
        curve=lambda named, ends=(): curve(metrics, named, ends),
        problems=problems,
        detector_notice=detector_notice(get(config, "reward", "sources")),
        about=ABOUT_A_RUN,
        unsettled={name: unsettled_lines(s) for name, s in zip(("before", "after"), summaries, strict=True)},
        reward_title=reward_title,
        **{"collusion": collusion, "level": level, "score": score, "get": get, "task": task_name, "in_words": in_words},
    )
    path = run_dir / "report.html"
    with whole(path) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))  # JSON may hold lone surrogates
    return path
