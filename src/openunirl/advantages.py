"""rewards -> advantages: what multiplies the log-probs of images and answers in the loss.

GRPO compares within the group of images of one prompt; SFT imitates what was right: its "advantage" of an image is 1 or
0 (rejection sampling), that of a gold answer always 1.

Source: GRPO (DeepSeekMath, arXiv 2402.03300) with TRL's `scale_rewards`; credit assignment of METHOD 4: an image is
compared by the mean over its answers with the other images of its prompt; an answer with the answers to the same
question on all images of the prompt, or, with several answers per image, with those on its own image. A reward that
does not apply (nan) takes no part, as in TRL; departure: a group of equal rewards gets exactly 0.

Shapes: P prompts, G images per prompt, J questions per image, K answers per question.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from openunirl.config import LossConfig, RolloutConfig
from openunirl.rewards import Rewards

EPS = 1e-4  # TRL's

Scale = Literal["group", "batch", "none"]


def group_advantages(rewards_RG: torch.Tensor, scale: Scale, batch_std: float | None = None) -> torch.Tensor:
    """Centred within each row, then divided by the row's standard deviation, the batch's, or nothing. [R, G] -> [R, G].

    `batch_std` is the standard deviation over all processes' rewards; None takes that of `rewards_RG`. A row whose
    rewards are all equal gets exactly 0. A reward that is nan (none applies) gets 0 and has no part in its row.
    Example: group_advantages(tensor([[1., 0.], [1., 1.]]), "none") == tensor([[.5, -.5], [0., 0.]])
    """
    known_RG = ~rewards_RG.isnan()
    low_R1 = rewards_RG.masked_fill(~known_RG, math.inf).amin(1, keepdim=True)
    high_R1 = rewards_RG.masked_fill(~known_RG, -math.inf).amax(1, keepdim=True)
    centred_RG = (rewards_RG - rewards_RG.nanmean(1, keepdim=True)).masked_fill(~known_RG, 0.0)
    centred_RG = centred_RG.masked_fill(low_R1 == high_R1, 0.0)  # the mean of equal floats need not equal them
    if scale == "none":
        return centred_RG
    if scale == "batch":
        known = rewards_RG[known_RG]
        own_std = float(known.std()) if len(known) > 1 else 0.0
        return centred_RG / ((own_std if batch_std is None else batch_std) + EPS)
    degrees_R1 = (known_RG.sum(1, keepdim=True) - 1).clamp_min(1)
    return centred_RG / ((centred_RG.square().sum(1, keepdim=True) / degrees_R1).sqrt() + EPS)


def image_advantages(
    image_BJ: torch.Tensor, num_generations: int, scale: Scale, batch_std: float | None = None
) -> torch.Tensor:
    """[B, J] rewards -> [B] advantages of the images; nan where no reward applies."""
    return group_advantages(image_BJ.nanmean(1).view(-1, num_generations), scale, batch_std).flatten()


def answer_advantages(
    answer_Q: torch.Tensor,
    num_generations: int,
    num_questions: int,
    num_answers: int,
    scale: Scale,
    batch_std: float | None = None,
) -> torch.Tensor:
    """[Q] rewards -> [Q] advantages; each question has its own baseline."""
    table = answer_Q.view(-1, num_generations, num_questions, num_answers)
    if num_answers > 1:  # within the image: which answer was better on the same picture
        return group_advantages(table.flatten(0, 2), scale, batch_std).flatten()
    by_question = table.squeeze(-1).transpose(1, 2)  # [P, J, G]
    return (
        group_advantages(by_question.flatten(0, 1), scale, batch_std).view(by_question.shape).transpose(1, 2).flatten()
    )


# ------------------------------------------------------------------------------------------------- by method

Share = Callable[[float], float]
"""A local total -> the sum over processes divided by their number (Processes.share)."""
Std = Callable[[torch.Tensor], float]
"""Local values -> the standard deviation over all processes' values (Processes.std)."""


def relative(
    rewards: Rewards, rollout: RolloutConfig, loss: LossConfig, *, share: Share, std: Std
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO: ([B], [Q]) relative to the group."""
    group, scale = rollout.num_generations, loss.scale_rewards
    return (
        image_advantages(rewards.image_BJ, group, scale, std(rewards.image_B)),
        answer_advantages(
            rewards.answer_Q, group, rollout.num_questions, rollout.num_answers, scale, std(rewards.answer_Q)
        ),
    )


def imitated(
    rewards: Rewards, rollout: RolloutConfig, loss: LossConfig, *, share: Share, std: Std
) -> tuple[torch.Tensor, torch.Tensor]:
    """SFT: ([B], [Q]). An image counts if all its questions were answered right, so often that the mean over all images
    of the batch is one over those that count; the gold answers all count, or (`gold_answers="kept"`) those on them do.
    A question that no source judged is left out.

    Example: of four images one was right: ([0, 4, 0, 0], [1, 1, 1, 1])
    """
    right_B = rewards.right_B.float()
    kept = share(float(right_B.sum()))
    kept_B = right_B * (share(len(right_B)) / kept if kept else 0.0)
    if loss.gold_answers == "all":
        return kept_B, torch.ones_like(rewards.answer_Q)
    return kept_B, kept_B.repeat_interleave(rewards.answer_Q.numel() // kept_B.numel())


ADVANTAGES = {"grpo": relative, "sft": imitated}
