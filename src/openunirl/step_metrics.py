"""What a step of training logs.

In: a step's rollout, rewards and the loss's means, of one process. Out: one flat dict over all of them, in TRL's names.
"""

from __future__ import annotations

import torch

from openunirl.distributed import Processes
from openunirl.losses import Stats
from openunirl.rewards import Rewards
from openunirl.rollout import Rollout


def step_metrics(
    processes: Processes,
    rollout: Rollout,
    rewards: Rewards,
    stats: Stats,
    *,
    advantage_abs: float,
) -> dict[str, float]:
    """One number for each name, over all processes."""
    groups = [known(row) for row in processes.gather(rewards.image_B).view(-1, rollout.num_generations)]
    by_source = {f"rewards/{n}": known(processes.gather(v)) for n, v in rewards.by_source.items()}
    flat = {f"{n}|{i}": value for n, pair in stats.sums.items() for i, value in enumerate(pair)}
    sums = processes.sum(flat)
    means = {n: sums[f"{n}|0"] / max(sums[f"{n}|1"], 1e-9) for n in stats.sums}
    both = {
        name: sum(sums.get(f"{half}/{name}|0", 0.0) for half in ("image", "answer"))
        / max(sum(sums.get(f"{half}/{name}|1", 0.0) for half in ("image", "answer")), 1e-9)
        for name in ("kl", "entropy")
        if any(f"{half}/{name}|0" in sums for half in ("image", "answer"))
    }
    correct = processes.gather(rewards.answer_Q)
    length = processes.gather(rollout.answers.mask_QT.sum(1).float())
    told = {"reward": torch.cat(groups), **{f"{n}/mean": values for n, values in by_source.items()}}
    return {
        **{name: float(values.mean()) for name, values in told.items() if len(values)},  # else: none applied
        **(spreads(groups) if rollout.num_generations > 1 else {}),
        **{f"{n}/std": spread(values) for n, values in by_source.items() if len(values)},
        "answer/accuracy": float(correct.mean()),
        "completions/mean_length": float(length.mean()),
        **both,
        **means,
        "advantage_abs": processes.sum({"size": advantage_abs})["size"] / processes.count,
    }


def known(rewards: torch.Tensor) -> torch.Tensor:
    """Those that apply."""
    return rewards[~rewards.isnan()]


def spreads(groups: list[torch.Tensor]) -> dict[str, float]:
    """How rewards differ within groups; a group of one has nothing to compare."""
    return {
        "reward_std": sum(spread(row) for row in groups) / len(groups),
        "frac_reward_zero_std": sum(bool((row == row[:1]).all()) for row in groups) / len(groups),
    }


def spread(rewards: torch.Tensor) -> float:
    """Standard deviation; 0 of fewer than two."""
    return float(rewards.std()) if len(rewards) > 1 else 0.0
