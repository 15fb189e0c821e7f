"""What a rollout is worth: rollout -> rewards.

In: a Rollout, the run's world, a RewardConfig. Out: Rewards: one number per sampled answer (judged right or not), and
one per image and question: the weighted sum of the run's sources, which are names in REWARDS or functions of the
user's (reward_functions.py). Only the source "detector" looks at anything but the model's own tokens and answers.

Source: UniRL (arXiv 2505.23380), section on GRPO; TRL's GRPOTrainer for adding several rewards up. Departures:
1. "probability" rewards (METHOD 4, soft self-reward); 2. several questions per image and several answers per question;
3. where no source applies to a sample (TRL: its reward is 0) it has none, and no part in its group's comparison;
4. sources say what images are worth; answers are always rewarded by the matcher's verdict on themselves.

Shapes: B images, J questions per image, K answers per question, Q = B*J*K samples (one per answer), H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from openunirl.config import RewardConfig, RolloutConfig
from openunirl.draws import Scoring, key
from openunirl.evaluation.geneval import judge_pictures
from openunirl.evaluation.run import to_uint8
from openunirl.models.protocol import UnifiedModel
from openunirl.reward_functions import Values, checked, load_function, user_rewards
from openunirl.rollout import Rollout, ask
from openunirl.tasks.worlds import World
from openunirl.types import AnswerSampling, ImageQuestion, Images, Targets
from openunirl.validate import check_weights


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """answer_Q: 0/1 per sampled answer; image_BJ: reward of each image by question, nan where no source applies;
    by_source: what each source gave [Q], unweighted, nan where it does not apply; targets: what the images were asked;
    full_BJ: what image_BJ would be had every source that applies said 1 (None: 1).

    Example: Rewards(answer_Q=tensor([1., 0.]), image_BJ=tensor([[1.], [0.]]), by_source={"self": tensor([1., 0.])},
    targets=Targets(...))
    """

    answer_Q: torch.Tensor
    image_BJ: torch.Tensor
    by_source: Mapping[str, torch.Tensor] = field(default_factory=dict)
    targets: Targets = field(default_factory=lambda: Targets(questions=(), gold=()))
    full_BJ: torch.Tensor | None = None

    @property
    def right_B(self) -> torch.Tensor:
        """bool: images of which every source says 1 for every question that any applies to, and for one at least."""
        full_BJ = torch.ones_like(self.image_BJ) if self.full_BJ is None else self.full_BJ
        unknown_BJ = self.image_BJ.isnan()
        return ((self.image_BJ >= full_BJ - 1e-4) | unknown_BJ).all(1) & ~unknown_BJ.all(1)

    @property
    def image_B(self) -> torch.Tensor:
        """Reward of each image, nan where no source applies to it."""
        return self.image_BJ.nanmean(1)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a source gets. Example: REWARDS["self"](Judged(model=..., rollout=..., ...)) == [1.0, 0.0]"""

    model: UnifiedModel
    rollout: Rollout
    world: World
    config: RewardConfig
    rollout_config: RolloutConfig
    answer_Q: torch.Tensor
    """The matcher's verdicts on the rollout's own answers."""

    @cached_property
    def columns(self) -> dict[str, Sequence[Any]]:
        """One entry per sample, without the images."""
        rollout, asked = self.rollout, self.rollout.answers.questions
        prompts = [rollout.prompts[one.image // rollout.num_generations] for one in asked]
        return {
            "prompts": [prompt.prompt for prompt in prompts],
            "answers": rollout.answers.texts,
            "questions": [one.question for one in asked],
            "gold": rollout.gold,
            "tags": rollout.tags,
            "metadata": [prompt.metadata() for prompt in prompts],
            "image_indices": [one.image for one in asked],
        }

    @cached_property
    def pictures_BHWC(self) -> np.ndarray:
        """The decoded images, uint8, as the evaluation sees them."""
        parts = self.rollout.images.tokens_BN.split(self.rollout_config.batch_size)
        return np.concatenate([to_uint8(self.model.decode(Images(tokens_BN=part))) for part in parts])


# ----------------------------------------------------------------------------------------------- the sources


def self_reward(judged: Judged) -> Values:
    """The current model's own answer, right or not (the paper), or its probability of the gold answer."""
    return _gold_probability(judged) if judged.config.kind == "probability" else judged.answer_Q.tolist()


def frozen_reward(judged: Judged) -> Values:
    """The same of the frozen base: a judge that training does not change."""
    rollout, limits = judged.rollout, judged.rollout_config
    with judged.model.reference():
        if judged.config.kind == "probability":
            return _gold_probability(judged)
        per_image = rollout.num_questions * rollout.num_answers
        keys_Q = rollout.scoring_seeds_B.repeat_interleave(per_image)
        seeds_Q = key(keys_Q, Scoring.FROZEN_JUDGE, torch.arange(per_image).repeat(len(rollout.images.prompts)))
        sampling = AnswerSampling(max_new_tokens=limits.max_new_tokens, temperature=limits.answer_temperature)
        asked = rollout.answers.questions
        answers = ask(judged.model, rollout.images.images, asked, seeds_Q, sampling, limits.batch_size)
    return judge_answers(judged.world, rollout, answers.texts).tolist()


def detector_reward(judged: Judged) -> Values:
    """GenEval's verdict on the decoded image: 1 or 0 for every answer on it, None where the detector has no name for
    what the prompt asks for. The same detector evaluates the run, so its results say so
    (`report_numbers.detector_notice`)."""
    world, size = judged.world, judged.rollout_config.batch_size
    assert world.judge is not None  # check_sources
    per_image = judged.rollout.num_questions * judged.rollout.num_answers
    metadata, judge = judged.columns["metadata"][::per_image], world.judge()
    known = [b for b, record in enumerate(metadata) if world.can_judge(record)]
    worth: list[float | None] = [None] * len(metadata)
    for start in range(0, len(known), size):
        part = known[start : start + size]
        verdicts = judge_pictures(judge, [metadata[b] for b in part], [judged.pictures_BHWC[b] for b in part])
        for b, verdict in zip(part, verdicts, strict=True):
            worth[b] = float(verdict.correct)
    return [value for value in worth for _ in range(per_image)]


REWARDS: dict[str, Callable[[Judged], Values]] = {
    "self": self_reward,
    "frozen": frozen_reward,
    "detector": detector_reward,
}


def judge_answers(world: World, rollout: Rollout, texts: Sequence[str]) -> torch.Tensor:
    """1 where the world's matcher calls an answer right, else 0: float32 [Q]."""
    return torch.tensor([float(world.match(*row).same) for row in zip(rollout.tags, rollout.gold, texts, strict=True)])


@torch.no_grad()
def _gold_probability(judged: Judged) -> Values:
    """Length-normalised probability of each gold answer; the K samples of a question share it."""
    rollout, count = judged.rollout, judged.rollout.num_answers
    questions, gold = rollout.answers.questions[::count], rollout.gold[::count]
    scores = judged.model.score_answers(rollout.images.images, questions, gold)
    mean = scores.logprobs_QT.sum(1) / scores.mask_QT.sum(1)
    return mean.exp().repeat_interleave(count).tolist()


# ------------------------------------------------------------------------------------------------- the score


def score(
    model: UnifiedModel, rollout: Rollout, world: World, config: RewardConfig, rollout_config: RolloutConfig
) -> Rewards:
    """Both halves' rewards. Errors: ValueError naming the source and the sample for a bad result of a source."""
    answer_Q = judge_answers(world, rollout, rollout.answers.texts)
    judged = Judged(
        model=model, rollout=rollout, world=world, config=config, rollout_config=rollout_config, answer_Q=answer_Q
    )
    by_source = {short_name(source): _values(source, judged) for source in config.sources}
    values_SQ = torch.stack(list(by_source.values()))
    weights_S1 = torch.tensor(config.weights or [1.0] * len(by_source))[:, None]
    none_Q = values_SQ.isnan().all(0)
    image_Q = (values_SQ * weights_S1).nansum(0).masked_fill(none_Q, math.nan)
    full_Q = (weights_S1 * ~values_SQ.isnan()).sum(0).masked_fill(none_Q, math.nan)
    table = (len(rollout.images.prompts), rollout.num_questions, rollout.num_answers)
    targets = Targets(questions=rollout.answers.questions, gold=rollout.gold)
    return Rewards(
        answer_Q=answer_Q,
        image_BJ=image_Q.view(table).nanmean(-1),
        by_source=by_source,
        targets=targets,
        full_BJ=full_Q.view(table).nanmean(-1),
    )


def _values(source: str, judged: Judged) -> torch.Tensor:
    if source in REWARDS:
        values = checked(source, REWARDS[source](judged), judged.columns)
    else:
        pictures = [Image.fromarray(picture) for picture in judged.pictures_BHWC]
        images = [pictures[image] for image in judged.columns["image_indices"]]
        values = user_rewards(source, {**judged.columns, "images": images})
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)


def short_name(source: str) -> str:
    """A source in metrics, as in TRL. Example: short_name("my.module:red_share") == "red_share"."""
    return source.rpartition(":")[2]


def check_sources(config: RewardConfig, world: World) -> None:
    """Before anything is loaded or written. Errors: ValueError for sources or weights that cannot work."""
    names = [short_name(source) for source in config.sources]
    known = f"{', '.join(REWARDS)}, or module:function"
    if not names:
        raise ValueError(f"--reward.sources is empty: name one or more of {known}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"--reward.sources: two of them are called {twice[0]!r}, and metrics could not tell them apart"
        )
    check_weights(config)
    for source in config.sources:
        if ":" in source:
            load_function(source)
        elif source not in REWARDS:
            raise ValueError(f"--reward.sources: unknown reward {source!r}; known: {known}")
    if "detector" in config.sources and world.judge is None:
        raise ValueError(
            f"--reward.sources detector: the world {world.label} has no detector; give --photos.detector-weights, or "
            "use self or frozen"
        )


def shuffled(rewards: Rewards, rollout: Rollout, *, followed: bool) -> Rewards:
    """The control: rewards exchanged among this process's images, and among its answers, by a keyed permutation (it may
    leave an image its reward: over all permutations the mean advantage is 0). Where the reward's own gradient is
    `followed`, each image is asked what only other prompts ask, never a question with the gold answer of its own.

    Errors: ValueError where no other prompt asks anything else.
    """
    seeds_B = rollout.scoring_seeds_B
    image_order = key(seeds_B, Scoring.SHUFFLED_IMAGES).argsort()
    per_image = len(rewards.answer_Q) // len(seeds_B)
    row_Q = torch.arange(len(rewards.answer_Q))
    answer_order = key(seeds_B.repeat_interleave(per_image), Scoring.SHUFFLED_ANSWERS, row_Q).argsort()
    return replace(
        rewards,
        answer_Q=rewards.answer_Q[answer_order],
        image_BJ=rewards.image_BJ[image_order],
        full_BJ=None if rewards.full_BJ is None else rewards.full_BJ[image_order],
        targets=_targets_of_others(rewards.targets, rollout) if followed else rewards.targets,
    )


def _targets_of_others(targets: Targets, rollout: Rollout) -> Targets:
    """For each question on an image one of the step's other prompts', drawn by key; its K answers share it."""
    asked = [(one.question, gold) for one, gold in zip(targets.questions, targets.gold, strict=True)]
    distinct = list(dict.fromkeys(asked))
    foreign = []  # by prompt
    for prompt in rollout.prompts:
        own = {(question.question, question.answer) for question in prompt.questions}
        foreign.append([pair for pair in distinct if pair not in own])
        if not foreign[-1]:
            raise ValueError(
                f"--reward.shuffle: the other prompts of this step ask nothing but what {prompt.prompt!r} asks, too; "
                "give more --rollout.num-prompts, or prompts that differ"
            )
    drawn = []
    for b in range(len(rollout.scoring_seeds_B)):
        pool = foreign[b // rollout.num_generations]
        for j in range(rollout.num_questions):
            pick = int(key(rollout.scoring_seeds_B[b], Scoring.SHUFFLED_TARGETS, j)) % len(pool)
            drawn += [(b, *pool[pick])] * rollout.num_answers
    return Targets(
        questions=tuple(ImageQuestion(image=b, question=question) for b, question, _ in drawn),
        gold=tuple(gold for _, _, gold in drawn),
    )
