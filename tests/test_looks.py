"""Small evaluations during training: what they log, and when the collusion gap is said to have grown."""

import json
import math
from types import SimpleNamespace

import pytest

from openunirl.config import EvalConfig, TrainConfig
from openunirl.evaluation.run import summarize_rows
from openunirl.looks import collusion_warning, look_metrics
from openunirl.run import Run


def summary(fooled, n=48, read=1.0):
    """n pictures, half of them right and called right, and so many of the wrong ones called right, too."""
    generated = [
        {"tag": "colors", "prompt": f"p{i}", "index": i, "correct": i < n // 2, "answer_correct": i < n // 2 + fooled}
        for i in range(n)
    ]
    references = [row | {"answer_correct": row["index"] < read * n} for row in generated]
    return summarize_rows(generated, references, "oracle")


def test_what_a_look_logs_by_hand():
    assert look_metrics(summary(fooled=6, read=0.75)) == {
        "eval/geneval": 0.5,
        "eval/understanding": 0.75,
        "eval/self_reward": 0.625,
        "eval/collusion_gap": 0.125,
        "eval/imbalance": pytest.approx((0 + 12 / 36) / 2),
        "eval/answer_wrong_given_image_right": 0.0,
        "eval/image_wrong_given_answer_right": pytest.approx(12 / 36),
    }


def test_what_was_not_measured_is_not_logged():
    without = look_metrics(summary(fooled=6, read=0.0))
    assert "eval/image_wrong_given_answer_right" not in without and "eval/imbalance" not in without
    assert without["eval/answer_wrong_given_image_right"] == 0


def test_a_gap_that_clearly_grew_is_told():
    base, now = summary(fooled=24, n=240), summary(fooled=24)
    (_, high), (low, _) = (side["collusion_gap_interval"]["ci95"] for side in (base, now))
    least = 0.5 - 0.1 - math.hypot(0.5 - low, high - 0.1)
    told = collusion_warning(base, now)
    assert told and f"grew from +10.0 to +50.0 points, by {100 * least:.1f} at least" in told and least > 0.2


def test_a_gap_that_chance_explains_is_not_told():
    base = summary(fooled=24, n=240)
    assert collusion_warning(base, summary(fooled=8)) is None  # 10 -> 17 points
    assert collusion_warning(base, summary(fooled=0)) is None
    assert collusion_warning(None, summary(fooled=24)) is None


def test_a_run_tells_it_when_it_looks(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "before.json").write_text(json.dumps(summary(fooled=24, n=240)))
    now, logged, warned = summary(fooled=24), [], []
    run = SimpleNamespace(
        config=SimpleNamespace(train=TrainConfig(eval_steps=5), eval=EvalConfig(), seed=0),
        world=SimpleNamespace(judge=lambda: None, evaluation_prompts=lambda *_: []),
        folder=tmp_path,
        processes=SimpleNamespace(
            accelerator=SimpleNamespace(log=lambda values, step: logged.append((step, values))), is_main=True
        ),
        warn=warned.append,
        _evaluate=lambda *_, **__: SimpleNamespace(summary=now),
    )
    for step in range(1, 6):
        Run.evaluate_if_due(run, step)  # type: ignore[arg-type]
    assert logged == [(5, look_metrics(now))]
    assert warned == [f"step 5: {collusion_warning(summary(fooled=24, n=240), now)}"]
