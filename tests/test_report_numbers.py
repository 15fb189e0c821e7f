"""The report's numbers: intervals, verdicts, tables, on the page and in the terminal."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from openunirl.evaluation.intervals import wilson
from openunirl.evaluation.run import summarize_rows
from openunirl.report import choose, curve, write_report
from openunirl.report_numbers import paired_changes, summary_table
from report_runs import (
    AFTER,
    BEFORE,
    TAGS,
    Page,
    edit,
    references,
    report_rows,
    write,
    write_run,
    write_side,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


def test_imbalance_counts_rates_and_score(run: Path) -> None:
    page = Page(write_report(run))
    summary = json.loads((run / "evaluation" / "after.json").read_text(encoding="utf-8"))["imbalance"]
    cells = page.row("imbalance-table", "overall")
    assert cells[4].startswith(f"{100 * summary['image_wrong_given_answer_right']:.1f} %") and "n = 33" in cells[4]
    low, high = (100 * end for end in summary["score_interval"]["ci95"])
    assert cells[6] == f"{100 * summary['score']:.1f} %{low:.1f} to {high:.1f}"
    quads = re.findall(r'<table class="quad"><caption>(.*?)</caption>(.*?)</table>', page.source, re.DOTALL)
    assert len(quads) == 4 * (1 + len(TAGS))
    numbers = {title: [int(x) for x in re.findall(r">(\d+)</td>", table)] for title, table in quads[:4]}
    order = [f"image_{i}_answer_{a}" for i in ("right", "wrong") for a in ("right", "wrong")]
    assert numbers["own pictures, after"] == [summary["own_images"][key] for key in order]
    assert numbers["reference pictures, after"] == [summary["reference_images"][key] for key in order]


@pytest.mark.parametrize("before, after, grows", [(0, 1, True), (1, 0, False), (1, 1, False), (0, 0, False)])
def test_a_growing_gap_is_called_collusion(run: Path, before: float, after: float, grows: bool) -> None:
    for when, answered in (("before", before), ("after", after)):
        write_side(run, when, report_rows(BEFORE, answered, 2), references(3))
    page = Page(write_report(run))
    assert ("this run shows collusion" in page.texts["verdict"]) == grows
    assert ("This run shows collusion." in page.body) == grows == ("collusion" in page.texts)
    if grows:
        assert "grew from 0.0 to 69.4 points (+69.4 points, 95 % interval" in page.texts["collusion"]
        assert "may be chance" not in page.texts["collusion"]
        rows = report_rows(BEFORE, 0, 2)
        next(row for row in rows if not row["correct"])["answer_correct"] = True
        write_side(run, "after", rows, references(3))
        page = Page(write_report(run))
        assert "may be chance" in page.texts["collusion"] and "This run shows collusion." not in page.body


def test_prompts_that_were_trained_on_are_told_apart(run: Path) -> None:
    rows = report_rows(BEFORE, 1, 2)
    counted = {row["prompt"] for row in rows if row["tag"] == "counting"}
    summary = summarize_rows(rows, references(0), "oracle", counted)
    rest = [row for row in rows if row["tag"] != "counting"]
    unseen = summary["geneval"]["unseen"]
    assert (unseen["n"], unseen["correct"]) == (len(rest), sum(row["correct"] for row in rest))
    assert summary["geneval"]["tasks"]["counting"]["trained_prompts"] == len(counted)
    assert "new prompts" not in Page(write_report(run)).body
    for when in ("before", "after"):
        (run / "evaluation" / f"{when}.json").write_text(json.dumps(summary))
    page = Page(write_report(run))
    assert f"counting {len(counted)} of {len(counted)}" in page.body and "new prompts" in page.body


def test_changes_average_the_images_of_a_prompt_and_weigh_tasks_equally() -> None:
    few = {i for i in range(18, 36) if TAGS[i % 3] == "counting"}  # so that tasks have different sizes
    before, after = ([r for r in report_rows(x, 0, 0, samples=2) if r["index"] not in few] for x in (BEFORE, AFTER))
    after = [row | {"correct": row["correct"] or row["sample"] == 1} for row in after]
    found = paired_changes({"generated": before, "references": []}, {"generated": after, "references": []})
    old, new = (summarize_rows(rows, references(0), "oracle")["geneval"] for rows in (before, after))
    mean, low, high = found["geneval", ""]
    assert mean == pytest.approx(new["overall"] - old["overall"]) and low < mean < high
    a, b = ([1.0 if place < 6 else 0.5 for place in range(12)], [place < 2 for place in range(12)])
    moved = np.subtract(a, b) / 12
    sums = [float(moved @ signs) for signs in itertools.product((1, -1), repeat=12)]
    half = sorted(map(abs, sums))[-math.ceil(0.05 * len(sums))]
    assert found["geneval", "position"] == pytest.approx((7 / 12, 7 / 12 - half, min(7 / 12 + half, 1.0)))
    assert ("understanding", "") not in found


def test_sides_that_do_not_belong_together(run: Path) -> None:
    for field, value in [("prompt", "other"), ("correct", True)]:
        write(
            run / "evaluation" / "after" / "results.jsonl", [row | {field: value} for row in report_rows(AFTER, 0.3, 2)]
        )
        page = Page(write_report(run))
        assert page.row("geneval-table", "overall")[3].endswith("no interval")
        assert not page.row("understanding-table", "overall")[3].endswith("no interval")
    edit(run / "evaluation" / "after.json", lambda side: side | {"sampling": {"num_timesteps": 8}, "seed": 5})
    page = Page(write_report(run))
    assert "differ in sampling" in page.texts["problems"] and "in seed: 0 before, 5 after" in page.texts["problems"]
    assert "same prompts with the same seeds" not in page.body


def test_choice_is_in_proportion() -> None:
    rng = np.random.default_rng(0)
    for number, offset in ((4, 0.5), (7, 0.1), (10, 0.99)):
        outcomes = rng.integers(4, size=57).tolist()
        chosen = choose(outcomes, number, offset)
        assert len(set(chosen)) == number
        for outcome in range(4):
            share = outcomes.count(outcome) * number / len(outcomes)
            assert math.floor(share) <= sum(outcomes[i] == outcome for i in chosen) <= math.ceil(share)
    assert (sorted(choose([1, 0], 4, 0.9)), choose([], 4, 0.5)) == ([0, 1], [])


def test_curve_smooths_skips_and_thins() -> None:
    rows: list[dict[str, Any]] = [{"step": s, "reward": float(s % 2)} for s in range(3000)]
    rows += [{"step": step, "reward": value} for step, value in ((7, 5.0), (8, math.nan), (9, "x"), ("10", 1.0))]
    found = curve(rows, {"reward": "own"})
    (line,) = found["lines"]
    assert len(line["raw"]) <= 401 and line["raw"][-1] == (2999, 1.0)
    assert np.std([v for _, v in line["smooth"]][50:]) < 0.1 * np.std([v for _, v in line["raw"]])
    assert line["smooth"][-1][1] == pytest.approx(0.5, abs=0.05)
    assert found["y"][1] >= 5  # the last telling of step 7
    assert curve(rows, {"nothing": ""}) is None
    found = curve([{"step": 3, "kl": 0.0}], {"kl": ""}, (0,))
    assert found["y"][0] <= 0 < found["y"][1] and found["x"][0] == 3 < found["x"][1]
    assert found["lines"][0]["raw"] == [(3, 0.0)]


def test_summary_table(run: Path) -> None:
    before, after = (json.loads((run / "evaluation" / f"{when}.json").read_text()) for when in ("before", "after"))
    after["geneval"]["tasks"]["[red]odd"] = after["geneval"]["tasks"]["counting"]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(summary_table(before, after))
    printed = console.export_text()
    assert "…" not in printed  # nothing is cut off at 80 columns
    lines = {line.strip().split("  ")[0]: line.split() for line in printed.splitlines()}
    low, high = (f"{100 * end:.0f}" for end in wilson(8, 12))
    assert lines["counting"] == ["counting", "25.0", "(9..53)", "66.7", f"({low}..{high})", "+41.7", "12", "4"]
    assert lines["Collusion gap"][2] == f"{100 * before['collusion_gap']:.1f}" and lines["Collusion gap"][-2] == "36"
    assert {"[red]odd", "Drawing (GenEval)", "Understanding", "Self-reward", "Imbalance score"} <= lines.keys()
    for side in (before, after):  # as wide as they get
        side["geneval"]["unseen"] = side["geneval"]["tasks"]["counting"]
        rates = side["imbalance"]["intervals"].values()
        for part in (*rates, side["self_reward_interval"]):
            part |= {"n": 1234, "distinct_prompts": 553}
    console.print(summary_table(before, after))
    assert "…" not in console.export_text(clear=False)
    console.print(summary_table({}, after))
    assert re.search(r"Drawing \(GenEval\) +- +69\.4 \(\d+\.\.\d+\) +- +36", console.export_text())
