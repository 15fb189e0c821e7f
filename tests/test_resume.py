"""A run that is killed between two checkpoints and resumed equals one that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from openunirl.models.tiny import build
from openunirl.tasks import shapes

FLAGS = [
    "--train.max-steps",
    "6",
    "--train.save-steps",
    "2",
    "--train.eval-steps",
    "3",
    "--eval.num-prompts",
    "6",
    "--eval.num-references",
    "6",
    "--eval.during-prompts",
    "6",
    "--eval.sampling.num-timesteps",
    "2",
    "--rollout.num-prompts",
    "2",
    "--rollout.num-generations",
    "3",
    "--rollout.num-questions",
    "2",
    "--rollout.sampling.num-timesteps",
    "3",
    "--rollout.max-new-tokens",
    "3",
    "--reward.kind",
    "probability",
    "--loss.beta",
    "0.1",
    "--optim.lr",
    "1e-3",
    "--train.report-to",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    build("tiny-showo", shapes.vocabulary(), seed=9).save(folder)
    return folder


def command(weights, out, *more):
    line = [sys.executable, "-m", "openunirl.cli", "train", "tiny-showo-grpo", "--model.weights", str(weights)]
    return [*line, "--output-dir", str(out), *FLAGS, *more]


def environment():
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_timings(row):
    return {k: v for k, v in row.items() if k != "seconds"}


END_TO_END = ["--loss.end-to-end", "--loss.relaxation.tau", "2.0", "--loss.relaxation.final-tau", "0.5"]


SYNCED = ["--loss.ref-model-sync-steps", "2", "--train.wise-ft-alpha", "0.5", "--train.swa-steps", "5"]


@pytest.mark.parametrize(
    "more", [[], END_TO_END + SYNCED], ids=["plain", "end to end, tau falls, the base follows, a mean and a blend"]
)
def test_killed_and_resumed_equals_uninterrupted(weights, tmp_path, more):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        command(weights, whole, *more), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

    process = subprocess.Popen(command(weights, killed, *more), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (killed / "metrics.jsonl").exists() and any(row["step"] == 3 for row in rows(killed)):
            break  # step 2 is saved, step 4 is not
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = sorted(p.name for p in (killed / "checkpoints").iterdir() if not p.name.endswith(".partial"))
    assert saved and "step-000006" not in saved, "the run was over before it could be killed"

    again = subprocess.run(
        command(weights, killed, "--resume", *more), env=environment(), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    want, got = (load_file(run / "checkpoints" / "step-000006" / "model.safetensors") for run in (whole, killed))
    base = load_file(weights / "model.safetensors")
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert any(not torch.equal(want[name], base[name]) for name in want)
    synced = whole / "checkpoints" / "step-000006" / "reference" / "model.safetensors"  # step 6 has just been synced
    assert synced.exists() == bool(more)
    assert not synced.exists() or all(torch.equal(want[name], load_file(synced)[name]) for name in want)
    assert [without_timings(r) for r in rows(whole)] == [without_timings(r) for r in rows(killed)]
    for name in ("before", "after", "step-000003"):
        assert (whole / "evaluation" / f"{name}.json").read_text() == (
            killed / "evaluation" / f"{name}.json"
        ).read_text()


def test_a_run_directory_is_never_overwritten(weights, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    done = subprocess.run(
        command(weights, tmp_path / "run"), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "--resume" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_resuming_nothing_says_so(weights, tmp_path):
    done = subprocess.run(
        command(weights, tmp_path / "none", "--resume"), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "no run directory" in done.stderr
