"""`openunirl report RUN RUN ...`: one self-contained page that compares runs and evaluations with the first of them.

    run directories, folders of `evaluate` -> Sides -> lines (levels, changes, p) -> comparison.html, comparison.json

In: what compare_sources.py reads. Out: the page (templates/compare.html.j2), the same numbers as JSON, and tables on
the terminal with what is unfair under them.

Source: METHOD 5-7 for what is measured; evaluation/paired.py for changes. Departures: 1. a change is that of the images
that both hold, which may be fewer than those of the levels beside it: n prompts are told.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openunirl.compare_sources import Side, differences, read_sources
from openunirl.disk import whole
from openunirl.evaluation.paired import (
    RATES,
    Change,
    answer_key,
    change,
    distinct,
    image_key,
    imbalance_changes,
    reference_key,
)
from openunirl.report import JINJA, choose, embed, in_words
from openunirl.report_curves import curves
from openunirl.report_numbers import Level, Row, gap, get, level, overstated, score, tags_of, task_name

CARDS_PER_TASK = 3
_WIDEST = 1000
_MOST_TOLD = 10
_PANELS = {
    "Reward in training": ("mean reward", "reward", ()),
    "Small evaluations: drawing": ("share right", "eval/geneval", (0, 1)),
    "Small evaluations: understanding": ("share right", "eval/understanding", (0, 1)),
    "Collusion gap": ("self-reward - detector", "eval/collusion_gap", (0,)),
    "Imbalance score": ("mean share wrong", "eval/imbalance", (0, 1)),
    "KL to the base": ("KL (k3 estimate)", "kl", (0,)),
    "Entropy": ("nats per token", "entropy", (0,)),
    "Gradient norm": ("before clipping", "grad_norm", (0,)),
}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One line: a level for each side, and a change against the first side for each (None for the first).

    better: the sign of a change for the better, 0 where neither is.
    """

    name: str
    levels: list[Level | None]
    changes: list[Change | None]
    better: int = 1
    group: str = ""


def write_comparison(places: Sequence[Path], page: Path) -> Path:
    """Writes `page` and the same numbers beside it as .json.

    Errors: ValueError where a place holds nothing to compare, or is named twice.
    """
    problems: list[str] = []
    sides, runs = read_sources(places, problems)
    lines = compare(sides)
    problems += differences(sides)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("openunirl"), autoescape=True, **JINJA)
    told = environment.get_template("compare.html.j2").render(
        sides=sides,
        lines=lines,
        gallery=gallery(sides, problems),
        panels=[
            (title, axis, drawn)
            for title, (axis, metric, ends) in _PANELS.items()
            if (drawn := curves([(name, rows, metric) for name, rows in runs.items()], ends))
        ],
        problems=problems,
        **{"get": get, "in_words": in_words},
    )
    with whole(page) as partial:
        partial.write_bytes(told.encode("utf-8", "replace"))
    numbers = {"sides": [side.name for side in sides], "lines": [asdict(line) for line in lines], "notes": problems}
    with whole(page.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    console = Console()
    for side in range(1, len(sides) if lines else 0):
        told = table(sides, lines, side)
        wide = console.measure(told, options=console.options.update(max_width=_WIDEST)).maximum
        Console(width=max(console.width, wide)).print(told)  # a pipe is 80 wide, and would cut numbers
    for problem in problems[:_MOST_TOLD]:
        console.print(f"note: {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > _MOST_TOLD:
        console.print(f"and {len(problems) - _MOST_TOLD} more, in {page.with_suffix('.json')}", soft_wrap=True)
    return page


# ------------------------------------------------------------------------------------------------- the numbers


def compare(sides: Sequence[Side]) -> list[Compared]:
    """All lines, those without any level left out."""
    if not sides:
        return []
    summaries = [side.summary for side in sides]
    lines: list[Compared] = []
    for what, title, kind, key, value in (
        ("geneval", "Drawing", "generated", image_key, lambda row: row["correct"]),
        ("understanding", "Understanding", "references", reference_key, _answered),
    ):
        tags = tags_of(what, *summaries)
        for tag in ["", *tags[:-1]]:
            parts = [level(get(s, what, "tasks", tag) if tag else get(s, what)) for s in summaries]
            pairs = [getattr(side, kind) for side in sides]
            macro = what == "geneval" and not tag
            changes = [change(pairs[0], pair, value, key, tag=tag, macro=macro) for pair in pairs]
            lines.append(_line(task_name(tag) if tag else title, parts, changes, group="" if not tag else title))
    asked = [side.asked for side in sides]
    own = [change(asked[0], each, _answered, answer_key) for each in asked]
    excess = [change(asked[0], each, overstated, answer_key, reach=2.0) for each in asked]
    both = [(each, side.references) for each, side in zip(asked, sides, strict=True)]
    moved = [imbalance_changes(both[0], each) for each in both]
    names = {RATES[0]: "answer wrong, image right", RATES[1]: "image wrong, answer right"}
    lines += [
        _line("Self-reward", [level(get(s, "self_reward_interval")) for s in summaries], own, better=0),
        _line("Collusion gap", [gap(s) for s in summaries], excess, better=-1),
        _line(
            "Imbalance score",
            [score(get(s, "imbalance")) for s in summaries],
            [each.get("score") for each in moved],
            better=-1,
        ),
    ]
    for rate, words in names.items():
        levels = [level(get(s, "imbalance", "intervals", rate)) for s in summaries]
        lines.append(_line(words, levels, [each.get(rate) for each in moved], better=-1, group="Imbalance"))
    return [line for line in lines if any(line.levels)]


def _answered(row: Row) -> float:
    return row["answer_correct"]


def _line(name: str, levels: Sequence[Level | None], changes: Sequence[Change | None], **about: Any) -> Compared:
    """The first side is not compared with itself, and a side without a level with nothing."""
    kept = [c if i and levels[0] and levels[i] else None for i, c in enumerate(changes)]
    return Compared(name=name, levels=list(levels), changes=kept, **about)


def table(sides: Sequence[Side], lines: Sequence[Compared], which: int) -> Table:
    """One side against the first, for the terminal, in percent and points."""
    title = f"{sides[which].name} against {sides[0].name}, in % (95 % interval)"
    told = Table(title=escape(title), box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "first", "this", "change", "p", "prompts"):
        told.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for line in lines:
        moved, shown = line.changes[which], [line.levels[0], line.levels[which]]
        cells = [f"{100 * each.value:.1f}" if each else "-" for each in shown]
        if moved:
            ends = "no interval"
            if moved.low is not None and moved.high is not None:
                ends = f"{100 * moved.low:+.1f}..{100 * moved.high:+.1f}"
            cells.append(f"{100 * moved.value:+.1f} ({ends})")
            cells += [f"{moved.p:.4f}" if moved.p >= 1e-4 else f"{moved.p:.0e}", str(moved.prompts)]
        else:
            cells += ["-", "-", "-"]
        told.add_row(("  " if line.group else "") + escape(line.name), *cells)
    return told


# ------------------------------------------------------------------------------------------------ the pictures


def gallery(sides: Sequence[Side], problems: list[str]) -> list[dict[str, Any]]:
    """For each task: its name, how often each outcome happened, and chosen images that all sides hold, side by side."""
    found = [distinct(side.generated, image_key) for side in sides]
    keys = [key for key in (found[0] if found else ()) if all(key in rows for rows in found[1:])]
    tags, tasks = list(dict.fromkeys(key[2] for key in keys)), []
    for place, tag in enumerate(tags):
        groups = [[rows[key] for rows in found] for key in keys if key[2] == tag]
        outcomes = [tuple(row["correct"] for row in group) for group in groups]
        chosen = choose(outcomes, CARDS_PER_TASK, (place + 0.5) / len(tags))
        cards = [
            [
                (side.name, row, embed(side.folder, row, problems) if side.folder.is_dir() else None)
                for side, row in zip(sides, groups[i], strict=True)
            ]
            for i in chosen
        ]
        tasks.append({"name": task_name(tag), "cards": cards, "counts": Counter(sorted(outcomes)), "n": len(groups)})
    return tasks
