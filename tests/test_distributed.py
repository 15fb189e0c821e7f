"""Several processes: what one would do, on both families, and an end for all where one fails."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor import DTensor

import openunirl
from openunirl.checkpoint import REPLAY
from openunirl.config import LossConfig, RolloutConfig
from openunirl.distributed import Processes
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals
from openunirl.models import sharded
from openunirl.models.tiny import build
from openunirl.objectives import Terms, loss_parts
from openunirl.presets import bundled
from openunirl.rollout import roll_out
from openunirl.tasks import shapes
from openunirl.types import ImageSampling

FAMILIES = ["tiny-showo", "tiny-janus"]
LAUNCH = Path(__file__).parents[1] / "examples" / "accelerate"
ROLLOUT = RolloutConfig(
    num_prompts=1, num_generations=2, sampling=ImageSampling(num_timesteps=2, guidance_scale=2.0), max_new_tokens=2
)


@pytest.fixture
def gloo(tmp_path):
    """A process group of one."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def gradients(model, config):
    """Of one update in two parts, one backward pass for each forward."""
    rollout = roll_out(model, shapes.prompts("train", 1, 0), ROLLOUT, seed=1, step=1)
    ups = torch.tensor([1.0, -1.0])
    experience = gather_experience(model, rollout, ups, ups, config, temperature=1.0)
    totals = Totals(samples=2, tokens=4, max_length=2)
    terms = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    with Processes.averaging(model.net):
        for part in loss_parts(model, experience, parts=2, terms=terms):
            part.backward()
    return [parameter.grad for parameter in model.net.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end_to_end", [False, True])
def test_averaged_over_processes_gradients_are_the_same(family, end_to_end, gloo, monkeypatch):
    """No part reaches all of the network, and an update has many parts; in groups, and one by one."""
    model = build(family, shapes.vocabulary(), seed=5)
    model.freeze_reference()
    config = LossConfig(end_to_end=end_to_end, beta=0.1, num_scored_steps=0)
    alone = gradients(model, config)
    model.net.zero_grad()
    exchanged, plain = [], distributed.all_reduce
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: (exchanged.append(len(tensor)), plain(tensor))[1])
    for at_once in (2**30, 1):
        monkeypatch.setattr("openunirl.distributed.AT_ONCE", at_once)
        exchanged.clear()
        together = gradients(model, config)
        sizes = [grad.numel() for grad in together if grad is not None]
        assert exchanged[1:] == ([sum(sizes)] if at_once > 1 else sizes)
        assert any(grad is not None and grad.abs().sum() > 0 for grad in together)
        for a, b in zip(alone, together, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        model.net.zero_grad()


def test_nothing_is_wrapped_in_buckets(monkeypatch):
    """DDP's are as large as all gradients, and here they would never be used."""
    model, modes = build("tiny-showo", shapes.vocabulary(), seed=5), []
    model.freeze_reference()
    monkeypatch.setattr(Accelerator, "prepare_model", lambda self, net, **how: modes.append(how) or net)
    with Processes.rehearsing("no") as processes:
        processes.prepare(model, lambda net: torch.optim.AdamW(net.parameters()))
    assert modes == [{"evaluation_mode": True}] * 2


class Elsewhere(Processes):
    """Shards over the CPUs of a process group, with a device on which no weight of the network may ever lie."""

    device = torch.device("meta")

    def __init__(self, mixed_precision, **more):
        super().__init__(mixed_precision, **more)
        self.shards = True


def test_a_sharded_network_is_never_whole_on_a_device(gloo):
    model = build("tiny-showo", shapes.vocabulary(), seed=5)
    model.freeze_reference()
    want = {name: weight.clone() for name, weight in model.net.named_parameters()}
    with Elsewhere.rehearsing("no") as processes:
        processes.prepare(model, lambda net: torch.optim.AdamW(net.parameters()))
    for net in (model.net, model.reference_net):
        for name, weight in net.named_parameters():
            assert torch.equal(weight.full_tensor(), want[name])
    assert {weight.device.type for weight in model.image_tokenizer.parameters()} == {"meta"}


@pytest.mark.parametrize("main", [True, False])
def test_moments_are_gathered_one_at_a_time_and_kept_by_the_main_process_alone(gloo, monkeypatch, main):
    model = build("tiny-showo", shapes.vocabulary(), seed=5)
    model.freeze_reference()
    events, whole, cpu = [], sharded.whole, torch.Tensor.cpu
    monkeypatch.setattr(sharded, "whole", lambda tensor: (events.append("gathered"), whole(tensor))[1])
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (events.append("moved"), cpu(tensor))[1])
    monkeypatch.setattr(Elsewhere, "is_main", main)
    with Elsewhere.rehearsing("no") as processes:
        optimizer = processes.prepare(model, lambda net: torch.optim.AdamW(net.parameters()))
        for weight in model.net.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        moments = 3 * len(list(model.net.parameters()))
        held = processes.optimizer_state(optimizer)["state"]
    assert events == (["gathered", "moved"] if main else ["gathered"]) * moments
    kept = [value for values in held.values() for value in values.values()]
    assert len(kept) == (moments if main else 0) and not any(isinstance(value, DTensor) for value in kept)


# ------------------------------------------------------------------------------------------------ two processes

FLAGS = [
    "--train.max-steps",
    "2",
    "--eval.num-prompts",
    "0",
    "--rollout.num-generations",
    "2",
    "--rollout.num-questions",
    "1",
    "--rollout.sampling.num-timesteps",
    "2",
    "--rollout.max-new-tokens",
    "2",
    "--reward.kind",
    "probability",
    "--loss.beta",
    "0.1",
    "--loss.end-to-end",
    "--optim.lr",
    "1e-3",
    "--optim.adam-epsilon",
    "1e-3",
    "--optim.gradient-accumulation-steps",
    "2",
    "--train.mixed-precision",
    "no",
    "--train.eval-steps",
    "0",
    "--train.report-to",
]

MINE = """
import os

def fails_on_the_second(prompts, **_):
    if os.environ.get("RANK") == "1":
        raise RuntimeError("no judge here")
    return [1.0] * len(prompts)
"""


def finished(folder, weights, out, count, *more):
    """(exit status, stderr) of each of `count` processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = [sys.executable, "-m", "openunirl.cli", "train", "tiny-showo-grpo", "--model.weights", str(weights)]
    started = []
    for rank in range(count):
        more_env = {
            "PYTHONPATH": str(Path(openunirl.__file__).parents[1]),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        if count > 1:
            more_env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": port}
            more_env |= {"MASTER_ADDR": "127.0.0.1"}
        started.append(
            subprocess.Popen(
                [*start, "--output-dir", str(out), *FLAGS[:-1], *more, FLAGS[-1]],
                env=os.environ | more_env,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        return [(process.wait(timeout=240), process.stderr.read()) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("more", [(), ("--loss.loss-type", "dapo", "--loss.scale-rewards", "batch")])
def test_two_processes_train_as_one_does(tmp_path, more):
    weights = bundled("tiny-janus")  # its rewards differ; a fresh model's by so little that rounding decides
    for name, count in (("one", 1), ("two", 2)):
        share = ("--rollout.num-prompts", str(2 // count))
        for status, told in finished(tmp_path, weights, tmp_path / name, count, *share, *more):
            assert status == 0, told
    base = load_file(f"{weights}/model.safetensors")
    one, two = (load_file(tmp_path / name / "checkpoints/step-000002/model.safetensors") for name in ("one", "two"))
    moved = max(float((one[name] - base[name]).abs().max()) for name in base)
    apart = max(float((one[name] - two[name]).abs().max()) for name in base)
    assert moved > 1e-5 and apart < 0.01 * moved
    told = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for alone, together in zip(*told, strict=True):
        assert alone.keys() == together.keys()
        for name in alone.keys() - {"seconds"}:
            # signed advantages cancel in the loss: it is near 0 and its rounding is theirs
            least = 1e-6 * alone["advantage_abs"] if name == "loss" else 1e-7
            assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=least, nan_ok=True), name


def test_what_two_processes_held_one_goes_on_with(tmp_path):
    """Replayed images: each process learns from its own, a checkpoint keeps all of them."""
    (tmp_path / "mine.py").write_text("def right(prompts, **_):\n    return [1.0] * len(prompts)\n")
    sft = ["--loss.method", "sft", "--loss.no-end-to-end", "--loss.answer-coef", "0", "--loss.beta", "0"]
    sft += ["--loss.replay-steps", "2", "--reward.sources", "mine:right", "--reward.kind", "answer"]
    sft += ["--train.save-steps", "1", "--train.max-steps", "3"]
    weights, run = bundled("tiny-showo"), tmp_path / "run"
    for status, told in finished(tmp_path, weights, run, 2, *sft, "--rollout.num-prompts", "1"):
        assert status == 0, told
    last = run / "checkpoints" / "step-000003"
    both = load_file(last / REPLAY)
    assert sorted(zip(both["step_R"].tolist(), both["prompt_R"].tolist(), strict=True)) == [
        (step, 2 * (step - 1) + place) for step in (2, 3) for place in (0, 0, 1, 1)
    ]
    shutil.rmtree(last)
    for status, told in finished(tmp_path, weights, run, 1, *sft, "--rollout.num-prompts", "2", "--resume"):
        assert status == 0, told
    alone = load_file(last / REPLAY)
    assert {name: sorted(value.flatten().tolist()) for name, value in alone.items()} == {
        name: sorted(value.flatten().tolist()) for name, value in both.items()
    }


def test_a_process_that_kept_nothing_trains_with_one_that_did(tmp_path):
    code = "import os\n\ndef right(prompts, **_):\n    return [float(os.environ['RANK'] == '0')] * len(prompts)\n"
    (tmp_path / "mine.py").write_text(code)
    sft = ["--loss.method", "sft", "--loss.no-end-to-end", "--loss.answer-coef", "0", "--loss.beta", "0"]
    sft += ["--loss.replay-steps", "1", "--loss.num-iterations", "2", "--reward.sources", "mine:right"]
    sft += ["--reward.kind", "answer", "--rollout.num-prompts", "1"]
    for status, told in finished(tmp_path, bundled("tiny-showo"), tmp_path / "run", 2, *sft):
        assert status == 0, told
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["sft/kept_share"] for line in lines] == [0.5, 0.5] and all(line["grad_norm"] > 0 for line in lines)


def test_a_reward_that_fails_on_one_process_ends_all(tmp_path):
    weights = tmp_path / "model"
    build("tiny-showo", shapes.vocabulary(), seed=9).save(weights)
    (tmp_path / "mine.py").write_text(MINE)
    more = ("--rollout.num-prompts", "1", "--reward.sources", "self", "mine:fails_on_the_second")
    (first, waiting), (second, failing) = finished(tmp_path, weights, tmp_path / "run", 2, *more)
    assert first == second == 1, (waiting, failing)
    assert "step 1: another process failed" in " ".join(waiting.split())
    assert "raised RuntimeError: no judge here" in " ".join(failing.split())


LAUNCH_FILES = {"one-gpu": (1, "NO"), "eight-gpus": (8, "MULTI_GPU"), "two-nodes": (16, "MULTI_GPU")}


@pytest.mark.parametrize("name", sorted(LAUNCH_FILES.keys() | {path.stem for path in LAUNCH.glob("*.yaml")}))
def test_accelerate_reads_the_launch_files(name):
    """By its own reader, which refuses keys that it does not know."""
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.num_processes, DistributedType(config.distributed_type)) == LAUNCH_FILES[name]


def test_one_of_several_processes_ends_without_taking_python_apart():
    """What is freed later than main must not be freed at all, or gloo's threads may abort."""
    code = (
        "import atexit, sys; from openunirl import cli\n"
        "class Late:\n    def __del__(self): print('taken apart')\n"
        "late = Late(); atexit.register(print, 'told at exit'); sys.argv = ['openunirl', '--version']; cli.run()"
    )
    for size, taken_apart in (("1", True), ("2", False)):
        ended = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"WORLD_SIZE": size}, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith("openunirl ") and "told at exit" in ended.stdout
        assert ("taken apart" in ended.stdout) == taken_apart
