"""`openunirl evaluate MODEL`: which world and settings a MODEL is evaluated with, and what is refused before it is."""

import dataclasses
import json

import pytest
import torch

from openunirl.cli import main
from openunirl.config import EvalConfig, ModelConfig, to_dict
from openunirl.evaluation.of_model import known_evaluation
from openunirl.models.showo import Showo
from openunirl.presets import PRESETS
from openunirl.presets_real import PUBLISHED
from openunirl.tasks.records import read_jsonl
from openunirl.types import ImageSampling
from picture_folders import draw


@pytest.fixture
def called(monkeypatch):
    """What reaches the two evaluations: name -> (positional, named)."""
    calls = {}

    def note(name):
        return lambda *args, **named: calls.update({name: (args, named)})

    monkeypatch.setattr("openunirl.evaluation.photos.evaluate_photos", note("geneval"))
    monkeypatch.setattr("openunirl.evaluation.run_command.evaluate_command", note("shapes"))
    return calls


@pytest.fixture
def run(tmp_path):
    """A function that makes a run directory with one checkpoint, and returns the checkpoint."""

    def make(preset, **changes):
        place = tmp_path / "run" / "checkpoints" / "step-000100"
        place.mkdir(parents=True)
        config = dataclasses.replace(PRESETS[preset], **changes)
        (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(config) | {"command": "x", "commit": "y"}))
        return place

    return make


def refused(capsys, *argv, code=2):
    capsys.readouterr()
    assert main(["evaluate", *map(str, argv)]) == code
    return capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------- world and settings


def test_a_model_that_tells_nothing_is_not_evaluated(called, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for weights in ("some/model", tmp_path / "model"):
        told = refused(capsys, weights)
        assert "--settings NAME" in told and "showo-512" in told and "--world shapes" in told
        told = refused(capsys, weights, "--detector-weights", "x")
        assert "--settings NAME" in told
        told = refused(capsys, weights, "--world", "geneval")
        assert "--settings NAME" in told and "--sampling.guidance-scale" in told and "--max-new-tokens" in told
    assert not called
    flags = ["--sampling.guidance-scale", "5", "--sampling.num-timesteps", "9", "--max-new-tokens", "50"]
    assert main(["evaluate", "some/model", "--world", "geneval", *flags]) == 0
    assert called["geneval"][0][1].sampling == ImageSampling(guidance_scale=5.0, num_timesteps=9)
    assert main(["evaluate", "some/model", "--world", "shapes"]) == 0 and "shapes" in called


def test_a_hub_id_is_the_published_model(called):
    for name, known in PUBLISHED.items():
        assert main(["evaluate", known.model.weights]) == 0
        (model, config), _ = called.pop("geneval")
        assert model == known.model and config == known.evaluation, name


def test_a_checkpoint_is_evaluated_as_its_run_evaluates(called, run):
    preset = PRESETS["showo-512-grpo"]
    place = run("showo-512-grpo", eval=dataclasses.replace(preset.eval, max_new_tokens=70))
    assert main(["evaluate", str(place), "--references", "x"]) == 0
    (model, config), rest = called["geneval"]
    assert model == ModelConfig(weights=str(place)) and rest["references"].name == "x"
    assert config.sampling == PUBLISHED["showo-512"].sampling and config.max_new_tokens == 70
    assert (config.num_prompts, config.num_images) == (553, 4)
    assert main(["evaluate", str(place), "--settings", "showo-256", "--max-new-tokens", "9"]) == 0
    (model, config), _ = called["geneval"]
    assert config.sampling == PUBLISHED["showo-256"].sampling and config.max_new_tokens == 9


def test_a_checkpoint_of_the_shapes_world(called, run):
    sampling = ImageSampling(num_timesteps=7, guidance_scale=2.0)
    place = run("tiny-showo-grpo", eval=EvalConfig(sampling=sampling, num_prompts=24))
    assert main(["evaluate", str(place)]) == 0
    assert called["shapes"][0][1] == EvalConfig(sampling=sampling) and called["shapes"][1]["world"] == "shapes"


def test_a_damaged_run_is_named(run, capsys):
    place = run("tiny-showo-grpo")
    for content in ("{", '{"model": {"weights": "x"}, "lss": 1}'):
        (place.parent.parent / "config.json").write_text(content)
        assert str(place.parent.parent / "config.json") in refused(capsys, place, code=1)


def test_tiny_models(tmp_path):
    shape = known_evaluation("tiny-showo")
    assert shape is not None and shape.world == "shapes" and shape.eval == EvalConfig()
    (tmp_path / "tiny").mkdir()
    assert known_evaluation(str(tmp_path / "tiny")) is None
    (tmp_path / "tiny" / "pretrain.json").write_text("{}")
    assert known_evaluation(str(tmp_path / "tiny")) == shape


# ------------------------------------------------------------------------------------------- flags, other folders


def test_flags_of_the_other_world(called, capsys):
    for flag in ("detector-weights", "color-weights", "references", "prompt-file", "llm-judge", "llm-cache"):
        assert f"--{flag} belongs to --world geneval" in refused(capsys, "tiny-showo", f"--{flag}", "x")
    for flag, value in (("split", "validation"), ("num-references", 9)):
        assert f"--{flag} belongs to --world shapes" in refused(capsys, "showo-512", f"--{flag}", value)
    assert "--during-prompts is of a training run" in refused(capsys, "tiny-showo", "--during-prompts", 4)
    assert not called


def test_pictures_and_runs_are_no_models(run, tmp_path, capsys):
    pictures = draw(tmp_path / "pictures")
    assert f"openunirl evaluate --images {pictures} --output-dir DIR" in refused(capsys, pictures)
    assert "holds pictures, not a model" in refused(capsys, pictures, "--settings", "showo-512")
    flat = pictures / "00000" / "samples"
    assert f"--images {flat}" in refused(capsys, flat)
    assert "did you mean openunirl evaluate --images DIR?" in refused(capsys, "--image", pictures)
    place = run("tiny-showo-grpo")
    assert f"run directory, not a model: give one of its checkpoints, such as {place}" in refused(
        capsys, place.parent.parent
    )


# --------------------------------------------------------------------------------------- what is never a score


def evaluate(out, *flags, code=0, weights="tiny-showo"):
    argv = ["evaluate", str(weights), "--num-prompts", "12", "--num-references", "12", "--output-dir", str(out)]
    assert main([*argv, "--sampling.num-timesteps", "6", *flags]) == code


def test_shapes_that_are_no_score(tmp_path, capsys, monkeypatch):
    def told(name):
        capsys.readouterr()
        evaluate(tmp_path / name, code=1)
        assert not (tmp_path / name / "evaluation.json").exists()
        assert len(read_jsonl(tmp_path / name / "evaluation" / "results.jsonl")) == 12
        return capsys.readouterr().err.splitlines()[-1]

    decode = Showo.decode
    monkeypatch.setattr(Showo, "decode", lambda self, images: decode(self, images) * 0 + 0.5)
    assert "all 12 pictures that the model drew are equal" in told("equal")
    monkeypatch.setattr(
        Showo,
        "decode",
        lambda self, images: decode(self, images) * 0 + torch.linspace(0.1, 0.9, 12)[:, None, None, None],
    )
    assert "no object was detected in any of the 12 pictures that the model drew" in told("blank")
    monkeypatch.setattr(Showo, "decode", lambda self, images: decode(self, images).roll(1, 0))
    monkeypatch.setattr("openunirl.evaluation.geneval._missing", lambda *_: "expected x>=1, found 0")
    assert "0 of 12 pictures are right although 11 of them show objects" in told("wrong")
    monkeypatch.undo()
    sample = Showo.sample_answers

    def mumbled(self, *args, **more):
        answers = sample(self, *args, **more)
        return dataclasses.replace(answers, texts=(" ",) * len(answers.texts))

    monkeypatch.setattr(Showo, "sample_answers", mumbled)
    words = told("mumbled")
    assert "none of the model's 12 answers on its own pictures can be judged" in words and "is ' '" in words


def test_a_sampling_that_the_model_cannot_follow_leaves_no_folder(tmp_path, capsys):
    evaluate(tmp_path / "out", "--sampling.top-k", "5", code=1)
    assert "--sampling: top_k=5 must be 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_shapes_summary_tells_what_is_unsettled(tmp_path, capsys, monkeypatch):
    """Of two processes, which the first one says do not share it."""
    monkeypatch.setattr("openunirl.distributed.Processes.count", 2)
    evaluate(tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = read_jsonl(tmp_path / "out" / "evaluation" / "references.jsonl")
    assert summary["unsettled"]["references"]["n"] == 12
    assert summary["unsettled"]["references"]["correct"] == sum(not row["settled"] for row in rows)
    printed = capsys.readouterr()
    assert "unsettled answers on reference pictures, counted as wrong: " in printed.out
    assert "only the first of 2 processes draws, reads and judges" in printed.err


def test_the_model_goes_to_the_device(tmp_path, monkeypatch):
    moved, to = [], Showo.to
    monkeypatch.setattr(Showo, "to", lambda self, device, *rest: moved.append(device) or to(self, device, *rest))
    evaluate(tmp_path / "out")
    assert moved == [torch.device("cpu")]
