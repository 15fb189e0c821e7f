"""Evaluation: the imbalance by hand, the summary, and the files on disk."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from openunirl.config import EvalConfig, ModelConfig
from openunirl.evaluation.files import write_evaluation
from openunirl.evaluation.imbalance import imbalance
from openunirl.evaluation.intervals import mean_interval, paired_shares, wilson
from openunirl.evaluation.run import evaluate, summarize_rows, to_pixels, to_uint8
from openunirl.evaluation.run_command import evaluate_command
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from openunirl.tasks.worlds import WORLDS
from openunirl.types import ImageSampling

SMALL = EvalConfig(num_prompts=12, num_references=12, sampling=ImageSampling(num_timesteps=2), batch_size=5)


def rows(pairs, tag="colors"):
    return [
        {"tag": tag, "prompt": f"p{i}", "index": i, "correct": c, "answer_correct": a} for i, (c, a) in enumerate(pairs)
    ]


def test_imbalance_by_hand():
    # own images: 3 right, of which 1 answered wrong; 2 wrong
    generated = rows([(True, True), (True, False), (True, True), (False, True), (False, False)])
    # references of the same prompts: read right on prompts 0, 3 and 4; drawn right only for prompt 0
    references = rows([(True, True), (True, False), (True, False), (True, True), (True, True)])
    got = imbalance(generated, references)
    assert got["answer_wrong_given_image_right"] == pytest.approx(1 / 3)
    assert got["image_wrong_given_answer_right"] == pytest.approx(2 / 3)
    assert got["score"] == pytest.approx(1 / 2)
    half = math.hypot(1 / 3 - wilson(1, 3)[0], 2 / 3 - wilson(2, 3)[0]) / 2  # the rates' intervals mirror each other
    assert got["score_interval"] == {"n": [3, 3], "ci95": pytest.approx([0.5 - half, 0.5 + half])}
    assert got["own_images"] == {
        "image_right_answer_right": 2,
        "image_right_answer_wrong": 1,
        "image_wrong_answer_right": 1,
        "image_wrong_answer_wrong": 1,
    }
    assert got["intervals"]["image_wrong_given_answer_right"]["n"] == 3


def test_imbalance_without_a_right_image_is_not_a_number():
    got = imbalance(rows([(False, True)]), rows([(True, True)]))
    assert got["answer_wrong_given_image_right"] is None
    assert got["score"] is got["score_interval"] is None


def test_the_gap_is_paired():
    summary = summarize_rows(
        rows([(True, True), (False, True), (False, True), (False, False)]), rows([(1, True)] * 4), "x"
    )
    assert summary["self_reward"] == 0.75 and summary["collusion_gap"] == pytest.approx(0.5)
    low, high = summary["collusion_gap_interval"]["ci95"]
    assert (0.5, low, high) == paired_shares(1, 2, 0, 1)


def test_paired_shares():
    assert paired_shares(20, 12, 2, 16) == pytest.approx((0.2, 0.0562, 0.3292), abs=1e-4)  # by hand, Newcombe's 10
    assert paired_shares(2, 0, 0, 48)[1] < 0 < paired_shares(2, 0, 0, 48)[2]  # verdicts that never differ prove little
    difference, low, high = paired_shares(5, 9, 1, 3)
    assert paired_shares(5, 1, 9, 3) == pytest.approx((-difference, -high, -low))
    assert paired_shares(0, 0, 0, 0) == (0.0, -1.0, 1.0)
    with pytest.raises(ValueError, match="-1"):
        paired_shares(1, -1, 0, 0)


def test_a_mean_of_one_share_is_that_share():
    assert mean_interval([(0.8, 0.49, 0.94)]) == pytest.approx((0.49, 0.94))
    assert mean_interval([(0.5, 0.2, 0.9)] * 4) == pytest.approx((0.35, 0.7))  # a quarter of the variance
    with pytest.raises(ValueError, match="no shares"):
        mean_interval([])


def test_distinct_prompts_are_counted_per_task():
    summary = summarize_rows(rows([(True, True)] * 4), rows([(1, True)] * 4), "x")
    assert summary["geneval"]["tasks"]["colors"]["distinct_prompts"] == 4


@pytest.fixture(scope="module")
def model():
    return build("tiny-showo", shapes.vocabulary(), seed=2)


def test_evaluation_does_not_depend_on_its_batches(model):
    world = WORLDS["shapes"]()
    prompts = world.evaluation_prompts("heldout", 12, 0)
    first = evaluate(model, world, prompts, SMALL, seed=3)
    second = evaluate(model, world, prompts, EvalConfig(sampling=SMALL.sampling, batch_size=12), seed=3)
    # tokens are equal; the decoder's convolutions may round differently in another batch: one grey level
    assert np.abs(first.pictures.astype(int) - second.pictures.astype(int)).max() <= 1
    assert first.generated == second.generated and first.references == second.references


def test_files_are_genevals_layout(model, tmp_path):
    world = WORLDS["shapes"]()
    prompts = world.evaluation_prompts("heldout", 6, 0)
    result = evaluate(model, world, prompts, SMALL, seed=3, about={"split": "heldout"})
    write_evaluation(tmp_path, "after", result, prompts)
    assert json.loads((tmp_path / "after.json").read_text())["split"] == "heldout"
    for index, prompt in enumerate(prompts):
        metadata = json.loads((tmp_path / "after" / f"{index:05d}" / "metadata.jsonl").read_text())
        assert metadata == prompt.metadata()
        picture = np.asarray(Image.open(tmp_path / "after" / f"{index:05d}" / "samples" / "0000.png"))
        assert np.array_equal(picture, result.pictures[index])
    told = [json.loads(line) for line in (tmp_path / "after" / "results.jsonl").read_text().splitlines()]
    assert [row["filename"] for row in told] == [f"{i:05d}/samples/0000.png" for i in range(6)]
    assert [json.loads(row["metadata"]) for row in told] == [prompt.metadata() for prompt in prompts]
    assert [sum(map(len, json.loads(row["details"]).values())) for row in told] == [row["objects"] for row in told]


def test_evaluate_never_writes_into_what_exists(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "before.json").write_text("{}")
    with pytest.raises(ValueError, match="not empty"):
        evaluate_command(ModelConfig(weights="tiny-showo"), SMALL, world="shapes", seed=0, output_dir=tmp_path)
    assert (tmp_path / "evaluation" / "before.json").read_text() == "{}"


def test_pictures_survive_the_way_there_and_back():
    pictures = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert np.array_equal(to_uint8(to_pixels(pictures)), pictures)
