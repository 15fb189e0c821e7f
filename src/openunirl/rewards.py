"""What answers are worth: rollout -> rewards.

In: a Rollout. Out: Rewards: one number per answer (judged right or not) and one per image and question. The judge of
the image half is the model itself (the paper) or the frozen base; its verdict is its sampled answer (0/1), or the
probability it gives the gold answer.

Source: UniRL (arXiv 2505.23380), section on GRPO. Departures: 1. "probability" rewards (METHOD 4, soft self-reward);
2. several questions per image and several answers per question.

Shapes: B images, J questions per image, K answers per question, Q = B*J*K answers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from openunirl.config import RewardConfig, RolloutConfig
from openunirl.draws import key
from openunirl.models.protocol import UnifiedModel
from openunirl.rollout import Rollout
from openunirl.types import AnswerSampling


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """answer_Q: 0/1 per sampled answer; image_BJ: reward of each image by question, in 0..1.

    Example: Rewards(answer_Q=tensor([1., 0.]), image_BJ=tensor([[1.], [0.]]))
    """

    answer_Q: torch.Tensor
    image_BJ: torch.Tensor


def judge_answers(
    match: Callable, tags: tuple[str, ...], gold: tuple[str, ...], texts: tuple[str, ...]
) -> torch.Tensor:
    """1 where the matcher calls an answer right, else 0: float32 [Q]."""
    return torch.tensor([float(match(*row).same) for row in zip(tags, gold, texts, strict=True)])


def score(
    model: UnifiedModel, rollout: Rollout, match: Callable, config: RewardConfig, rollout_config: RolloutConfig
) -> Rewards:
    """Both halves' rewards. With `source="self"` and `kind="answer"` one set of answers serves both."""
    judge = model.reference() if config.source == "frozen" else nullcontext()
    answer_Q = judge_answers(match, rollout.tags, rollout.gold, rollout.answers.texts)
    table = (len(rollout.images.prompts), rollout.num_questions, rollout.num_answers)
    if config.kind == "probability":
        with judge, torch.no_grad():
            scores = model.score_answers(rollout.images.images, rollout.answers.questions, rollout.gold)
        mean_Q = scores.logprobs_QT.sum(1) / scores.mask_QT.sum(1)
        image_BJ = mean_Q.exp().cpu().view(table).mean(-1)
    elif config.source == "frozen":
        sampling = AnswerSampling(
            max_new_tokens=rollout_config.max_new_tokens, temperature=rollout_config.answer_temperature
        )
        with judge:
            per_image = table[1] * table[2]
            keys_Q = rollout.scoring_seeds_B.repeat_interleave(per_image)
            seeds_Q = key(keys_Q, torch.arange(per_image).repeat(table[0]))
            answers = model.sample_answers(rollout.images.images, rollout.answers.questions, seeds_Q, sampling)
        image_BJ = judge_answers(match, rollout.tags, rollout.gold, answers.texts).view(table).mean(-1)
    else:
        image_BJ = answer_Q.view(table).mean(-1)
    return Rewards(answer_Q=answer_Q, image_BJ=image_BJ)


def shuffled(rewards: Rewards, seeds_B: torch.Tensor) -> Rewards:
    """The control: rewards exchanged among this process's images, and among its answers, by a keyed permutation."""
    image_order = key(seeds_B, 7).argsort()
    per_image = len(rewards.answer_Q) // len(seeds_B)
    answer_order = key(seeds_B.repeat_interleave(per_image), 8, torch.arange(len(rewards.answer_Q))).argsort()
    return Rewards(answer_Q=rewards.answer_Q[answer_order], image_BJ=rewards.image_BJ[image_order])
