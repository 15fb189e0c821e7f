"""GenEval's scorer on cases worked out by hand, and the intervals beside its accuracies."""

import math
from itertools import product

import numpy as np
import pytest

from openunirl.evaluation.geneval import ScoreParams, iou, keep, official_summary, relations, score, summarize
from openunirl.evaluation.intervals import paired_difference, wilson
from openunirl.types import Detection, Verdict

CENTRE = (100.0, 100.0, 110.0, 110.0)


def found(*scores, box=CENTRE):
    return [Detection(box=box, score=each) for each in scores]


def no_colors(name, objects):
    raise AssertionError(f"nobody asked for the color of {name}")


def scene(tag="two_object", include=(), exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "x"}


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


# ------------------------------------------------------------------------------------------- geometry


def test_iou_counts_the_last_pixel():
    assert iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1.0
    assert iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert iou((0, 0, 9, 9), (9, 0, 18, 9)) == pytest.approx(10 / 190)  # one shared column
    assert iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0.0
    assert iou((5, 5, 0, 0), (5, 5, 0, 0)) == 0.0


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-50, 0), ("left of",)),
        ((50, 0), ("right of",)),
        ((0, -50), ("above",)),
        ((0, 50), ("below",)),
        ((-50, -50), ("left of", "above")),
        ((50, 50), ("right of", "below")),
        ((50, 20), ("right of",)),
        ((2, 0), ()),  # exactly the threshold's share of both sizes: 0.1 * (10 + 10)
        ((3, 0), ()),  # 1 pixel beyond it, but only a third of the whole offset
        ((5, 0), ("right of",)),
        ((0, 0), ()),
    ],
)
def test_relations(offset, expected):
    dx, dy = offset
    assert relations((100 + dx, 100 + dy, 110 + dx, 110 + dy), CENTRE) == expected


# ------------------------------------------------------------------------------------------- what is kept


def test_threshold_is_strict_and_depends_on_the_tag():
    above = float(np.nextafter(np.float32(0.3), np.float32(1)))
    assert keep(found(0.3, above, 0.9), "colors") == [2, 1]
    assert keep(found(0.3, 0.9, 0.91), "counting") == [2]


def test_ties_go_to_the_later_and_the_best_come_first():
    assert keep(found(0.5, 0.7, 0.5, 0.7), "colors") == [3, 1, 2, 0]
    assert keep(found(*[0.5] * 20), "colors") == list(range(19, 3, -1))
    assert keep([], "colors") == []


def test_overlap_is_judged_after_the_cut_and_against_kept_boxes_only():
    boxes = [(0, 0, 9, 9), (4, 0, 13, 9), (8, 0, 17, 9)]  # a chain: IoU 60/140 with the next, 20/180 with the last
    chain = [Detection(box=box, score=0.9 - 0.1 * i) for i, box in enumerate(boxes)]
    assert keep(chain, "colors") == [0, 1, 2]
    assert keep(chain, "colors", ScoreParams(max_overlap=0.4)) == [0, 2]
    assert keep(chain, "colors", ScoreParams(max_overlap=0.4, max_objects=2)) == [0]


@pytest.mark.parametrize(
    "bad", [Detection(box=CENTRE, score=math.nan), Detection(box=(0.0, 0.0, math.inf, 1.0), score=0.9)]
)
def test_numbers_that_are_not_finite_are_an_error(bad):
    with pytest.raises(ValueError, match="detection 1 is not finite"):
        keep([*found(0.9), bad], "colors")


# ------------------------------------------------------------------------------------------- verdicts


def test_counting():
    metadata = scene("counting", [clause("cup", 2)], [clause("cup", 3)])
    assert score(metadata, {"cup": found(0.95, 0.95)}, no_colors) == Verdict(correct=True)
    assert score(metadata, {"cup": found(0.95, 0.5)}, no_colors).reason == "expected cup>=2, found 1"
    assert score(metadata, {"cup": found(0.95, 0.95, 0.95)}, no_colors).reason == "expected cup<3, found 3"
    assert score(metadata, {}, no_colors) == Verdict(correct=False, reason="expected cup>=2, found 0")


def test_only_the_claimed_objects_are_classified():
    asked = []

    def colors(name, objects):
        asked.append((name, [each.score for each in objects]))
        return ["blue", "red"][: len(objects)]

    metadata = scene("colors", [clause("cup", 2, color="red")])
    verdict = score(metadata, {"cup": found(0.5, 0.9, 0.8), "dog": found(0.9)}, colors)
    assert asked == [("cup", [0.9, 0.8])]
    assert verdict.reason == "expected red cup>=2, found 1 red; and 1 red, 1 blue"
    assert score(metadata, {"cup": found(0.9)}, no_colors).reason == "expected cup>=2, found 1"


def test_a_classifier_that_answers_too_little_is_an_error():
    with pytest.raises(ValueError, match="0 colors for 1 objects of class 'cup'"):
        score(scene("colors", [clause("cup", color="red")]), {"cup": found(0.9)}, lambda *_: [])


def test_colors_outside_the_ten_are_reported_last():
    verdict = score(scene("colors", [clause("cup", color="red")]), {"cup": found(0.9)}, lambda *_: ["gray"])
    assert verdict.reason == "expected red cup>=1, found 0 red; and 1 gray"


def test_position_reasons():
    metadata = scene("position", [clause("cow"), clause("cup", position=["above", 0])])
    cow = found(0.9)
    for box, reason in [
        ((100, 50, 110, 60), ""),
        ((50, 100, 60, 110), "expected cup above target, found left of target"),
        ((50, 150, 60, 160), "expected cup above target, found left of and below target"),
        (CENTRE, "expected cup above target, found  target"),
    ]:
        verdict = score(metadata, {"cow": cow, "cup": found(0.9, box=box)}, no_colors)
        assert verdict == Verdict(correct=not reason, reason=reason)
    verdict = score(metadata, {"cup": found(0.9)}, no_colors)
    assert verdict.reason == "expected cow>=1, found 0\nno target for cup to be above"


def test_a_misplaced_object_is_no_target():
    metadata = scene(
        "position", [clause("cow"), clause("cup", position=["above", 0]), clause("dog", position=["above", 1])]
    )
    detections = {"cow": found(0.9), "cup": found(0.9), "dog": found(0.9)}
    assert score(metadata, detections, no_colors).reason.splitlines()[1] == "no target for dog to be above"


@pytest.mark.parametrize("target", [1, 2, -1])
def test_a_target_that_is_no_earlier_clause_is_an_error(target):
    metadata = scene("position", [clause("cow"), clause("cup", position=["above", target])])
    with pytest.raises(ValueError, match=f"position target {target}"):
        score(metadata, {"cow": found(0.9), "cup": found(0.9)}, no_colors)


# ------------------------------------------------------------------------------------------- summaries


def rows(*verdicts):
    return [{"tag": tag, "prompt": prompt, "correct": correct} for tag, prompt, correct in verdicts]


def test_summary_by_hand():
    results = rows(("colors", "p", True), ("counting", "q", False), ("colors", "p", False), ("colors", "r", True))
    summary = summarize(results)
    assert list(summary.tasks) == ["colors", "counting"]
    assert (summary.tasks["colors"].correct, summary.tasks["colors"].n) == (2, 3)
    assert summary.tasks["colors"].ci95 == wilson(2, 3)
    assert summary.overall == pytest.approx((2 / 3 + 0) / 2)
    assert (summary.images.accuracy, summary.n) == (0.5, 4)
    assert (summary.prompts_any.correct, summary.prompts_all.correct, summary.prompts_all.n) == (2, 1, 3)
    below = (2 / 3 - wilson(2, 3)[0]) / 2
    above = math.hypot(wilson(2, 3)[1] - 2 / 3, wilson(0, 1)[1]) / 2
    assert summary.ci95 == pytest.approx((summary.overall - below, summary.overall + above))
    assert "% correct prompts: 66.67%\n" in official_summary(results)
    for number, row in enumerate(results):  # summary_scores.py groups by them: two scenes may be told alike
        row["metadata"] = f"{number}"
    assert "Total prompts: 4\n% correct images: 50.00%\n% correct prompts: 50.00%\n" in official_summary(results)
    alike = [row | {"metadata": "same"} for row in results]
    assert "Total prompts: 1\n" in official_summary(alike)


def test_one_task_has_the_interval_of_its_images():
    summary = summarize(rows(*[("colors", str(i), i < 7) for i in range(10)]))
    assert summary.ci95 == pytest.approx(wilson(7, 10))


def test_the_interval_of_the_overall_score_covers_it():
    rng = np.random.default_rng(0)
    rates = {"colors": 0.9, "counting": 0.3, "position": 0.1}
    covered = 0
    for _ in range(400):
        summary = summarize(
            rows(*[(tag, str(i), rng.random() < rate) for tag, rate in rates.items() for i in range(30)])
        )
        covered += summary.ci95[0] <= np.mean(list(rates.values())) <= summary.ci95[1]
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize("bad", [[], [{"tag": "colors", "prompt": "p"}], rows(("colors", "p", 0.5))])
def test_summary_refuses(bad):
    with pytest.raises(ValueError, match="result"):
        summarize(bad)


# ------------------------------------------------------------------------------------------- intervals


def test_wilson():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775328, abs=1e-6))
    assert wilson(10, 10) == (pytest.approx(0.7224672, abs=1e-6), 1.0)
    assert wilson(0, 0) == (0.0, 1.0)
    for k, n in [(-1, 3), (4, 3), (1, 0)]:
        with pytest.raises(ValueError, match="between"):
            wilson(k, n)


def test_wilson_ends_solve_its_equation():
    for k, n in [(3, 7), (40, 553), (552, 553)]:
        for p in wilson(k, n):
            assert abs(k / n - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / n))


def test_paired_difference_equals_the_full_enumeration():
    a, b = np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0, 0.0])
    every_resample = [np.mean((a - b)[list(index)]) for index in product(range(4), repeat=4)]
    mean, low, high = paired_difference(a, b, rng=np.random.default_rng(0), num_resamples=20_000)
    assert mean == 0.5
    assert (low, high) == tuple(np.quantile(every_resample, [0.025, 0.975]))


def test_paired_difference_spans_95_percent_of_many_items():
    difference = np.random.default_rng(0).normal(size=2000)
    mean, low, high = paired_difference(difference, np.zeros(2000), rng=np.random.default_rng(1))
    half_width = 1.96 * difference.std() / math.sqrt(2000)
    assert (low, high) == pytest.approx((mean - half_width, mean + half_width), abs=0.05 * half_width)


def test_paired_difference_is_paired_and_seeded():
    rng = np.random.default_rng(0)
    a = rng.normal(size=500) * 10
    b = a - 0.5 + 0.1 * rng.normal(size=500)  # the items vary far more than the difference does
    mean, low, high = paired_difference(a, b, rng=np.random.default_rng(1), num_resamples=3000)
    assert low < mean < high and high - low < 0.03 and low < 0.5 < high
    assert paired_difference(a, b, rng=np.random.default_rng(1), num_resamples=3000) == (mean, low, high)
    assert paired_difference(a, b, rng=np.random.default_rng(2), num_resamples=3000)[1:] != (low, high)
    assert paired_difference(b, a, rng=np.random.default_rng(1), num_resamples=3000)[0] == pytest.approx(-mean)


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1, 0], [1]), ([[1]], [[1]]), ([math.nan], [1]), ([math.inf], [math.inf])]
)
def test_paired_difference_refuses(a, b):
    with pytest.raises(ValueError):
        paired_difference(a, b, rng=np.random.default_rng(0))
