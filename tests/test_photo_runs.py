"""`openunirl train` in the world of photographs: Mask2Former and CLIP as the run's evaluation and as its reward."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from openunirl.cli import main
from openunirl.config import META_DETECTOR, OPENAI_CLIP, ModelConfig, PhotosConfig, RewardConfig, RunConfig
from openunirl.evaluation.detectors import Mask2FormerDetector
from openunirl.evaluation.image_folder import digest
from openunirl.evaluation.no_score import no_drawing
from openunirl.looks import look_metrics
from openunirl.models.showo import Showo
from openunirl.run import Run
from openunirl.run_world import not_measured, open_world
from openunirl.tasks.geneval import GENEVAL_OBJECTS, TAGS
from openunirl.tasks.records import read_jsonl, write_jsonl
from openunirl.tasks.worlds import WORLDS
from photo_checkpoints import save_clip, save_mask2former

NAMES = ("handbag", "bench", "lion")  # what the random detector finds, what it does not, and what is none of COCO's
RECORDS = [
    {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
    for name in NAMES
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The detector, the colour classifier, three prompts, and references for the first two."""
    place, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    save_mask2former(place / "mask2former")
    save_clip(place / "clip")
    write_jsonl(place / "prompts.jsonl", RECORDS)
    for index, record in enumerate(RECORDS[:2]):
        (place / "references" / f"{index:05d}" / "samples").mkdir(parents=True)
        write_jsonl(place / "references" / f"{index:05d}" / "metadata.jsonl", [record])
        for sample in range(2):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((96, 64)).save(place / "references" / f"{index:05d}" / "samples" / f"{sample:04d}.png")
    return place


def train(parts, out, *flags, code=0):
    argv = ["train", "tiny-showo-grpo", "--world", "geneval", "--output-dir", out, "--train.max-steps", 2]
    argv += ["--rollout.num-prompts", 3, "--rollout.num-generations", 2, "--rollout.num-questions", 1]
    argv += ["--rollout.sampling.num-timesteps", 2, "--eval.sampling.num-timesteps", 2, "--rollout.max-new-tokens", 2]
    argv += ["--eval.max-new-tokens", 2, "--eval.num-prompts", 6, "--train.eval-steps", 2, "--eval.during-prompts", 6]
    argv += ["--prompt-file", parts / "prompts.jsonl", "--photos.detector-weights", parts / "mask2former"]
    argv += ["--photos.color-weights", parts / "clip", "--train.report-to", *flags]
    assert main([str(each) for each in argv]) == code


def summary(out, name):
    return json.loads((out / "evaluation" / f"{name}.json").read_text())


def test_the_detector_judges_before_during_and_after_and_rewards(parts, tmp_path, capsys):
    out = tmp_path / "run"
    train(parts, out, "--photos.references", parts / "references", "--reward.sources", "self", "detector")
    told = capsys.readouterr().err
    assert "knows the objects and colors of 4 of the run's 6 prompts" in told and "not scored" not in told
    for name in ("before", "step-000002", "after"):
        found = summary(out, name)
        assert found["label"] == f"GenEval protocol, weights {parts / 'mask2former'} and {parts / 'clip'}"
        assert found["geneval"]["n"] == 6 and sorted(found["geneval"]["tasks"]) == sorted(TAGS)
        assert found["understanding"]["n"] == 2 and set(found["detector"]) == {
            "detector_fingerprint",
            "color_fingerprint",
        }
    read = read_jsonl(out / "evaluation" / "after" / "references.jsonl")
    assert [row["expected"] for row in read] == ["handbag"] * 2 and {row["index"] for row in read} == {6}
    pictures = sorted((parts / "references" / "00000" / "samples").iterdir())
    assert [(row["sample"], row["digest"]) for row in read] == [
        (sample, digest(picture.read_bytes())) for sample, picture in enumerate(pictures)
    ]
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]
    assert [row["rewards/detector/mean"] for row in rows] == [0.5, 0.5]  # handbags, benches; lions count for nothing
    assert "rewarded by the detector" in (out / "report.html").read_text()
    looks = [row for row in read_jsonl(out / "metrics.jsonl") if "eval/geneval" in row]
    assert len(looks) == 1 and "eval/understanding" in looks[0]
    assert looks[0] == {"step": 2} | look_metrics(summary(out, "step-000002"))


def test_without_references_understanding_is_not_measured(parts, tmp_path, capsys):
    out = tmp_path / "run"
    train(parts, out, "--eval.num-prompts", 1, "--train.eval-steps", 0, "--train.max-steps", 1)
    assert "understanding is not measured in this run" in capsys.readouterr().err
    assert summary(out, "after")["understanding"]["n"] == 0 and (out / "report.html").exists()


@pytest.mark.parametrize("flags", [("--photos.detector-weights", "None"), ("--eval.num-prompts", 0)])
def test_without_a_detector_it_trains_on_the_self_reward(parts, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(Mask2FormerDetector, "__init__", None)  # it is not even loaded
    out = tmp_path / "run"
    train(parts, out, *flags, "--train.eval-steps", 0)
    why = "--photos.detector-weights is None" if "None" in flags else "--eval.num-prompts and --train.eval-steps are 0"
    assert f"what this run draws is not scored ({why})" in capsys.readouterr().err
    assert (out / "report.html").exists() and not (out / "evaluation").exists()


def test_a_detector_that_cannot_be_read_leaves_no_run_directory(parts, tmp_path, capsys):
    broken = shutil.copytree(parts / "mask2former", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"damaged")
    for flags, words in (
        (("--photos.detector-weights", tmp_path / "no"), f"{tmp_path / 'no'} cannot be read as AutoConfig"),
        (("--photos.detector-weights", broken), f"{broken} cannot be read as InstanceNet"),
        (("--photos.detector-weights", parts / "clip"), "is of the kind 'clip', not 'mask2former'"),
        (("--photos.color-weights", tmp_path / "no"), f"{tmp_path / 'no'} cannot be read as AutoConfig"),
        (("--photos.references", tmp_path / "no"), "there is no folder"),
        (("--photos.detector-weights", "None", "--reward.sources", "detector"), "the world GenEval has no detector"),
    ):
        train(parts, tmp_path / "run", *flags, code=1)
        (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openunirl: ")]
        assert words in told and "--photos.detector-weights" in told
        assert not (tmp_path / "run").exists()


def test_prompts_of_a_run_that_only_the_detector_rewards(parts):
    """They ask for nothing that it cannot find: the other prompts would be steps without a reward."""
    photos = PhotosConfig(detector_weights=str(parts / "mask2former"), color_weights=str(parts / "clip"))
    rewarded = RewardConfig(sources=("detector",))
    config = RunConfig(model=ModelConfig(weights="x"), world="geneval", photos=photos, reward=rewarded)
    world = open_world(config, torch.device("cpu"))
    prompts = world.training_prompts(50, 0)
    assert all(clause["class"] in GENEVAL_OBJECTS for prompt in prompts for clause in prompt.include)
    assert [sum(prompt.tag == tag for prompt in prompts) for tag in TAGS] == [0, 10, 10, 10, 10, 10]
    assert all("knows the objects" not in told for told in not_measured(config, world, prompts))
    lions = [prompt for prompt in WORLDS["geneval"]().training_prompts(600, 0) if prompt.include[0]["class"] == "lion"]
    with pytest.raises(ValueError, match="none of the"):
        not_measured(config, world, lions)


def test_a_base_s_evaluation_that_is_none():
    rows = [{"objects": 1}, {"objects": 0}]
    drawn = np.zeros((2, 4, 4, 3), np.uint8)

    def of(rows, pictures):
        return no_drawing(rows, pictures, "the base")

    assert "all 2 pictures that the base drew are equal" in (of(rows, drawn) or "")
    drawn[1] = 1
    assert of(rows, drawn) is None
    assert "no object was detected in any of the 2 pictures" in (of(rows[1:] * 2, drawn) or "")


def test_looks_that_are_none_are_told(parts, tmp_path, capsys, monkeypatch):
    """From step 1 on all pictures are equal: the console, the summaries and the report say so."""
    out, update = tmp_path / "run", Run.update

    def broken(self, *args, **more):
        decode = Showo.decode
        monkeypatch.setattr(
            Showo, "decode", lambda self, images: decode(self, images)[:1].expand(len(images), -1, -1, -1)
        )
        return update(self, *args, **more)

    monkeypatch.setattr(Run, "update", broken)
    train(parts, out)
    told = capsys.readouterr().err
    assert summary(out, "before")["warnings"] == []
    for name, shown in (("step-000002", "step 2"), ("after", "after")):
        (why,) = summary(out, name)["warnings"]
        assert "all 6 pictures that the model drew are equal" in why
        assert f"warning: evaluation {shown}: {why}" in told
        assert (
            f"evaluation/{name}.json: all 6 pictures that the model drew are equal" in (out / "report.html").read_text()
        )


def test_runs_tell_what_is_unsettled(parts, tmp_path, capsys):
    out = tmp_path / "run"
    train(parts, out, "--photos.references", parts / "references", "--train.eval-steps", 0)
    unsettled = summary(out, "after")["unsettled"]
    rows = read_jsonl(out / "evaluation" / "after" / "results.jsonl")
    assert unsettled["own"]["n"] == 6 and unsettled["references"]["n"] == 2
    assert unsettled["own"]["correct"] == sum(not row["settled"] for row in rows)
    words = f"unsettled answers on own pictures, counted as wrong: {unsettled['own']['correct']} of 6"
    assert words in capsys.readouterr().err and words in (out / "report.html").read_text()


def test_the_defaults_are_those_of_evaluate():
    assert (PhotosConfig().detector_weights, PhotosConfig().color_weights) == (META_DETECTOR, OPENAI_CLIP)
