"""With which settings `generate` and `answer` use a MODEL, by where it comes from."""

import dataclasses
import json

import pytest

from openunirl.cli import main
from openunirl.config import to_dict
from openunirl.models.tiny import build
from openunirl.presets import PRESETS
from openunirl.tasks import shapes

CARD = "---\nbase_model: {}\ntags:\n- x\n---\n\n# A model\n"


@pytest.fixture
def used(monkeypatch):
    """A function that runs a command and returns (the model's weights, guidance or longest answer)."""
    calls = []
    monkeypatch.setattr("openunirl.generate.generate", lambda model, *_, **named: calls.append((model, named)))
    monkeypatch.setattr("openunirl.answer.answer", lambda model, *_, **named: calls.append((model, named)))

    def run(command, weights, *flags):
        more = (
            ["--prompts", "x", "--output-dir", "y"] if command == "generate" else ["--images", "z", "--questions", "q"]
        )
        assert main([command, str(weights), *more, *flags]) == 0
        model, named = calls.pop()
        sampling = named["sampling"]
        return model.weights, sampling.guidance_scale if command == "generate" else sampling.max_new_tokens

    return run


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run of janus-pro-1b-grpo that evaluates at guidance 4 and with 50 tokens."""
    place = tmp_path / "run" / "checkpoints" / "step-000100"
    place.mkdir(parents=True)
    config = PRESETS["janus-pro-1b-grpo"]
    config = dataclasses.replace(
        config,
        eval=dataclasses.replace(
            config.eval, max_new_tokens=50, sampling=dataclasses.replace(config.eval.sampling, guidance_scale=4.0)
        ),
    )
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(config) | {"command": "x", "commit": "y"}))
    return place


@pytest.mark.parametrize("hub_id", ["deepseek-ai/Janus-Pro-1B", "deepseek-community/Janus-Pro-1B"])
def test_both_hub_ids_of_a_published_model(used, capsys, hub_id):
    assert used("generate", hub_id) == (hub_id, 5.0)
    assert used("answer", hub_id) == (hub_id, 100)
    assert used("generate", hub_id, "--sampling.guidance-scale", "2") == (hub_id, 2.0)
    assert "warning" not in capsys.readouterr().err


def test_a_checkpoint_draws_and_answers_as_its_run_evaluates(used, checkpoint, capsys):
    assert used("generate", checkpoint) == (str(checkpoint), 4.0)
    assert used("answer", checkpoint) == (str(checkpoint), 50)
    assert used("generate", checkpoint, "--settings", "showo-512")[1] == 6.0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "guidance"),
    [
        (CARD.format("deepseek-ai/Janus-Pro-1B"), 5.0),
        (CARD.format("deepseek-community/Janus-Pro-7B"), 5.0),
        (CARD.format("someone/else"), None),
        (CARD.format("[deepseek-ai/Janus-Pro-1B, someone/else]"), None),
        ("---\nbase_model: [\n---\n", None),
        ("no card", None),
    ],
)
def test_a_converted_folder_is_used_as_the_base_model_of_its_card(used, tmp_path, capsys, card, guidance):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text(card)
    assert used("generate", tmp_path / "model")[1] == (guidance or 1.0)
    assert ("does not tell which settings" in capsys.readouterr().err) == (guidance is None)


def test_defaults_that_nothing_stands_behind_are_told(used, tmp_path, capsys):
    for command, flag in (("generate", "sampling.guidance-scale"), ("answer", "max-new-tokens")):
        used(command, "some/model")
        told = capsys.readouterr().err
        assert f"--{flag}" in told and "--settings NAME" in told and "janus-pro-1b" in told
        used(command, "some/model", f"--{flag}", "3")
        used(command, "some/model", "--settings", "janus-1.3b")
        used(command, "tiny-showo")
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["generate", "answer", "convert"])
def test_a_run_directory_is_no_model(command, checkpoint, capsys):
    argv = {"generate": ["--prompts", "x", "--output-dir", "y"], "answer": ["--images", "z"], "convert": ["y"]}
    layout = ["--layout", "hf"] if command == "convert" else []
    assert main([command, str(checkpoint.parent.parent), *argv[command], *layout]) == 2
    told = capsys.readouterr().err
    assert "is a run directory, not a model" in told and "step-000100" in told


def test_words_that_a_model_does_not_know_are_told(tmp_path, capsys):
    build("tiny-janus", shapes.vocabulary(), seed=0).save(tmp_path / "model")
    argv = ["generate", str(tmp_path / "model"), "--num-images", "1", "--output-dir"]
    assert main([*argv, str(tmp_path / "strange"), "--prompts", "a photo of a zebra"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "--prompts: the tokenizer of" in told and "does not know the words zebra, so" in told
    picture = str(tmp_path / "strange/00000/samples/0000.png")
    assert main(["answer", str(tmp_path / "model"), "--images", picture, "--questions", "is it a giraffe"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "--questions: the tokenizer of" in told and "giraffe, so that the model cannot tell them apart" in told
    assert main([*argv, str(tmp_path / "known"), "--prompts", "a photo of a red circle"]) == 0
    assert "does not know" not in capsys.readouterr().err
