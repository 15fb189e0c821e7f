"""What --resume accepts, again and again, and what it refuses."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from openunirl import checkpoint
from openunirl.cli import _program, main
from openunirl.models.tiny import build
from openunirl.optim import build_optimizer
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


@pytest.fixture
def copied(started, tmp_path):
    """The run of `started`, to be damaged."""
    return shutil.copytree(started, tmp_path / "copy")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--train.max-steps 1",
            "--train.max-steps is 1, and the run in {} has a checkpoint of step {step}: give",
        ),
        ("--seed 7", "--seed is 7, and the run in {} was started with 0: leave --seed out"),
        (
            "--rollout.num-prompts 2",
            "--rollout.num-prompts is 2 on 1 process, and the run in {} draws 1 prompts a step",
        ),
        ("--model.weights tiny-showo", "--model.weights is tiny-showo, and the run in {} was started with {weights}"),
        ("--model.max-text-len 15", "--model.max-text-len is 15, and the run in {} was started with None"),
        ("--world geneval", "--world is geneval, and the run in {} was started with shapes"),
        ("--prompt-file x.jsonl", "--prompt-file is x.jsonl, and the run in {} was started with None"),
        ("--eval.num-prompts 6", "--eval.num-prompts is 6, and the run in {} was started with 0"),
        ("--eval.split validation", "--eval.split is validation, and the run in {} was started with heldout"),
        (
            "--eval.sampling.temperature 0.5",
            "--eval.sampling.temperature is 0.5, and the run in {} was started with 1",
        ),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused(started, weights, capsys, flags, words):
    kept, step = (started / "config.json").read_text(), checkpoint.read_step(checkpoint.latest(started))
    assert resumed(started, *flags.split()) == 1
    told = capsys.readouterr().err
    assert words.format(started, weights=weights, step=step) in told and told.count("\n") == 1, told
    assert (started / "config.json").read_text() == kept


def test_what_may_change_may_change(copied):
    flags = "--train.max-steps 6 --optim.lr 1e-6 --loss.beta 0.5 --train.save-steps 2 --eval.batch-size 3"
    assert resumed(copied, *flags.split(), "--train.stall-steps", "0") == 0
    assert steps(copied)[-1] == 6


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("checkpoints/{}/state.json", b"{", "state.json is damaged ("),
        ("checkpoints/{}/state.json", b'{"step": "x"}', "state.json is damaged (its step is 'x')"),
        ("checkpoints/{}/state.json", b'{"step": 2, "wise_ft_alpha": []}', "is damaged (its wise_ft_alpha is [])"),
        ("checkpoints/{}/state.json", b"[]", "it holds a list, not an object"),
        ("checkpoints/{}/optimizer.pt", b"PK", "optimizer.pt cannot be read as the state of this run's optimizer ("),
        ("checkpoints/{}/optimizer.pt", None, "optimizer.pt is missing"),
        ("checkpoints/{}/model.safetensors", b"12", "model.safetensors cannot be read as weights"),
        ("evaluation/before.json", b"{", "before.json is damaged ("),
    ],
)
def test_damaged_files_of_a_run_are_named_with_the_fix(copied, capsys, file, content, words):
    step = checkpoint.latest(copied)
    path = copied / file.format(step.name)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    config = json.loads((copied / "config.json").read_text())
    config["eval"]["num_prompts"] = 6
    (copied / "config.json").write_text(json.dumps(config))
    assert resumed(copied) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    fix = "remove it, and --resume evaluates again" if "before" in file else f"remove {step}, and --resume goes on"
    assert words in told and fix in told, told


def test_moments_are_read_where_they_lie(started, monkeypatch):
    """Mapped: or each of eight processes on a machine would hold all of them at once."""
    file, asked, load = checkpoint.latest(started) / "optimizer.pt", [], torch.load
    monkeypatch.setattr(torch, "load", lambda *about, **how: (asked.append(how.get("mmap")), load(*about, **how))[1])
    state, kept = load(file, weights_only=True)["state"], file.read_bytes()
    sizes = [values["exp_avg"].shape for values in state.values()]
    optimizer = build_optimizer(nn.ParameterList(map(torch.zeros, sizes)), lr=1e-3, weight_decay=0.0)[0]
    checkpoint.load_optimizer(file.parent, optimizer)
    assert asked == [True]
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        optimizer.state[weight]["exp_avg"].add_(1)
    assert file.read_bytes() == kept  # what training makes of them stays in memory


def test_the_optimizer_of_another_network_is_refused(copied, capsys):
    file = checkpoint.latest(copied) / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, file)
    assert resumed(copied) == 1
    assert "moments of shape [3] for a weight of shape" in capsys.readouterr().err


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
