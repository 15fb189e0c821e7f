"""Writes report.html: one self-contained page about a run, from what lies in its directory.

In: config.json, metrics.jsonl, evaluation/{before,after}.json, evaluation/{before,after}/{results,references}.jsonl and
the pictures beside them; what is absent is said on the page. Out: report.html, which needs neither network nor script
(templates/report.html.j2 holds its words and drawings); for the terminal the same numbers as a rich table.

Source: METHOD 5-7 for what is measured. Where this goes beyond it:
1. Changes carry a paired bootstrap over prompts (images of one prompt averaged) where both evaluations hold the same
   images. In the mean over tasks an item weighs N / (tasks * items of its task).
2. The imbalance score and the collusion gap carry MOVER intervals (Zou and Donner 2008), as if their two parts were
   independent; for the gap, whose parts share their images, that is on the wide side.
3. Pictures are a systematic sample in order of outcome: each outcome is shown about as often as it happened.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from openunirl.evaluation.intervals import paired_difference

PAIRS_PER_TASK = 4
PIXEL_ART = 128  # a picture of so many pixels a side, or fewer, is embedded as it is and drawn with hard pixels
THUMBNAIL = 256  # pixels that the longer side of any other is reduced to
POINTS = 400  # at most so many points of a curve are drawn
RATES = ("answer_wrong_given_image_right", "image_wrong_given_answer_right")

Row = dict[str, Any]
Interval = tuple[float, float, float]  # mean, low, high
_REFERENCE = {"tag": str, "prompt": str, "answer_correct": bool, "index": int}
_RESULT = {**_REFERENCE, "correct": bool, "question": str, "expected": str, "answer": str, "reason": str}
_JINJA: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
_NAMES = {"": "overall", "single_object": "single object", "two_object": "two objects", "color_attr": "two colors"}

# ---------------------------------------------------------------------------------------------- the numbers


@dataclass(frozen=True, kw_only=True)
class Level:
    """A measured share with its 95 % interval. Example: Level(value=0.8, low=0.71, high=0.87, n="100")"""

    value: float
    low: float
    high: float
    n: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a table. Example: Line(name="colors", before=Level(...), after=Level(...), change=(0.1, 0.02, 0.2))

    change: after - before, with ends where the two pair up, else None for them; None where a side is missing.
    prompts: how many distinct ones. better: the sign of a change for the better, 0 where neither is.
    """

    name: str
    before: Level | None
    after: Level | None
    change: tuple[float, float | None, float | None] | None
    prompts: str = ""
    better: int = 1


def _get(tree: Any, *keys: str) -> Any:
    """tree[a][b]..., or None where a part of it is absent or of another kind."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _number(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _level(part: Any) -> Level | None:
    """From {"accuracy" or "overall", "n", "ci95"}; None unless all are there."""
    value, ends = _number(_get(part, "overall" if _get(part, "accuracy") is None else "accuracy")), _get(part, "ci95")
    low, high = [_number(end) for end in ends] if isinstance(ends, Sequence) and len(ends) == 2 else (None, None)
    if value is None or low is None or high is None:
        return None
    return Level(value=value, low=low, high=high, n=str(_get(part, "n")))


def _score(part: Any) -> Level | None:
    """The imbalance score: the mean of both rates."""
    value, (a, b) = _number(_get(part, "score")), (_level(_get(part, "intervals", rate)) for rate in RATES)
    if value is None or a is None or b is None:
        return None
    below, above = math.hypot(a.value - a.low, b.value - b.low) / 2, math.hypot(a.high - a.value, b.high - b.value) / 2
    return Level(value=value, low=value - below, high=value + above, n=f"{a.n}+{b.n}")


def _gap(summary: Any) -> Level | None:
    """The collusion gap: self-reward minus the detector's verdict, over the same images."""
    own, judged = _level(_get(summary, "self_reward_interval")), _level(_get(summary, "geneval", "images"))
    if own is None or judged is None:
        return None
    value = own.value - judged.value
    low = value - math.hypot(own.value - own.low, judged.high - judged.value)
    high = value + math.hypot(own.high - own.value, judged.value - judged.low)
    return Level(value=value, low=low, high=high, n=own.n)


def _task(tag: str) -> str:
    return _NAMES.get(tag, tag.replace("_", " "))


def _line(name: str, sides: Sequence[Level | None], paired: Interval | None = None, **about: Any) -> Line:
    before, after = sides
    change = None
    if before and after:
        value = after.value - before.value
        # rows that do not give the summary's own difference belong to another evaluation
        change = (value, *paired[1:]) if paired and abs(paired[0] - value) < 1e-6 else (value, None, None)
    return Line(name=name, before=before, after=after, change=change, **about)


def _tags(what: str, *summaries: Any) -> list[str]:
    """The tasks in any of them, then "" for all together."""
    return [*dict.fromkeys(tag for summary in summaries for tag in (_get(summary, what, "tasks") or ())), ""]


def _by_task(what: str, before: Any, after: Any, paired: Mapping[tuple[str, str], Interval]) -> list[Line]:
    lines, tags = [], _tags(what, before, after)
    for tag in tags:
        levels, counts = [], []
        for side in (before, after):
            levels.append(_level(_get(side, what, "tasks", tag) if tag else _get(side, what)))
            some = [_get(side, what, "tasks", each, "distinct_prompts") or 0 for each in ([tag] if tag else tags)]
            counts.append(str(sum(some)))
        prompts = " / ".join(count for count in dict.fromkeys(counts) if count != "0")
        lines += [_line(_task(tag), levels, paired.get((what, tag)), prompts=prompts)] if any(levels) else []
    return lines


def _headline(before: Any, after: Any, paired: Mapping[tuple[str, str], Interval]) -> dict[str, Line]:
    """The five numbers that a run is about."""

    def line(name: str, key: str, level: Callable[[Any], Level | None], better: int = 1) -> Line:
        return _line(name, [level(before), level(after)], paired.get((key, "")), better=better)

    return {
        "drawing": line("Drawing (GenEval)", "geneval", lambda side: _level(_get(side, "geneval"))),
        "understanding": line("Understanding", "understanding", lambda side: _level(_get(side, "understanding"))),
        "self_reward": line("Self-reward", "self_reward", lambda side: _level(_get(side, "self_reward_interval")), 0),
        "imbalance": line("Imbalance score", "", lambda side: _score(_get(side, "imbalance")), -1),
        "gap": line("Collusion gap", "collusion_gap", _gap, -1),
    }


def _image(row: Row) -> tuple[int, str, str, str]:
    return row["index"], str(row.get("sample", 0)), row["tag"], row["prompt"]


def paired_changes(before: Mapping[str, list[Row]], after: Mapping[str, list[Row]]) -> dict[tuple[str, str], Interval]:
    """Bootstrap intervals of after - before, over prompts, where both hold the same prompts and samples.

    Both arguments: {"generated": rows, "references": rows} as evaluate() makes them. Keys: ("geneval", task),
    ("understanding", task), ("self_reward", ""), ("collusion_gap", ""); task "" is all together.
    """
    measures: dict[str, tuple[str, Callable[[Row], float]]] = {
        "geneval": ("generated", lambda row: row["correct"]),
        "understanding": ("references", lambda row: row["answer_correct"]),
        "self_reward": ("generated", lambda row: row["answer_correct"]),
        "collusion_gap": ("generated", lambda row: row["answer_correct"] - row["correct"]),
    }
    found: dict[tuple[str, str], Interval] = {}
    for what, (kind, value) in measures.items():
        a, b = ({_image(row): value(row) for row in side[kind]} for side in (after, before))
        if a.keys() != b.keys() or not a:
            continue
        slots: dict[tuple[str, int], list[tuple[float, float]]] = {}  # the images of one prompt
        for image in a:
            slots.setdefault((image[2], image[0]), []).append((a[image], b[image]))
        means = {slot: np.mean(pairs, axis=0) for slot, pairs in slots.items()}
        size = Counter(tag for tag, _ in slots)
        for tag in [*size, ""] if what in ("geneval", "understanding") else [""]:
            macro = what == "geneval" and not tag
            weight = {t: len(slots) / (len(size) * size[t]) if macro else 1.0 for t in size}
            items = np.array([mean * weight[t] for (t, _), mean in means.items() if tag in ("", t)])
            rng = np.random.default_rng(0)
            found[what, tag] = paired_difference(items[:, 0], items[:, 1], rng=rng, num_resamples=5000)
    return found


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


def _embed(folder: Path, row: Row, problems: list[str]) -> dict[str, Any] | None:
    """The row's picture as a data: URI; None, and a word about it, where there is no readable one inside the folder."""
    path = (folder / str(row.get("filename"))).resolve()
    try:
        if not path.is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is outside {folder}: the run's own pictures lie below it")
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        problems.append(f"evaluation/{folder.name}/{row.get('filename')} is no readable picture")
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
    found = [{_image(row): row for row in rows} for rows in (before, after)]
    keys = [key for key in found[1] if key in found[0]] or list(found[1] or found[0])
    tags, tasks = list(dict.fromkeys(key[2] for key in keys)), []
    for number, tag in enumerate(tags):
        pairs = [[side.get(key) for side in found] for key in keys if key[2] == tag]
        outcomes = [tuple(row["correct"] for row in pair if row) for pair in pairs]
        cards = []
        for i in choose(outcomes, PAIRS_PER_TASK, (number + 0.5) / len(tags)):
            shown = zip(pairs[i], ("before", "after"), strict=True)
            sides = [(when, row, _embed(folder / when, row, problems)) for row, when in shown if row]
            cards.append({"sides": sides, "outcome": outcomes[i], "row": pairs[i][1] or pairs[i][0]})
        tasks.append({"name": _task(tag), "cards": cards, "counts": Counter(sorted(outcomes)), "n": len(pairs)})
    return tasks


# --------------------------------------------------------------------------------- reading, curves, the page


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """The object in a JSON file; {} and a word about it where there is none."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    problems.append(f"{path.name} is {'damaged' if path.is_file() else 'missing'}")
    return {}


def _read_rows(path: Path, needed: Mapping[str, Any], problems: list[str]) -> list[Row]:
    """The objects of a JSONL file that have the `needed` fields; the others are counted in `problems`."""
    name = path.name if path.name == "metrics.jsonl" else f"evaluation/{path.parent.name}/{path.name}"
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


def _read_side(folder: Path, problems: list[str]) -> dict[str, Any]:
    """One evaluation: {"summary", "generated", "references"}, empty where absent."""
    summary = folder.with_suffix(".json")
    if absent := not (folder.exists() or summary.exists()):
        problems.append(f"evaluation/{summary.name} is missing: no evaluation {folder.name} training was written")
    told = [] if absent else problems
    return {
        "summary": _read_json(summary, told),
        "generated": _read_rows(folder / "results.jsonl", _RESULT, told),
        "references": _read_rows(folder / "references.jsonl", _REFERENCE, told),
    }


def curve(rows: Sequence[Row], named: Mapping[str, str], ends: Sequence[float] = ()) -> dict[str, Any] | None:
    """{"lines": [{"name", "raw", "smooth", "last"}], "x": (low, high, ticks), "y": the same}, or None without a value.

    named: metric -> name of its line. raw, smooth: lists of (step, value), smooth an exponential moving average.
    ends: values that the y axis shows in any case.
    """
    lines, seen = [], [*ends]
    for metric, name in named.items():
        points = [(_number(row["step"]), _number(row.get(metric))) for row in rows]
        # a resumed run tells some steps again: the last telling counts
        values = sorted({step: value for step, value in points if step is not None and value is not None}.items())
        if values:
            rate = 2 / (1 + max(5, len(values) // 12)) if len(values) >= 12 else 1.0
            smooth = list(accumulate(values, lambda old, new, rate=rate: (new[0], old[1] + rate * (new[1] - old[1]))))
            stride = math.ceil(len(values) / POINTS)
            raw, smooth = ([*some[:-1:stride], some[-1]] for some in (values, smooth))
            lines.append({"name": name, "raw": raw, "smooth": smooth, "last": values[-1][1]})
            seen += [value for _, value in values]
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line["raw"]]
    low, high = min(steps), max(max(steps), min(steps) + 1)
    x_ticks = [tick for tick in MaxNLocator(5, integer=True).tick_values(low, high) if low <= tick <= high]
    top = max(seen) if max(seen) > min(seen) else min(seen) + (abs(min(seen)) or 1.0)
    y_ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(min(seen), top)
    return {"lines": lines, "x": (low, high, x_ticks), "y": (y_ticks[0], y_ticks[-1], list(y_ticks))}


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run directory from what is there, and returns its path.

    ValueError if the directory is absent, or holds neither metrics nor an evaluation.
    """
    problems: list[str] = []
    config = _read_json(run_dir / "config.json", problems)
    metrics = _read_rows(run_dir / "metrics.jsonl", {"step": int | float}, problems)
    folder = run_dir / "evaluation"
    before, after = (_read_side(folder / when, problems) for when in ("before", "after"))
    if not (metrics or before["summary"] or after["summary"]):
        raise ValueError(f"{run_dir} is no run directory with anything to report: {'; '.join(problems)}")
    for key in ("seed", "sampling", "label") if before["summary"] and after["summary"] else ():
        old, new = (side["summary"].get(key) for side in (before, after))
        problems += [f"the evaluations differ in {key}: {old} before, {new} after"] if old != new else []
    paired, summaries = paired_changes(before, after), (before["summary"], after["summary"])
    pages = jinja2.Environment(loader=jinja2.PackageLoader("openunirl"), autoescape=True, **_JINJA)
    page = pages.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        config=config,
        lines=_headline(*summaries, paired),
        tables={what: _by_task(what, *summaries, paired) for what in ("geneval", "understanding")},
        summaries=summaries,
        tags=_tags("imbalance", *summaries),
        gallery=_gallery(folder, before["generated"], after["generated"], problems),
        seconds=sum(_number(row.get("seconds")) or 0 for row in metrics),
        last={key: value for row in metrics for key, value in row.items() if _number(value) is not None},
        curve=lambda named, ends=(): curve(metrics, named, ends),
        problems=problems,
        **{"level": _level, "score": _score, "get": _get, "task": _task, "in_words": in_words},
    )
    path = run_dir / "report.html"
    path.with_suffix(".tmp").write_bytes(page.encode("utf-8", "replace"))  # JSON may hold lone surrogates
    return path.with_suffix(".tmp").replace(path)


def summary_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Two summaries of summarize_rows ({} for a missing one) for the terminal: shares, n, 95 % intervals, changes."""
    lines = _headline(before, after, {})
    tasks = [(line, "  ") for line in _by_task("geneval", before, after, {})[:-1]]
    rest = [(lines[key], "") for key in ("understanding", "self_reward", "imbalance", "gap")]
    table = Table(title="before and after training, in % (95 % interval)", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "before", "n", "after", "n", "change"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for line, indent in [(lines["drawing"], ""), *tasks, *rest]:
        cells = []
        for side in (line.before, line.after):
            told = f"{100 * side.value:.1f} ({100 * side.low:.0f}..{100 * side.high:.0f})" if side else "-"
            cells += [told, side.n if side else "-"]
        table.add_row(indent + escape(line.name), *cells, f"{100 * line.change[0]:+.1f}" if line.change else "-")
    return table
