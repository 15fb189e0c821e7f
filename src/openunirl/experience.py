"""rollout and advantages -> experience: all that the updates of one rollout need, drawn and scored once.

In: a Rollout and what its images and answers are worth. Out: an Experience: the scoring passes with every random mask
already drawn, the noise of the relaxation, and for GRPO the log-probs of the frozen base and of the old policy.

Source: METHOD 2 (masks and steps are drawn once and reused by the policy, the old policy and the base).

Shapes: B images, N image tokens, V codes, Q answers, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from openunirl.config import LossConfig
from openunirl.draws import Scoring, key
from openunirl.models.masked import Estimator
from openunirl.models.protocol import UnifiedModel
from openunirl.relaxation import Relaxation
from openunirl.rollout import Rollout
from openunirl.types import AnswerRollout, ImageQuestion, ImageRollout, Images, ScorePass, Targets


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What an update needs, with every random mask already drawn.

    passes: the estimator's passes over all B images; relaxations: one per pass, or none where no gradient reaches the
    images through y; targets: what the reward asks of them. reference_images / old_images: [B, N] log-probs per pass;
    reference_answers / old_answers: [Q, T]; only GRPO has them. The old ones are None at the first inner step: the
    policy is then its own old policy and the ratio exactly 1.
    """

    rollout: Rollout
    advantages_B: torch.Tensor
    advantages_Q: torch.Tensor
    passes: tuple[ScorePass, ...]
    relaxations: tuple[Relaxation, ...] = ()
    targets: Targets | None = None
    reference_images: tuple[torch.Tensor, ...] = ()
    reference_answers: torch.Tensor | None = None
    old_images: tuple[torch.Tensor, ...] | None = None
    old_answers: torch.Tensor | None = None

    def relaxation(self, k: int) -> Relaxation | None:
        return self.relaxations[k] if self.relaxations else None


@torch.no_grad()
def gather_experience(
    model: UnifiedModel,
    rollout: Rollout,
    advantages_B: torch.Tensor,
    advantages_Q: torch.Tensor,
    config: LossConfig,
    *,
    temperature: float,
    tau: float = 1.0,
    targets: Targets | None = None,
    parts: int = 1,
) -> Experience:
    """Draws the scoring passes; for GRPO, scores them with the frozen base (and, for several inner steps, the old
    policy). `tau` is the relaxation's temperature at this step; `parts`: those that the update will split the batch
    into. Scores are made in the same parts, because in low precision they depend on what is computed together, and the
    ratio and the KL must start at exactly 1 and 0."""
    estimator = Estimator(
        name=config.estimator,
        num_scored_steps=config.num_scored_steps,
        num_draws=config.num_draws,
        mask_time=config.mask_time,
    )
    seeds_B = rollout.scoring_seeds_B
    passes = tuple(model.scoring_passes(rollout.images, estimator, seeds_B)) if config.image_coef else ()
    relaxed = config.end_to_end and (config.answer_coef or config.reward_coef)
    experience = Experience(
        rollout=rollout,
        advantages_B=advantages_B,
        advantages_Q=advantages_Q,
        passes=passes,
        relaxations=tuple(
            Relaxation(seeds_B=key(seeds_B, Scoring.RELAXATION, k), tau=tau, noise=config.relaxation.noise)
            for k in range(len(passes) if relaxed else 0)
        ),
        targets=targets,
    )
    if config.method != "grpo":  # nothing else has a ratio or a KL
        return experience
    with model.reference():
        images, answers = _score(model, experience, config, temperature, parts)
    experience = replace(experience, reference_images=images, reference_answers=answers)
    if config.num_iterations > 1:
        images, answers = _score(model, experience, config, temperature, parts)
        experience = replace(experience, old_images=images, old_answers=answers)
    return experience


def _score(
    model: UnifiedModel, experience: Experience, config: LossConfig, temperature: float, parts: int
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Log-probs of all images [B, N] per pass, and of all answers [Q, T], one part of the batch after the other."""
    scored = [_score_part(model, part, config, temperature) for part in split(experience, parts)]
    images = tuple(torch.cat(rows) for rows in zip(*(images for images, _ in scored), strict=True))
    answers = [rows for _, rows in scored if rows is not None]
    return images, torch.cat(answers) if answers else None


def _score_part(
    model: UnifiedModel, part: Experience, config: LossConfig, temperature: float
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    rollout = part.rollout
    images = tuple(
        model.score_images(rollout.images, one, logprob_guidance=config.logprob_guidance).logprobs_BN
        for one in part.passes
    )
    if not config.answer_coef:
        return images, None
    seen = Images(onehots_BNV=onehots(model, rollout)) if config.end_to_end else rollout.images.images
    scores = model.score_answers(seen, rollout.answers.questions, rollout.answers, temperature=temperature)
    return images, scores.logprobs_QT


def onehots(model: UnifiedModel, rollout: Rollout) -> torch.Tensor:
    """The sampled images as one-hots [B, N, V], at least float32. End-to-end, every answer is scored on these: they are
    mixed by other kernels than token ids, and the ratio and the KL must start at exactly 1 and 0."""
    dtype = torch.promote_types(next(model.net.parameters()).dtype, torch.float32)
    return F.one_hot(rollout.images.tokens_BN, model.num_codes).to(dtype)


# ---------------------------------------------------------------------------------------------------- splitting


def split(experience: Experience, parts: int) -> Iterator[Experience]:
    """Contiguous runs of images with their answers."""
    if parts == 1:
        yield experience
        return
    total = len(experience.advantages_B)
    if not 0 < parts <= total:
        raise ValueError(f"gradient_accumulation_steps={parts} must lie between 1 and the {total} images of a step")
    for rows in torch.arange(total).chunk(parts):
        yield take(experience, rows.tolist())


def counted(experience: Experience, config: LossConfig) -> Experience:
    """Without the images of which neither the picture nor an answer has an advantage other than 0: they add nothing to
    a likelihood, and scoring them costs as much. One image stays where none counts, because sharded weights are
    gathered in every process's forwards."""
    picture_B = (experience.advantages_B != 0) & bool(config.image_coef)
    per_image = len(experience.advantages_Q) // len(picture_B)
    answers_BQ = (experience.advantages_Q.view(len(picture_B), per_image) != 0) & bool(config.answer_coef)
    counts_B = picture_B | answers_BQ.any(1)
    return experience if bool(counts_B.all()) else take(experience, counts_B.nonzero()[:, 0].tolist() or [0])


def take(experience: Experience, rows: Sequence[int]) -> Experience:
    """The images `rows` with their answers; each becomes a group of its own."""
    per_image = len(experience.advantages_Q) // len(experience.advantages_B)
    answers = [row * per_image + i for row in rows for i in range(per_image)]
    b, q = list(rows), answers
    return replace(
        experience,
        rollout=_take_rollout(experience.rollout, rows, answers),
        advantages_B=experience.advantages_B[b],
        advantages_Q=experience.advantages_Q[q],
        passes=tuple(
            ScorePass(shown_BN=o.shown_BN[b], scored_BN=o.scored_BN[b], weight_BN=o.weight_BN[b])
            for o in experience.passes
        ),
        targets=experience.targets
        and Targets(
            questions=_asked(experience.targets.questions, rows, answers),
            gold=tuple(experience.targets.gold[i] for i in answers),
        ),
        relaxations=tuple(replace(o, seeds_B=o.seeds_B[b]) for o in experience.relaxations),
        reference_images=tuple(x[b] for x in experience.reference_images),
        reference_answers=None if experience.reference_answers is None else experience.reference_answers[q],
        old_images=None if experience.old_images is None else tuple(x[b] for x in experience.old_images),
        old_answers=None if experience.old_answers is None else experience.old_answers[q],
    )


def _asked(
    questions: Sequence[ImageQuestion], rows: Sequence[int], answers: Sequence[int]
) -> tuple[ImageQuestion, ...]:
    """The questions `answers`, with images numbered by their place in `rows`."""
    place = {row: i for i, row in enumerate(rows)}
    return tuple(replace(questions[i], image=place[questions[i].image]) for i in answers)


def _take_rollout(rollout: Rollout, rows: Sequence[int], answers: Sequence[int]) -> Rollout:
    images, asked = rollout.images, rollout.answers
    b, q = list(rows), list(answers)
    return replace(
        rollout,
        prompts=tuple(rollout.prompts[row // rollout.num_generations] for row in rows),
        num_generations=1,
        gold=tuple(rollout.gold[i] for i in answers),
        scoring_seeds_B=rollout.scoring_seeds_B[b],
        images=ImageRollout(
            prompts=tuple(images.prompts[row] for row in rows),
            tokens_BN=images.tokens_BN[b],
            reveal_step_BN=images.reveal_step_BN[b],
            logprobs_BN=images.logprobs_BN[b],
            sampling=images.sampling,
        ),
        answers=AnswerRollout(
            questions=_asked(asked.questions, rows, answers),
            texts=tuple(asked.texts[i] for i in answers),
            tokens_QT=asked.tokens_QT[q],
            mask_QT=asked.mask_QT[q],
            logprobs_QT=asked.logprobs_QT[q],
        ),
    )
