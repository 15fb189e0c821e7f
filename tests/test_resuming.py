"""What --resume accepts, again and again, and what it refuses."""

import json
import shlex
import subprocess
import sys

import pytest

from openunirl import checkpoint
from openunirl.cli import _program, main
from openunirl.models.tiny import build
from openunirl.tasks import shapes

FLAGS = [
    "--train.mixed-precision",
    "no",
    "--train.save-steps",
    "1",
    "--eval.num-prompts",
    "0",
    "--rollout.num-prompts",
    "1",
    "--rollout.num-generations",
    "2",
    "--rollout.num-questions",
    "1",
    "--rollout.sampling.num-timesteps",
    "2",
    "--rollout.max-new-tokens",
    "2",
    "--train.report-to",
]


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


def test_what_ends_early_names_the_command_that_continues_it(started, tmp_path, capsys, monkeypatch):
    def stop(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr("openunirl.run.Run.save_if_due", stop)
    folder = tmp_path / "my runs"  # dated ones, as `make demo` makes them, are as hard to guess
    argv = ["train", "--config", str(started / "config.json"), "--output-dir", str(folder), "--seed", "3"]
    assert main(argv) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    words = shlex.split(told.removeprefix("openunirl: interrupted; continue with: "))
    assert words[:3] == [sys.executable, "-m", "openunirl.cli"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "config.json").read_text())["seed"] == 3 and steps(folder)[-1] >= 2


def test_the_command_is_called_as_it_was(monkeypatch, tmp_path):
    own = tmp_path / "bin" / "openunirl"
    own.parent.mkdir()
    own.touch(mode=0o755)
    monkeypatch.setattr("sys.argv", [str(own)])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _program() == [str(own)]  # as `make demo` calls it: the environment is not activated
    monkeypatch.setenv("PATH", str(own.parent))
    assert _program() == ["openunirl"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _program() == ["accelerate", "launch", "-m", "openunirl.cli"]
