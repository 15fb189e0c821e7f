"""What `openunirl plan` predicts against what a training step takes: peak memory of a process above its baseline.

    python benchmarks/plan_check.py [--images 4] [--rows showo,grpo,plain ...] [--seed 0] [--short]

Random models of the middle size (midsize.py), one real step with two updates, each in a fresh process. Its baseline is
the resident memory after the same step of a tiny model, by which all code is loaded; its peak is the kernel's own mark
(VmHWM), set back once the model is there. malloc gives back what is freed at once (MALLOC_*), so that the allocator's
slack is small. Weights are not packed for the CPU (packed_linear.py), as they are not on a GPU; the prediction is
rehearsal.py's for a CPU. Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CLOSE = 0.15  # of what was measured
LEAN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
LEAN |= {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "MKL_DISABLE_FAST_MM": "1", "HF_HUB_OFFLINE": "1"}
ROWS = [
    (family, method, how)
    for family in ("showo", "janus")
    for method in ("grpo", "sft")
    for how in ("plain", "checkpointing", "lora", "lora+checkpointing")
] + [("showo", "grpo", "bf16"), ("janus", "grpo", "bf16")]


def config_of(method: Any, how: str, images: int):
    from openunirl.config import (
        EvalConfig,
        LoraConfig,
        LossConfig,
        ModelConfig,
        OptimConfig,
        RolloutConfig,
        RunConfig,
        TrainConfig,
    )  # fmt: skip
    from openunirl.types import ImageSampling

    grpo = method == "grpo"
    return RunConfig(
        model=ModelConfig(weights="midsize"),
        rollout=RolloutConfig(
            num_prompts=images // 2 if grpo else images,
            num_generations=2 if grpo else 1,
            num_questions=2,
            sampling=ImageSampling(guidance_scale=5.0, num_timesteps=4),
            answer_temperature=1.0 if grpo else 0.0,
        ),
        loss=LossConfig(
            method=method, end_to_end=not grpo, beta=0.02 if grpo else 0.0, num_scored_steps=2, num_iterations=2
        ),
        lora=LoraConfig(rank=16 if "lora" in how else 0),
        optim=OptimConfig(gradient_accumulation_steps=2),
        train=TrainConfig(
            max_steps=1,
            gradient_checkpointing="checkpointing" in how,
            mixed_precision="bf16" if how == "bf16" else "no",
            report_to=(),
        ),
        eval=EvalConfig(num_prompts=0),  # one step is measured, and no evaluation
    )


def predict(family: str, method: str, how: str, images: int, seed: int) -> int:
    """Bytes."""
    import torch

    import midsize
    from openunirl.phases import Rates
    from openunirl.rehearsal import rehearse

    def blank():
        with torch.device("meta"):
            return getattr(midsize, family)(seed=seed)

    found = rehearse(config_of(method, how, images), Rates(madds=1e11, bytes=1e10), blank=blank, fused=False)
    return found.peak


def measure(family: str, method: str, how: str, images: int, seed: int) -> int:
    """Bytes."""
    import midsize
    from openunirl.models import packed_linear
    from openunirl.models.tiny import build
    from openunirl.tasks import shapes

    packed_linear.SMALLEST = 2**62
    config = config_of(method, how, images)
    take_step(config, build(f"tiny-{family}", shapes.vocabulary(), seed=seed))
    gc.collect()
    before = memory("VmRSS")
    take_step(config, getattr(midsize, family)(seed=seed))
    return memory("VmHWM") - before


def take_step(config: Any, model: Any) -> None:
    """A step of a new run; the mark of the peak is set back once its model is there."""
    from openunirl.distributed import Processes
    from openunirl.optim import build_optimizer
    from openunirl.run import Run, set_up
    from openunirl.run_world import prompts_of_run
    from openunirl.tasks.worlds import WORLDS
    from openunirl.train import train_step

    world = WORLDS[config.world]()
    prompts = prompts_of_run(config, world, 1)
    processes = Processes(config.train.mixed_precision)
    set_up(model, config)
    optimizer = processes.prepare(model, lambda net: build_optimizer(net, lr=1e-5, weight_decay=0.0)[0])
    run = Run(
        config=config, folder=Path(), model=model, optimizer=optimizer, world=world, processes=processes,
        first_step=1, prompts=prompts,
    )  # fmt: skip
    Path("/proc/self/clear_refs").write_text("5")
    train_step(run, prompts, 1)


def memory(name: str) -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name))
    return int(line.split()[1]) * 1024


def child(job: str, *row: object) -> int:
    """What `job` says of a row, in a process of its own."""
    told = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps([job, *row])],
        env=os.environ | LEAN, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(told.stdout.splitlines()[-1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=4)
    options.add_argument("--rows", nargs="*", default=[",".join(row) for row in ROWS])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--short", action="store_true", help="one row of one family: a smoke test, not a claim")
    options.add_argument("--child")
    args = options.parse_args()
    if args.child:
        job, *row = json.loads(args.child)
        print({"predict": predict, "measure": measure}[job](*row))
        return
    from timing import header

    header(args.seed)
    print(f"{'model':<8} {'method':<7} {'how':<18} {'predicted':>10} {'measured':>10}  ratio")
    ratios = []
    for name in args.rows[:1] if args.short else args.rows:
        row = (*name.split(","), args.images, args.seed)
        predicted, measured = child("predict", *row), child("measure", *row)
        ratios.append(predicted / measured)
        family, method, how = row[:3]
        print(
            f"{family:<8} {method:<7} {how:<18} {predicted / 2**20:6,.0f} MiB {measured / 2**20:6,.0f} MiB  "
            f"{ratios[-1]:.2f}",
            flush=True,
        )
    worst = max(abs(ratio - 1) for ratio in ratios)
    print(f"furthest apart: {worst:.0%} of what was measured")
    assert worst <= CLOSE, f"a prediction is off by {worst:.0%}, at most {CLOSE:.0%} wanted"


if __name__ == "__main__":
    main()
