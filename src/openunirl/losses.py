"""Formulas of the loss: pure functions of log-probs, worked out by hand in tests/test_losses.py.

In: log-probs of the policy, the old policy and the frozen base; advantages; weights (0 where a token does not count).
Out: losses per token, and their share of the batch's scalar loss. objectives.py puts them together.

Source: GRPO (arXiv 2402.03300) and GSPO (arXiv 2507.18071) for the ratio per sequence, names and normalisations as in
TRL's GRPOTrainer. Departures: 1. every denominator is global over processes; 2. the tokens of a sequence may be spread
over several scoring passes.

Shapes: S rows (images or answers) and L columns (their tokens).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from openunirl.config import LossConfig


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Global denominators, divided by the number of processes (whose gradients are averaged).

    Example: Totals(samples=64, tokens=4096, max_length=64)
    """

    samples: float
    tokens: float
    max_length: int


@dataclass
class Stats:
    """Weighted means, collected over parts. Example: stats.add("kl", values, weights); stats.means()"""

    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))

    def add(self, name: str, values: torch.Tensor, weights: torch.Tensor) -> None:
        self.sums[name][0] += float((values.detach() * weights).sum())
        self.sums[name][1] += float(weights.sum())

    def means(self) -> dict[str, float]:
        return {name: total / weight if weight else 0.0 for name, (total, weight) in self.sums.items()}


def kl_k3(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimator of KL(policy || reference) per token; never negative, 0 where the two are equal."""
    difference = reference - logp
    return difference.exp() - difference - 1


def mean_log_ratio(
    logp_SL: torch.Tensor, old_SL: torch.Tensor, weight_SL: torch.Tensor, length_S: torch.Tensor
) -> torch.Tensor:
    """[S]: the log of the ratio of a whole sequence, divided by its length."""
    return ((logp_SL - old_SL) * weight_SL).sum(1) / length_S.clamp_min(1)


def clipped_loss(
    log_ratio_SL: torch.Tensor, advantages_S: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-min(ratio*A, clip(ratio)*A), and what was clipped low or high (0/1), of the shape of `log_ratio_SL`: [S, L], or
    [S, 1] for one ratio per sequence."""
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    ratio_SL = log_ratio_SL.exp()
    advantage_S1 = advantages_S[:, None]
    clipped_SL = ratio_SL.clamp(1 - config.epsilon, 1 + high)
    loss_SL = -torch.minimum(ratio_SL * advantage_S1, clipped_SL * advantage_S1)
    clips = {
        "clip_ratio/low_mean": ((ratio_SL < 1 - config.epsilon) & (advantage_S1 < 0)).float(),
        "clip_ratio/high_mean": ((ratio_SL > 1 + high) & (advantage_S1 > 0)).float(),
    }
    return loss_SL, clips


def sequence_share(loss_S1: torch.Tensor, weight_SL: torch.Tensor, length_S: torch.Tensor) -> torch.Tensor:
    """[S, 1], for a sequence that this pass holds only a part of: the value is unchanged, the gradient is multiplied by
    the sequence's length over the part's weight.

    A loss per sequence stands beside each of its tokens. A pass adds it beside its own tokens only, yet its log-probs
    move the loss beside all of them. With one pass the factor is 1.
    """
    part_S = weight_SL.sum(1)
    factor_S = torch.where(part_S > 0, length_S / part_S.clamp_min(torch.finfo(part_S.dtype).tiny), 0.0)
    return loss_S1.detach() + factor_S[:, None] * (loss_S1 - loss_S1.detach())


def sample_mean(loss_SL: torch.Tensor, weight_SL: torch.Tensor, length_S: torch.Tensor, totals: Totals) -> torch.Tensor:
    """Scalar: mean per sample, then over all samples of the batch."""
    return ((loss_SL * weight_SL).sum(1) / length_S.clamp_min(1)).sum() / totals.samples


def normalise(
    loss_SL: torch.Tensor, weight_SL: torch.Tensor, length_S: torch.Tensor, config: LossConfig, totals: Totals
) -> torch.Tensor:
    """Scalar share of the batch's loss that these rows contribute. `weight_SL` is 0 where a token does not count."""
    if config.loss_type == "grpo":
        return sample_mean(loss_SL, weight_SL, length_S, totals)
    weighted = (loss_SL * weight_SL).sum()
    if config.loss_type == "dr_grpo":
        return weighted / (totals.samples * totals.max_length)
    return weighted / totals.tokens  # bnpo, dapo
