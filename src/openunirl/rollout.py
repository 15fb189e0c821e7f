"""prompts -> images -> answers.

In: a model and this step's prompts. Out: a Rollout: P*G images, and on each of them the prompt's questions with K
sampled answers each. Every draw is keyed by (seed, step, prompt index, sample index), so batching and the number of
processes change nothing.

Shapes: P prompts, G images per prompt, B = P*G images, J questions per image, K answers per question, Q = B*J*K.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from openunirl.config import RolloutConfig
from openunirl.draws import key
from openunirl.models.protocol import UnifiedModel
from openunirl.types import AnswerRollout, AnswerSampling, ImageQuestion, ImageRollout, Images, ImageSampling, Prompt

_IMAGES, _ANSWERS, _SCORING = 1, 2, 3  # streams of a key


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One step's own experience. Image b = p*G + g belongs to prompt p; answer q = (b*J + j)*K + k to image b.

    Example: Rollout(prompts=(Prompt(...),) * 8, num_generations=8, images=ImageRollout(...),
    answers=AnswerRollout(...),
                     gold=("red", ...), scoring_seeds_B=...)
    """

    prompts: tuple[Prompt, ...]
    num_generations: int
    num_questions: int
    num_answers: int
    images: ImageRollout
    answers: AnswerRollout
    gold: tuple[str, ...]
    scoring_seeds_B: torch.Tensor

    @property
    def tags(self) -> tuple[str, ...]:
        """The task type of each answer."""
        per_prompt = self.num_generations * self.num_questions * self.num_answers
        return tuple(prompt.tag for prompt in self.prompts for _ in range(per_prompt))


def roll_out(
    model: UnifiedModel,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    *,
    seed: int,
    step: int,
    first_prompt: int = 0,
) -> Rollout:
    """`first_prompt` is the number of prompts[0] among the step's prompts over all processes.

    Errors: ValueError for a prompt without a question.
    """
    group = config.num_generations
    who_P = torch.arange(first_prompt, first_prompt + len(prompts))
    who_B = who_P.repeat_interleave(group)
    sample_B = torch.arange(group).repeat(len(prompts))
    keys_B = key(seed, step, who_B, sample_B)
    texts, keys = [p.prompt for p in prompts for _ in range(group)], key(keys_B, _IMAGES)
    with model.reference() if config.drawn_by == "base" else nullcontext():
        images = _draw(model, texts, keys, config.drawing, config.batch_size)
    images = replace(images, sampling=config.sampling)  # what the policy is scored with

    questions, gold = [], []
    for b in range(len(keys_B)):
        for asked in _questions_of(prompts[b // group], config.num_questions):
            for _ in range(config.num_answers):
                questions.append(ImageQuestion(image=b, question=asked.question))
                gold.append(asked.answer)
    per_image = config.num_questions * config.num_answers
    keys_Q = key(keys_B.repeat_interleave(per_image), _ANSWERS, torch.arange(per_image).repeat(len(keys_B)))
    sampling = AnswerSampling(max_new_tokens=config.max_new_tokens, temperature=config.answer_temperature)
    return Rollout(
        prompts=tuple(prompts),
        num_generations=group,
        num_questions=config.num_questions,
        num_answers=config.num_answers,
        images=images,
        answers=ask(model, images.images, questions, keys_Q, sampling, config.batch_size),
        gold=tuple(gold),
        scoring_seeds_B=key(keys_B, _SCORING),
    )


def _draw(
    model: UnifiedModel, texts: list[str], keys_B: torch.Tensor, sampling: ImageSampling, size: int
) -> ImageRollout:
    parts = [
        model.sample_images(texts[i : i + size], keys_B[i : i + size], sampling) for i in range(0, len(texts), size)
    ]
    return ImageRollout(
        prompts=tuple(texts),
        tokens_BN=torch.cat([part.tokens_BN for part in parts]),
        reveal_step_BN=torch.cat([part.reveal_step_BN for part in parts]),
        logprobs_BN=torch.cat([part.logprobs_BN for part in parts]),
        sampling=sampling,
    )


def ask(
    model: UnifiedModel,
    images: Images,
    questions: Sequence[ImageQuestion],
    keys_Q: torch.Tensor,
    sampling: AnswerSampling,
    size: int,
) -> AnswerRollout:
    """Answers to `size` questions at a time, each time beside the images that they are about."""
    parts = []
    for start in range(0, len(questions), size):
        asked = questions[start : start + size]
        seen = list(dict.fromkeys(one.image for one in asked))
        own = [replace(one, image=seen.index(one.image)) for one in asked]
        few = images.select(torch.tensor(seen)) if len(seen) < len(images) else images
        parts.append(model.sample_answers(few, own, keys_Q[start : start + size], sampling))
    width = max(part.tokens_QT.shape[1] for part in parts)

    def joined(tables: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([F.pad(table, (0, width - table.shape[1])) for table in tables])

    return AnswerRollout(
        questions=tuple(questions),
        texts=tuple(text for part in parts for text in part.texts),
        tokens_QT=joined([part.tokens_QT for part in parts]),
        mask_QT=joined([part.mask_QT for part in parts]),
        logprobs_QT=joined([part.logprobs_QT for part in parts]),
    )


def _questions_of(prompt: Prompt, count: int) -> list:
    """The first `count` questions, going round where a prompt has fewer."""
    if not prompt.questions:
        raise ValueError(f"the prompt {prompt.prompt!r} has no question: training needs one with a gold answer")
    return [prompt.questions[j % len(prompt.questions)] for j in range(count)]
