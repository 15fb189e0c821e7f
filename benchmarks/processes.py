"""Rollouts on two processes against one: how much of a second processor arrives.

    python benchmarks/processes.py [--prompts 2] [--generations 2] [--timesteps 8] [--new-tokens 8] [--repeats 5]

Two workers of one thread each hold the same random model and roll out: images, then answers. By turns the first works
alone on its B images, then both work, each on B of its own. Twice the first time over the second is how many times one
process's images come in the same time, 2 at best; the goal is 1.8. Turns begin and end at a barrier, so that a turn of
two is as long as its slower worker. Draws are keyed by the prompt's number, so that both shares together must be what
one process with all the prompts draws (in batches of B); the script stops where they are not.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import midsize
from openunirl.config import RolloutConfig
from openunirl.rollout import Rollout, roll_out
from openunirl.tasks import shapes
from openunirl.types import ImageSampling
from timing import header, parser

COUNT, GOAL = 2, 1.8


class Worker:
    """One of the processes, and its share of the prompts."""

    def __init__(self, family: str, args: Namespace) -> None:
        self.rank, self.share, self.seed = args.rank, args.prompts, args.seed
        self.model: Any = getattr(midsize, family)(side=8 if args.short else 16, seed=args.seed)
        self.prompts = shapes.prompts("train", COUNT * args.prompts, args.seed)
        self.config = RolloutConfig(
            num_prompts=args.prompts,
            num_generations=args.generations,
            num_questions=1,
            sampling=ImageSampling(guidance_scale=5.0, num_timesteps=args.timesteps),
            max_new_tokens=args.new_tokens,
            batch_size=args.prompts * args.generations,
        )

    def draw(self, first: int, count: int) -> Rollout:
        prompts = self.prompts[first : first + count]
        return roll_out(self.model, prompts, self.config, seed=self.seed, step=1, first_prompt=first)

    def own(self) -> Rollout:
        return self.draw(self.rank * self.share, self.share)

    def turn(self, works: bool) -> float:
        """Wall seconds from barrier to barrier, in which this worker draws its share or waits."""
        distributed.barrier()
        start = time.perf_counter()
        if works:
            self.own()
        distributed.barrier()
        return time.perf_counter() - start

    def check(self) -> None:
        """On the first worker: both shares are what it draws alone."""
        own = self.own()
        shares: list[Any] = [None] * COUNT
        distributed.all_gather_object(shares, (own.images.tokens_BN, own.answers.texts))
        if self.rank:
            return
        whole = self.draw(0, COUNT * self.share)
        assert torch.equal(torch.cat([tokens_BN for tokens_BN, _ in shares]), whole.images.tokens_BN), "other images"
        pairs = list(zip([text for _, texts in shares for text in texts], whole.answers.texts, strict=True))
        same = sum(a == b for a, b in pairs)
        print(f"equal to one process: all {len(whole.images.tokens_BN)} images, {same} of {len(pairs)} answers")
        assert same == len(pairs), "other answers"


def work(args: Namespace) -> None:
    """All of one worker; the first prints."""
    torch.set_num_threads(1)
    store = distributed.FileStore(args.store, COUNT)
    distributed.init_process_group("gloo", store=store, rank=args.rank, world_size=COUNT, timeout=timedelta(minutes=30))
    for family in ("showo", "janus"):
        worker = Worker(family, args)
        worker.check()
        turns = [(worker.turn(worker.rank == 0), worker.turn(True)) for _ in range(args.repeats)]
        if worker.rank == 0:
            ratios = sorted(COUNT * alone / together for alone, together in turns)
            alone, together = (statistics.median(column) for column in zip(*turns, strict=True))
            print(
                f"{family}: {worker.config.batch_size} images on one process {alone:.3f} s, twice as many on two "
                f"{together:.3f} s: {statistics.median(ratios):.2f} [{ratios[0]:.2f} .. {ratios[-1]:.2f}] times one "
                f"(goal {GOAL})\n",
                flush=True,
            )
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--prompts", type=int, default=2, help="of each worker")
    options.add_argument("--generations", type=int, default=2)
    options.add_argument("--timesteps", type=int, default=8)
    options.add_argument("--new-tokens", type=int, default=8)
    options.add_argument("--rank", type=int)
    options.add_argument("--store")
    args = options.parse_args()
    if args.short:
        args.prompts, args.timesteps, args.new_tokens, args.repeats = 1, 2, 2, 2
    if args.rank is not None:
        work(args)
        return
    torch.set_num_threads(1)
    header(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--store", str(Path(folder) / "store"), "--rank"]
        workers = [
            subprocess.Popen([*command, str(rank)], env=os.environ | {"OMP_NUM_THREADS": "1"}) for rank in (0, 1)
        ]
        try:
            while all(worker.poll() in (None, 0) for worker in workers) and any(w.poll() is None for w in workers):
                time.sleep(0.5)
        finally:
            for worker in workers:
                worker.kill()
    failed = [worker.wait() for worker in workers]
    assert not any(failed), f"the workers ended with {failed}"


if __name__ == "__main__":
    main()
