"""Masked discrete diffusion over image tokens: the sampler of MaskGIT / Show-o, and estimators of its log-probability.

In: a function from a partly masked image to token logits at its masked places. Out: tokens, the step at which each was
revealed, and their log-probs. Source: MaskGIT (arXiv 2202.04200); Show-o's released sampler for the order of draws and
its quirks (the confidence temperature is a running product; one mask is kept until the end and that step's draws are
returned).

Departures: 1. `reveal_step` is recorded (METHOD 2), so that (tokens, reveal_step) is the whole trajectory;
2. token logits may be divided by a temperature (official: always 1);
3. logits and draws are made where a token may be masked only, unless the source of draws needs them `everywhere`.

Shapes: B images, N tokens, K of them that may be masked, V codes, T timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from openunirl.draws import Draws, Scoring, key, uniforms
from openunirl.types import ImageRollout, ImageSampling, ScorePass

MASKED = -1  # marks a masked token in a tensor of codes


def check(sampling: ImageSampling) -> None:
    """ValueError for a sampling that this sampler cannot follow."""
    if sampling.top_k or sampling.top_p != 1:
        raise ValueError(
            f"top_k={sampling.top_k} must be 0 and top_p={sampling.top_p} must be 1: this model draws from all codes"
        )


def mask_ratio(schedule: str, t: torch.Tensor) -> torch.Tensor:
    """Share of tokens masked at time t in [0, 1]: 1 at 0, 0 at 1. "cosine", "linear", "sigmoid" or "pow<exponent>"."""
    if schedule == "cosine":
        return torch.cos(t * (math.pi * 0.5))
    if schedule == "linear":
        return 1 - t
    if schedule.startswith("pow"):
        return 1 - t ** float(schedule.removeprefix("pow"))
    if schedule == "sigmoid":
        start, end = torch.sigmoid(torch.tensor([-3.0, 3.0], dtype=t.dtype))
        return ((end - torch.sigmoid(6 * t - 3)) / (end - start)).clamp(1e-6, 1)
    raise ValueError(f"unknown mask schedule {schedule!r}: use cosine, linear, sigmoid or pow<exponent>")


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    """Uniforms -> Gumbel noise, clamped as in the official code."""

    def log(x: torch.Tensor) -> torch.Tensor:
        return torch.log(x.clamp(1e-20))

    return -log(-log(uniform))


def confidence_temperatures(start: float, num_timesteps: int) -> list[float]:
    """The temperature of each step: a running product of (1 - (k + 1)/T), as in the official code."""
    temperatures, current = [], start
    for step in range(num_timesteps):
        current *= 1.0 - (step + 1) / num_timesteps
        temperatures.append(current)
    return temperatures


def remask(
    chosen_BN: torch.Tensor, unknown_BN: torch.Tensor, noise_BN: torch.Tensor, temperature: float, ratio: torch.Tensor
) -> torch.Tensor:
    """Which unknown tokens stay masked: those of lowest log(p) + temperature*noise.

    chosen_BN: probability of each drawn token; ratio: scalar, share that should stay masked. Returns bool [B, N].
    """
    known = torch.finfo(chosen_BN.dtype).max
    confidence_BN = torch.log(chosen_BN.masked_fill(~unknown_BN, known).clamp(1e-20)) + temperature * noise_BN
    wanted = torch.floor(chosen_BN.shape[1] * ratio)
    count_B1 = torch.minimum(unknown_BN.sum(1, keepdim=True) - 1, wanted.long()).clamp_min(1)
    cut_B1 = confidence_BN.sort(dim=1).values.gather(1, count_B1)
    return confidence_BN < cut_B1


def masked_counts(num_tokens: int, num_timesteps: int, schedule: str = "cosine") -> list[int]:
    """The most tokens of an image that are masked at each step: `remask` keeps fewer where confidences tie.

    Example: masked_counts(64, 4) == [64, 59, 45, 24]
    """
    counts = [num_tokens]
    for step in range(1, num_timesteps):
        wanted = torch.floor(num_tokens * mask_ratio(schedule, torch.tensor(step / num_timesteps)))
        counts.append(max(1, min(counts[-1] - 1, int(wanted))))
    return counts


@dataclass(frozen=True, kw_only=True)
class MaskedSample:
    """tokens_BN, reveal_step_BN int64; logprobs_BN float32."""

    tokens_BN: torch.Tensor
    reveal_step_BN: torch.Tensor
    logprobs_BN: torch.Tensor


def sample(
    logits_fn: Callable[[int, torch.Tensor, torch.Tensor | None], torch.Tensor],
    draws: Draws,
    start_BN: torch.Tensor,
    sampling: ImageSampling,
    schedule: str = "cosine",
) -> MaskedSample:
    """Draws images. `logits_fn` takes the step, codes [B, N] with MASKED holes and places [B, K], and returns the
    acting policy's logits [B, K, V]; without places (None) those of all, [B, N, V].

    start_BN is all MASKED, or partly given (in-painting; given tokens get reveal step -1).
    """
    tokens_BN, shape = start_BN.clone(), start_BN.shape
    reveal_BN = torch.full_like(start_BN, -1)
    logprobs_BN = torch.zeros(shape, device=start_BN.device)
    temperatures = confidence_temperatures(sampling.confidence_temperature, sampling.num_timesteps)
    for step, count in enumerate(masked_counts(shape[1], sampling.num_timesteps, schedule)):
        unknown_BN = tokens_BN == MASKED
        at_BK = None if draws.everywhere or count == shape[1] else _first_places(unknown_BN, count)
        logp_BKV = torch.log_softmax(logits_fn(step, tokens_BN, at_BK).float() / sampling.temperature, dim=-1)
        probs_BKV = logp_BKV.exp()
        drawn_BK = draws.tokens(step, probs_BKV) if at_BK is None else draws.tokens(step, probs_BKV, at_BK)
        chosen_BK = probs_BKV.gather(-1, drawn_BK[..., None])[..., 0]
        logp_BK = logp_BKV.gather(-1, drawn_BK[..., None])[..., 0]
        noise_BN = gumbel(draws.uniform(step, shape[1])).to(start_BN.device)
        drawn_BN = torch.where(unknown_BN, _placed(drawn_BK, at_BK, shape), tokens_BN)
        if step == sampling.num_timesteps - 1:
            keep_masked_BN = torch.zeros_like(unknown_BN)  # this step's draws are returned
        else:
            ratio = mask_ratio(schedule, torch.tensor((step + 1) / sampling.num_timesteps))
            chosen_BN = _placed(chosen_BK, at_BK, shape)
            keep_masked_BN = remask(chosen_BN, unknown_BN, noise_BN, temperatures[step], ratio)
        revealed_BN = unknown_BN & ~keep_masked_BN
        reveal_BN = torch.where(revealed_BN, step, reveal_BN)
        logprobs_BN = torch.where(revealed_BN, _placed(logp_BK, at_BK, shape), logprobs_BN)
        tokens_BN = drawn_BN.masked_fill(keep_masked_BN, MASKED)
    return MaskedSample(tokens_BN=tokens_BN, reveal_step_BN=reveal_BN, logprobs_BN=logprobs_BN)


def _first_places(unknown_BN: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [B, count]: all unknown places, in order, then as many of the others as it takes."""
    return (~unknown_BN).byte().argsort(dim=1, stable=True)[:, :count]


def _placed(values_BK: torch.Tensor, at_BK: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """[B, N], 0 where there is no value."""
    return values_BK if at_BK is None else values_BK.new_zeros(shape).scatter(1, at_BK, values_BK)


# ------------------------------------------------------------------------------------------------ estimators


RANDOM_MASKS = ("remask", "training_loss")
"""Estimators whose passes are random draws, to be averaged."""


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """How the log-probability of a sampled image is estimated (METHOD 2).

    Example: Estimator(name="trajectory", num_scored_steps=2). `num_scored_steps` 0 = all of them; `num_draws`: random
    masks a rollout, for "remask" (weighted N / #masked, METHOD 2) and "training_loss" (every masked token weighs the
    same, as in the family's own training: states in which much is undecided count more). Autoregressive models score
    exactly and ignore all of it. `mask_time`: the latest time of the cosine schedule at which a random mask is drawn.
    """

    name: Literal["trajectory", "remask", "training_loss", "full_mask"] = "trajectory"
    num_scored_steps: int = 0
    num_draws: int = 1
    mask_time: float = 1.0


def scoring_passes(rollout: ImageRollout, estimator: Estimator, seeds_B: torch.Tensor) -> list[ScorePass]:
    """The passes that score `rollout`: masks, steps and weights, drawn once from `seeds_B`."""
    reveal_BN, num_steps = rollout.reveal_step_BN, rollout.sampling.num_timesteps
    ones_BN = torch.ones(reveal_BN.shape, device=reveal_BN.device)
    if estimator.name == "full_mask":
        nothing = torch.zeros_like(reveal_BN, dtype=torch.bool)
        return [ScorePass(shown_BN=nothing, scored_BN=~nothing, weight_BN=ones_BN)]
    if estimator.name in RANDOM_MASKS:
        even = estimator.name == "training_loss"
        return [
            _remask_pass(reveal_BN, seeds_B, draw, even, estimator.mask_time) for draw in range(estimator.num_draws)
        ]
    if estimator.name != "trajectory":
        raise ValueError(f"unknown estimator {estimator.name!r}: use trajectory, remask, training_loss or full_mask")
    count = estimator.num_scored_steps or num_steps
    if not 0 < count <= num_steps:
        raise ValueError(f"num_scored_steps={count} must lie between 1 and num_timesteps={num_steps}, or be 0 for all")
    if count == num_steps:
        steps_BK = torch.arange(num_steps).expand(len(reveal_BN), num_steps)
    else:
        steps_BK = uniforms(key(seeds_B, Scoring.STEPS), 0, num_steps).argsort(1)[:, :count]
    passes = []
    for step_B1 in steps_BK.to(reveal_BN.device).split(1, dim=1):
        passes.append(
            ScorePass(
                shown_BN=reveal_BN < step_B1, scored_BN=reveal_BN == step_B1, weight_BN=ones_BN * (num_steps / count)
            )
        )
    return passes


def random_mask(seeds_B: torch.Tensor, num_tokens: int, schedule: str = "cosine", latest: float = 1.0) -> torch.Tensor:
    """Training masks: share = schedule(time), uniform in 0..latest; at least one token. bool [B, N], True = masked."""
    time_B = uniforms(key(seeds_B, 2), 0, 1)[:, 0] * latest
    count_B1 = (num_tokens * mask_ratio(schedule, time_B)).round().clamp_min(1)[:, None]
    rank_BN = uniforms(key(seeds_B, 3), 0, num_tokens).argsort(1).argsort(1)
    return rank_BN < count_B1


def _remask_pass(reveal_BN: torch.Tensor, seeds_B: torch.Tensor, draw: int, even: bool, latest: float) -> ScorePass:
    seeds_B = key(seeds_B, Scoring.MASKS + draw)
    masked_BN = random_mask(seeds_B, reveal_BN.shape[1], latest=latest).to(reveal_BN.device)
    if even:  # up to time t the schedule masks sin(a) / a of the tokens on average, a = t pi / 2; 2 / pi at t = 1
        angle = latest * math.pi / 2
        weight_B1 = torch.full((len(reveal_BN), 1), angle / math.sin(angle), device=reveal_BN.device)
    else:
        weight_B1 = reveal_BN.shape[1] / masked_BN.sum(1, keepdim=True)
    return ScorePass(shown_BN=~masked_BN, scored_BN=masked_BN, weight_BN=weight_B1.expand(reveal_BN.shape).float())
