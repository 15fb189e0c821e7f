"""What --resume accepts, again and again, and what it refuses."""

import json

import pytest

from openunirl import checkpoint
from openunirl.cli import main
from openunirl.models.tiny import build
from openunirl.tasks import shapes

FLAGS = (
    "--train.save-steps 1 --eval.num-prompts 0 --rollout.num-prompts 1 --rollout.num-generations 2 "
    "--rollout.num-questions 1 --rollout.sampling.num-timesteps 2 --rollout.max-new-tokens 2 --train.report-to"
).split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    build("tiny-showo", shapes.vocabulary(), seed=9).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def started(weights, tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("started") / "run"
    argv = ["train", "tiny-showo-grpo", "--model.weights", weights, "--output-dir", str(folder), *FLAGS]
    assert main([*argv, "--train.max-steps", "2"]) == 0
    return folder


def resumed(folder, *more):
    return main(["train", "--output-dir", str(folder), "--resume", *more])


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_resumed_again_and_its_configuration_starts_another(started, tmp_path):
    assert resumed(started, "--train.max-steps", "3") == 0
    assert resumed(started, "--train.max-steps", "4") == 0
    assert steps(started) == [1, 2, 3, 4] and checkpoint.latest(started).name == "step-000004"
    told = json.loads((started / "config.json").read_text())
    assert [command.rsplit(" ", 1)[1] for command in told["resumed"]] == ["3", "4"]
    copy = ["train", "--config", str(started / "config.json"), "--output-dir", str(tmp_path / "other")]
    assert main([*copy, "--train.max-steps", "1"]) == 0
    assert "resumed" not in json.loads((tmp_path / "other" / "config.json").read_text())
