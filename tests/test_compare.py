"""Comparisons: p-values and intervals by hand and by simulation, the page and its numbers, what is refused."""

import json
import math
import shutil

import numpy as np
import pytest

from openunirl.cli import main
from openunirl.compare import write_comparison
from openunirl.evaluation.paired import RATES, change, imbalance_changes, mcnemar, reference_key, sign_flip
from openunirl.report import write_report
from openunirl.report_numbers import paired_changes
from report_runs import AFTER, BEFORE, Page, references, report_rows, write, write_side


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(1, 8) == mcnemar(8, 1)
    with pytest.raises(ValueError, match="gained = -1"):
        mcnemar(-1, 2)


def test_sign_flips_agree_with_the_exact_test_where_both_apply():
    rng = np.random.default_rng(0)
    difference = np.array([1.0] * 9 + [-1.0] * 3 + [0.0] * 20)
    assert sign_flip(difference, rng) == pytest.approx(mcnemar(9, 3))
    # the same differences beside two others go through the random flips, and where all are few, through all of them
    assert sign_flip(np.append(difference, [1e-11, 2e-11]), rng) == pytest.approx(mcnemar(9, 3), abs=0.015)
    assert sign_flip(np.array([0.5, 1.0, 1.0, 0.25]), rng) == 2 / 2**4
    assert sign_flip(np.full(30, 1.0) + np.arange(30) / 100, rng) == pytest.approx(1 / 10_001)


def test_p_values_hold_their_level():
    """Of equal models 5 % get p < 0.05, within what 400 trials tell; two images a prompt."""
    rng, below = np.random.default_rng(1), 0
    for _ in range(400):
        p = rng.random(40)
        a, b = (rng.random((40, 2)) < p[:, None] for _ in range(2))
        below += sign_flip(b.mean(1) - a.mean(1), rng, draws=400) < 0.05
    assert below <= 400 * 0.05 + 4 * math.sqrt(400 * 0.05 * 0.95)


def rows(pairs, tag="colors"):
    return [
        {"tag": tag, "prompt": f"p{i}", "index": i, "sample": 0, "correct": c, "answer_correct": a}
        for i, (c, a) in enumerate(pairs)
    ]


def test_a_change_is_that_of_the_common_images():
    a, b = rows([(False, True)] * 6), rows([(True, True)] * 4)
    got = change(a, b, lambda row: row["correct"])
    assert got is not None and (got.value, got.prompts, got.p) == (1.0, 4, mcnemar(4, 0))
    assert (got.low, got.high) == (0.0, 1.0)  # Newcombe's alone would leave 0 out, which p = 0.125 does not
    same = change(a, a, lambda row: row["correct"])
    assert same is not None and same.low is not None and same.low < -0.3 and same.high == -same.low
    assert change(a, rows([(True, True)], tag="counting"), lambda row: row["correct"]) is None


def test_intervals_and_p_values_agree():
    """Two images a prompt, so that the test's own interval is told: it leaves out 0 exactly where p < 0.05."""
    rng, told = np.random.default_rng(3), {True: 0, False: 0}
    for number in (5, 8, 14, 30) * 8:
        a, b = (
            [row | {"sample": k} for k in range(2) for row in rows([(x, True) for x in rng.random(number) < p])]
            for p in (0.4, 0.7)
        )
        got = change(a, b, lambda row: row["correct"])
        assert got is not None
        if got.low is None or got.high is None:
            assert got.p >= 0.05 / 2  # fewer than six prompts changed
            continue
        assert got.low < got.value < got.high or got.high == 1.0
        assert (got.low > 0 or got.high < 0) == (got.p < 0.05)
        told[got.p < 0.05] += 1
    assert min(told.values()) > 4


def test_intervals_cover():
    """In 95 % of 200 pairs of evaluations with two images a prompt, as far as these tell."""
    rng, held = np.random.default_rng(4), 0
    for _ in range(200):
        share = rng.random(40) * 0.8
        a, b = (
            [row | {"sample": k} for k in range(2) for row in rows([(x, True) for x in rng.random(40) < share + more])]
            for more in (0.0, 0.2)
        )
        got = change(a, b, lambda row: row["correct"])
        assert got is not None and got.low is not None and got.high is not None
        held += got.low <= 0.2 <= got.high
    assert held >= 200 * 0.95 - 3 * math.sqrt(200 * 0.05 * 0.95)


def test_the_macro_mean_weighs_tasks_alike():
    a = rows([(False, True)] * 6) + rows([(False, True)] * 2, tag="counting")
    b = rows([(False, True)] * 6) + rows([(True, True)] * 2, tag="counting")
    got = change(a, b, lambda row: row["correct"], macro=True)
    assert got is not None and got.value == pytest.approx(0.5)


def test_imbalance_changes():
    a = rows([(True, False)] * 20 + [(False, True)] * 20)
    b = rows([(True, True)] * 20 + [(False, True)] * 20)
    read = rows([(True, True)] * 40)
    got = imbalance_changes((a, read), (b, read))
    first, second, score = (got[name] for name in (*RATES, "score"))
    assert (first.value, first.prompts) == (-1.0, 20) and first.p == pytest.approx(mcnemar(20, 0))
    assert (second.value, second.p, second.prompts, second.low) == (0.0, 1.0, 40, None)
    assert (score.value, score.prompts) == (-0.5, 40)
    assert score.low is not None and score.high is not None and score.low <= -0.5 <= score.high < 0
    assert "score" not in imbalance_changes((a, []), (b, []))  # no references, so no second rate


def test_imbalance_of_few_right_pictures_is_the_exact_test_of_these():
    """5 right pictures of 100, which one misreads and the other reads; and where only one drew any."""
    a, b = (rows([(i < 5, right and i < 5) for i in range(100)]) for right in (False, True))
    got = imbalance_changes((a, []), (b, []))[RATES[0]]
    assert (got.value, got.prompts, got.low, got.high) == (-1.0, 5, None, None) and got.p == pytest.approx(2 / 2**5)
    assert imbalance_changes((a, []), (rows([(False, False)] * 100), [])) == {}
    few = rows([(i < 9, i % 3 > 0) for i in range(100)])  # 9 right pictures against 60: too few to compare
    assert imbalance_changes((few, []), (rows([(i > 39, i % 3 > 0) for i in range(100)]), [])) == {}


@pytest.mark.parametrize(("a", "b", "misread"), [(0.15, 0.15, 0.5), (0.5, 0.5, 0.3), (0.3, 0.9, 0.3)])
def test_imbalance_p_values_hold_their_level(a, b, misread):
    """Of models that misread equally often 5 % get p < 0.05, however well they draw, as far as 100 trials tell."""
    rng, below, trials = np.random.default_rng(2), 0, 100
    for _ in range(trials):
        sides = [rows(zip(rng.random(80) < p, rng.random(80) >= misread, strict=True)) for p in (a, b)]
        got = imbalance_changes((sides[0], []), (sides[1], [])).get(RATES[0])
        below += got is not None and got.p < 0.05
    assert below <= trials * 0.05 + 3 * math.sqrt(trials * 0.05 * 0.95)


def test_several_references_of_one_prompt_are_several_pictures():
    """Right F, F, F, T against T, T, T, T: the last alone would be a change of 0."""
    a, b = (
        [row | {"index": 0, "prompt": "p", "sample": i, "digest": f"{i}"} for i, row in enumerate(rows(told))]
        for told in ([(True, i == 3) for i in range(4)], [(True, True)] * 4)
    )
    got = change(a, b, answered, reference_key)
    assert got is not None and (got.value, got.prompts, got.p) == (0.75, 1, 1.0)
    nameless = [[{k: v for k, v in row.items() if k not in ("sample", "digest")} for row in side] for side in (a, b)]
    assert change(*nameless, answered, reference_key) is None  # which is whose partner cannot be told
    paired = paired_changes({"generated": [], "references": a}, {"generated": [], "references": b})
    assert paired["understanding", ""][0] == 0.75
    paired = paired_changes(*({"generated": [], "references": side} for side in nameless))
    assert ("understanding", "") not in paired


def answered(row):
    return row["answer_correct"]


@pytest.mark.parametrize("other", [{"question": "how many?"}, {"digest": "00"}, {"prompt": "a photo of dogs"}])
def test_what_differs_has_no_partner(other):
    a, b = rows([(True, False), (True, True)] * 10), rows([(True, True)] * 20)
    for each in (a, b):
        each[:] = [row | {"question": "what is it?", "digest": "ff"} for row in each]
    unlike = [row | other for row in b]
    assert change(a, b, answered, reference_key) is not None and change(a, unlike, answered, reference_key) is None
    assert set(imbalance_changes((a, a), (b, b))) == {RATES[0], RATES[1], "score"}
    alike = {RATES[0]} if "digest" in other else set()  # what both drew is known by its prompt and sample
    assert set(imbalance_changes((a, a), (unlike, unlike))) == alike


def test_the_second_rate_is_of_the_reference_pictures_that_both_read():
    drawn = rows([(False, True)] * 20)
    read = rows([(True, i < 10) for i in range(20)])
    others = [row | {"digest": "00"} for row in rows([(True, True)] * 20)[10:]]
    got = imbalance_changes((drawn, read), (drawn, read[:10] + others))[RATES[1]]
    assert (got.value, got.prompts) == (0.0, 10)


# ----------------------------------------------------------------------------------------------------- the page


def evaluation(folder, right, seed=2):
    """A folder as `evaluate` writes it."""
    write_side(folder, "after", report_rows(right, 0.3, seed), references(2))
    (folder / "evaluation" / "after").rename(folder / "moved")
    summary = (folder / "evaluation" / "after.json").read_text()
    shutil.rmtree(folder / "evaluation")
    (folder / "moved").rename(folder / "evaluation")
    (folder / "evaluation.json").write_text(summary)
    return folder


def test_evaluations_side_by_side(tmp_path, capsys):
    a, b, c = (evaluation(tmp_path / n, r) for n, r in (("a", BEFORE), ("b", AFTER), ("c", BEFORE)))
    page = tmp_path / "out" / "page.html"
    assert main(["report", str(a), str(b), str(c), "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "b against a" in printed and printed.endswith(f"{page}\n")
    assert "…" not in printed and "+41.7 (+0.0..+64.3)" in printed and "answer wrong, image right" in printed
    told = Page(page)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in told.elements} and "http:" not in told.source
    assert "b: drawing changed by +38.9 points against a" in told.texts["verdict"]
    assert "c: drawing did not change: +0.0 points against a" in told.texts["verdict"]
    assert len(told.images) == 3 * 3 * 3  # tasks, cards, sides
    counting = told.row("comparison", "counting")
    assert counting[1].startswith("25.0 %") and "66.7 %" in counting[2] and "+41.7" in counting[2]
    assert f"p = {mcnemar(5, 0):.4f}" in counting[2]
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert numbers["sides"] == ["a", "b", "c"]
    drawing = next(line for line in numbers["lines"] if line["name"] == "Drawing")
    assert drawing["changes"][0] is None and drawing["changes"][1]["value"] == pytest.approx(14 / 36)
    assert {"Imbalance score", "Collusion gap", "Self-reward", "Understanding"} <= {n["name"] for n in numbers["lines"]}


def test_runs_bring_their_base_and_their_curves(tmp_path):
    for name, right in (("x", AFTER), ("y", BEFORE)):
        write_side(tmp_path / name, "before", report_rows(BEFORE, 0.3, 1), references(2))
        write_side(tmp_path / name, "after", report_rows(right, 0.3, 2), references(2))
        write(tmp_path / name / "metrics.jsonl", [{"step": s, "reward": s / 9} for s in range(1, 9)])
    told = Page(write_comparison([tmp_path / "x", tmp_path / "y"], tmp_path / "page.html"))
    assert [row for row in told.rows["comparison"][0]] == ["", "x, before", "x", "y"]
    assert told.source.count('class="panel"') == 1 and "x from 0.111 to 0.889; y from" in told.source


def test_what_is_unfair_is_told(tmp_path, capsys):
    a, b = evaluation(tmp_path / "a", BEFORE), evaluation(tmp_path / "b", AFTER)
    summary = json.loads((b / "evaluation.json").read_text())
    (b / "evaluation.json").write_text(json.dumps(summary | {"seed": 5}))
    results = b / "evaluation" / "results.jsonl"
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:30]))
    with results.open("a") as file:
        file.write("{\n" * 2)
    problems = Page(write_comparison([a, b], tmp_path / "page.html")).texts["problems"]
    printed = capsys.readouterr().out
    for words in (
        "differ in seed: a: 0; b: 5",
        "the changes are those of the 30 that both have",
        "2 damaged lines skip",
    ):
        assert words in problems and words in printed.split("b against a")[1]


@pytest.mark.parametrize(
    "odd", [{"geneval": {"tasks": [[1]]}}, {"collusion_gap_interval": [1]}, {"self_reward": 10**400}]
)
def test_odd_values_in_a_summary_are_left_out(tmp_path, odd):
    a, b = evaluation(tmp_path / "a", BEFORE), evaluation(tmp_path / "b", AFTER)
    summary = json.loads((b / "evaluation.json").read_text()) | odd
    summary["self_reward_interval"]["accuracy"] = summary["self_reward"]
    (b / "evaluation.json").write_text(json.dumps(summary))
    page = write_comparison([a, b], tmp_path / "page.html")
    lines = {line["name"]: line["levels"] for line in json.loads(page.with_suffix(".json").read_text())["lines"]}
    name = {"geneval": "Drawing", "collusion_gap_interval": "Collusion gap", "self_reward": "Self-reward"}[
        next(iter(odd))
    ]
    assert lines[name][0] is not None and lines[name][1] is None and lines["Understanding"][1] is not None


def test_nothing_to_compare(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    a = evaluation(tmp_path / "a", BEFORE)
    for folders, words in (((a, tmp_path / "empty"), "holds nothing to compare"), ((a, a), "is named twice")):
        assert main(["report", *map(str, folders), "--output", str(tmp_path / "page.html")]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_one_run_still_gets_its_own_report(tmp_path, capsys):
    write_side(tmp_path / "x", "after", report_rows(AFTER, 0.3, 2), references(2))
    assert main(["report", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x' / 'report.html'}\n"
    assert write_report(tmp_path / "x").exists()
