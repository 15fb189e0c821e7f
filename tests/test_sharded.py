"""Two gloo processes, sharded (FSDP2) or with copies: the gradient of one process with the whole batch, and runs
that change their number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import openunirl
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from test_distributed import finished

ENV = {"PYTHONPATH": str(Path(openunirl.__file__).parents[1]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
WORKER = Path(__file__).with_name("sharded_worker.py")


CASES = [
    *("tiny-showo:sharded", "tiny-janus:sharded", "tiny-showo:adapters", "tiny-showo:unequal"),
    *("tiny-showo:recomputed", "tiny-janus:recomputed"),
    *("tiny-showo:copies", "tiny-janus:copies"),
]


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """Where all cases' updates by one process and by two were written: starting processes is what takes time."""
    folder = tmp_path_factory.mktemp("updates")
    for count in (1, 2):
        started = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(rank), str(count), f"{folder}/store{count}", str(folder), *CASES],
                env=os.environ | ENV, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(count)
        ]  # fmt: skip
        for process in started:
            told = process.communicate(timeout=480)[1]
            assert process.returncode == 0, told
    return folder


def test_processes_that_score_different_numbers_of_chunks_gather_equally_often(updates):
    """Or one of them would wait for the other for ever, and `updates` fail."""
    first, second = (torch.load(updates / f"tiny-showo-unequal-2-{rank}.pt")["chunks"] for rank in (0, 1))
    assert first != second and min(first, second) > 1


@pytest.mark.parametrize("case", CASES)
def test_two_shares_have_the_gradient_of_the_whole(updates, case):
    """Drawn and answered alike, too: groups stay together, prompts are split without overlap."""
    name = case.replace(":", "-")
    alone, first, second = (torch.load(updates / f"{name}-{part}.pt") for part in ("1-0", "2-0", "2-1"))
    assert torch.equal(alone["tokens"], torch.cat([first["tokens"], second["tokens"]]))
    assert alone["texts"] == first["texts"] + second["texts"]
    assert alone["grads"].keys() == first["grads"].keys()
    for name, grad in alone["grads"].items():
        assert torch.equal(first["grads"][name], second["grads"][name])
        assert (first["grads"][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name
    assert alone["blended"].keys() == first["blended"].keys()
    assert all(torch.equal(first["blended"][name], weight) for name, weight in alone["blended"].items())


@pytest.mark.parametrize(
    "begin, go_on, more",
    [(2, 1, ()), (2, 1, ("--lora.rank", "2", "--train.swa-steps", "1")), (1, 2, ("--train.swa-steps", "1"))],
)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, begin, go_on, more):
    """One step sharded over two processes and one on one, or one step on one process and one on two with copies, is
    what two steps on one process are."""
    weights = tmp_path / "model"
    build("tiny-showo", shapes.vocabulary(), seed=9).save(weights)
    common = ("--loss.no-end-to-end", "--optim.decay", "0", *more)

    def run(name, count, *flags):
        share = ("--rollout.num-prompts", str(2 // count), *common, *flags)
        for status, told in finished(tmp_path, weights, tmp_path / name, count, *share):
            assert status == 0, told

    run("whole", 1)
    shard = ("--train.shard",) if begin == 2 else ()
    run("parts", begin, *shard, "--train.max-steps", "1")
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["train"]["shard"] == bool(shard)
    run("parts", go_on, "--resume", "--train.no-shard")
    base = load_file(weights / "model.safetensors")
    states = [load_file(tmp_path / run / "checkpoints/step-000002/model.safetensors") for run in ("whole", "parts")]
    assert states[0].keys() == states[1].keys() == base.keys()
    moved = max(float((states[0][name] - base[name]).abs().max()) for name in base)
    apart = max(float((states[0][name] - states[1][name]).abs().max()) for name in base)
    assert moved > 1e-5 and apart < 0.01 * moved
