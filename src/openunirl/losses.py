"""advantages -> loss: the clipped GRPO objective on image tokens and on answer tokens, with KL to the frozen base.

In: an Experience (a rollout, its advantages, the frozen base's log-probs). Out: parts of the loss, one forward each, so
that only one forward's activations live at a time; their sum is the loss, however the batch is split.

Source: GRPO (arXiv 2402.03300), names and normalisations as in TRL's GRPOTrainer; UniRL (arXiv 2505.23380) for the two
halves. Departures: 1. the image half sums over scoring passes of an estimator, weighted (METHOD 2); 2. every
denominator is global over processes.

Shapes: B images, N image tokens, Q answers, T answer tokens; S rows and L columns of either table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from openunirl.config import LossConfig
from openunirl.models.masked import Estimator
from openunirl.models.protocol import UnifiedModel
from openunirl.rollout import Rollout
from openunirl.types import AnswerRollout, ImageRollout, ScorePass


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What an update needs, with every random mask already drawn.

    passes: the estimator's passes over all B images; reference_images / old_images: [B, N] log-probs per pass;
    reference_answers / old_answers: [Q, T]. The old ones are None at the first inner step: the policy is then its own
    old policy and the ratio exactly 1.
    """

    rollout: Rollout
    advantages_B: torch.Tensor
    advantages_Q: torch.Tensor
    passes: tuple[ScorePass, ...]
    reference_images: tuple[torch.Tensor, ...]
    reference_answers: torch.Tensor | None
    old_images: tuple[torch.Tensor, ...] | None = None
    old_answers: torch.Tensor | None = None


@dataclass
class Stats:
    """Weighted means, collected over parts. Example: stats.add("kl", values, weights); stats.means()"""

    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))

    def add(self, name: str, values: torch.Tensor, weights: torch.Tensor) -> None:
        self.sums[name][0] += float((values.detach() * weights).sum())
        self.sums[name][1] += float(weights.sum())

    def means(self) -> dict[str, float]:
        return {name: total / weight if weight else 0.0 for name, (total, weight) in self.sums.items()}


# ------------------------------------------------------------------------------------------ pure functions


def kl_k3(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimator of KL(policy || reference) per token; never negative, 0 where the two are equal."""
    difference = reference - logp
    return difference.exp() - difference - 1


def clipped_loss(
    logp_SL: torch.Tensor, old_SL: torch.Tensor, advantages_S: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-min(ratio*A, clip(ratio)*A) per token [S, L], and which tokens were clipped low or high (0/1)."""
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    ratio_SL = (logp_SL - old_SL).exp()
    advantage_S1 = advantages_S[:, None]
    clipped_SL = ratio_SL.clamp(1 - config.epsilon, 1 + high)
    loss_SL = -torch.minimum(ratio_SL * advantage_S1, clipped_SL * advantage_S1)
    clips = {
        "clip_ratio/low_mean": ((ratio_SL < 1 - config.epsilon) & (advantage_S1 < 0)).float(),
        "clip_ratio/high_mean": ((ratio_SL > 1 + high) & (advantage_S1 > 0)).float(),
    }
    return loss_SL, clips


def normalise(
    loss_SL: torch.Tensor, weight_SL: torch.Tensor, length_S: torch.Tensor, config: LossConfig, totals: Totals
) -> torch.Tensor:
    """Scalar share of the batch's loss that these rows contribute. `weight_SL` is 0 where a token does not count."""
    weighted_S = (loss_SL * weight_SL).sum(1)
    if config.loss_type == "grpo":
        return (weighted_S / length_S.clamp_min(1)).sum() / totals.samples
    if config.loss_type == "dr_grpo":
        return weighted_S.sum() / (totals.samples * totals.max_length)
    return weighted_S.sum() / totals.tokens  # bnpo, dapo


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Global denominators, divided by the number of processes (whose gradients are averaged).

    Example: Totals(samples=64, tokens=4096, max_length=64)
    """

    samples: float
    tokens: float
    max_length: int


# ------------------------------------------------------------------------------------------- gathering


@torch.no_grad()
def gather_experience(
    model: UnifiedModel,
    rollout: Rollout,
    advantages_B: torch.Tensor,
    advantages_Q: torch.Tensor,
    config: LossConfig,
    *,
    temperature: float,
) -> Experience:
    """Draws the scoring passes and scores them with the frozen base (and, for several inner steps, the old policy)."""
    estimator = Estimator(name=config.estimator, num_scored_steps=config.num_scored_steps, num_draws=config.num_draws)
    passes = (
        tuple(model.scoring_passes(rollout.images, estimator, rollout.scoring_seeds_B)) if config.image_coef else ()
    )
    experience = Experience(
        rollout=rollout,
        advantages_B=advantages_B,
        advantages_Q=advantages_Q,
        passes=passes,
        reference_images=(),
        reference_answers=None,
    )
    with model.reference():
        images, answers = _score(model, experience, config, temperature)
    experience = replace(experience, reference_images=images, reference_answers=answers)
    if config.num_iterations > 1:
        images, answers = _score(model, experience, config, temperature)
        experience = replace(experience, old_images=images, old_answers=answers)
    return experience


def _score(
    model: UnifiedModel, experience: Experience, config: LossConfig, temperature: float
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    rollout = experience.rollout
    images = tuple(
        model.score_images(rollout.images, one, logprob_guidance=config.logprob_guidance).logprobs_BN
        for one in experience.passes
    )
    answers = None
    if config.answer_coef:
        answers = model.score_answers(
            rollout.images.images, rollout.answers.questions, rollout.answers, temperature=temperature
        ).logprobs_QT
    return images, answers


# ----------------------------------------------------------------------------------------------- the loss


def grpo(
    model: UnifiedModel,
    experience: Experience,
    config: LossConfig,
    *,
    parts: int,
    image_totals: Totals,
    answer_totals: Totals,
    temperature: float,
    stats: Stats,
) -> Iterator[torch.Tensor]:
    """Yields scalars to back-propagate one after the other; each holds one forward of 1/`parts` of the batch."""
    for chunk in _split(experience, parts):
        rollout = chunk.rollout
        for k, one in enumerate(chunk.passes):
            scores = model.score_images(rollout.images, one, logprob_guidance=config.logprob_guidance)
            old = chunk.old_images[k] if chunk.old_images else None
            weight_BN = one.weight_BN * one.scored_BN
            length_B = torch.full((len(weight_BN),), float(weight_BN.shape[1]), device=weight_BN.device)
            loss = _half(
                "image", scores.logprobs_BN, old, chunk.reference_images[k], chunk.advantages_B, scores.entropy_BN,
                weight_BN / len(chunk.passes) if config.estimator == "remask" else weight_BN, length_B, config,
                image_totals, stats,
            )  # fmt: skip
            yield config.image_coef * loss
        if config.answer_coef and chunk.reference_answers is not None:
            scores = model.score_answers(
                rollout.images.images, rollout.answers.questions, rollout.answers, temperature=temperature
            )
            weight_QT = scores.mask_QT.float()
            loss = _half(
                "answer", scores.logprobs_QT, chunk.old_answers, chunk.reference_answers, chunk.advantages_Q,
                scores.entropy_QT, weight_QT, weight_QT.sum(1), config, answer_totals, stats,
            )  # fmt: skip
            yield config.answer_coef * loss


def _half(
    name: str,
    logp_SL: torch.Tensor,
    old_SL: torch.Tensor | None,
    reference_SL: torch.Tensor,
    advantages_S: torch.Tensor,
    entropy_SL: torch.Tensor,
    weight_SL: torch.Tensor,
    length_S: torch.Tensor,
    config: LossConfig,
    totals: Totals,
    stats: Stats,
) -> torch.Tensor:
    old_SL = logp_SL.detach() if old_SL is None else old_SL
    loss_SL, clips = clipped_loss(logp_SL, old_SL, advantages_S.to(logp_SL.device), config)
    kl_SL = kl_k3(logp_SL, reference_SL)
    stats.add(f"{name}/kl", kl_SL, weight_SL)
    stats.add(f"{name}/entropy", entropy_SL, weight_SL)
    for clip, values in clips.items():
        stats.add(clip, values, weight_SL)
    return normalise(loss_SL + config.beta * kl_SL, weight_SL, length_S, config, totals)


def _split(experience: Experience, parts: int) -> Iterator[Experience]:
    """Contiguous runs of images with their answers."""
    if parts == 1:
        yield experience
        return
    total = len(experience.advantages_B)
    if not 0 < parts <= total:
        raise ValueError(f"gradient_accumulation_steps={parts} must lie between 1 and the {total} images of a step")
    per_image = len(experience.advantages_Q) // total
    for rows in torch.arange(total).chunk(parts):
        b = slice(int(rows[0]), int(rows[-1]) + 1)
        q = slice(b.start * per_image, b.stop * per_image)
        yield replace(
            experience,
            rollout=_slice_rollout(experience.rollout, b, q),
            advantages_B=experience.advantages_B[b],
            advantages_Q=experience.advantages_Q[q],
            passes=tuple(
                ScorePass(shown_BN=o.shown_BN[b], scored_BN=o.scored_BN[b], weight_BN=o.weight_BN[b])
                for o in experience.passes
            ),
            reference_images=tuple(x[b] for x in experience.reference_images),
            reference_answers=None if experience.reference_answers is None else experience.reference_answers[q],
            old_images=None if experience.old_images is None else tuple(x[b] for x in experience.old_images),
            old_answers=None if experience.old_answers is None else experience.old_answers[q],
        )


def _slice_rollout(rollout: Rollout, b: slice, q: slice) -> Rollout:
    images, answers = rollout.images, rollout.answers
    prompts = slice(b.start // rollout.num_generations, (b.stop - 1) // rollout.num_generations + 1)
    return replace(
        rollout,
        prompts=rollout.prompts[prompts],
        gold=rollout.gold[q],
        scoring_seeds_B=rollout.scoring_seeds_B[b],
        images=ImageRollout(
            prompts=images.prompts[b],
            tokens_BN=images.tokens_BN[b],
            reveal_step_BN=images.reveal_step_BN[b],
            logprobs_BN=images.logprobs_BN[b],
            sampling=images.sampling,
        ),
        answers=AnswerRollout(
            questions=tuple(replace(asked, image=asked.image - b.start) for asked in answers.questions[q]),
            texts=answers.texts[q],
            tokens_QT=answers.tokens_QT[q],
            mask_QT=answers.mask_QT[q],
            logprobs_QT=answers.logprobs_QT[q],
        ),
    )
