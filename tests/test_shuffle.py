"""The control: who gets whose reward, what its images are asked, and which settings it cannot control."""

from dataclasses import replace

import pytest
import torch

from openunirl.config import LossConfig, RewardConfig, RolloutConfig
from openunirl.draws import Scoring, key
from openunirl.presets import PRESETS
from openunirl.rewards import Rewards, score, shuffled
from openunirl.rollout import roll_out
from openunirl.tasks import shapes
from openunirl.tasks.worlds import WORLDS
from openunirl.types import ImageSampling, Targets
from openunirl.validate import check

ROLLOUT = RolloutConfig(
    num_prompts=2,
    num_generations=3,
    num_questions=2,
    num_answers=2,
    sampling=ImageSampling(num_timesteps=3),
    max_new_tokens=3,
)  # 6 images, 12 questions, 24 answers


@pytest.fixture(scope="module")
def rollout(model):
    return roll_out(model, shapes.prompts("train", 2, 0), ROLLOUT, seed=1, step=1)


def asked(rollout):
    return Targets(questions=rollout.answers.questions, gold=rollout.gold)


def test_shuffling_keeps_the_rewards_and_loses_their_owners(rollout):
    rewards = Rewards(answer_Q=torch.arange(24.0), image_BJ=torch.arange(12.0).view(6, 2), targets=asked(rollout))
    mixed = shuffled(rewards, rollout, followed=True)
    assert sorted(mixed.answer_Q.tolist()) == rewards.answer_Q.tolist()
    assert sorted(mixed.image_BJ[:, 0].tolist()) == rewards.image_BJ[:, 0].tolist()
    assert [row[1] - row[0] for row in mixed.image_BJ.tolist()] == [1.0] * 6  # an image's two rewards stay together
    assert not torch.equal(mixed.image_BJ, rewards.image_BJ)


@pytest.mark.parametrize("count", [2, 5])
def test_shuffled_no_image_is_asked_what_its_own_prompt_asks(model, count):
    """Else the control would follow an image's own reward with probability 1/P. Whatever the step, two prompts too."""
    config = replace(ROLLOUT, num_prompts=count, sampling=ImageSampling(num_timesteps=1), max_new_tokens=1)
    for step in range(3):
        rollout = roll_out(model, shapes.prompts("train", count, step), config, seed=1, step=step)
        rewards = Rewards(answer_Q=torch.zeros(12 * count), image_BJ=torch.zeros(3 * count, 2), targets=asked(rollout))
        targets = shuffled(rewards, rollout, followed=True).targets
        assert [one.image for one in targets.questions] == [b for b in range(3 * count) for _ in range(4)]
        pairs = [(one.question, gold) for one, gold in zip(targets.questions, targets.gold, strict=True)]
        assert pairs[::2] == pairs[1::2]  # the two answers to a question share it
        assert len(set(pairs)) > count  # and the images of a prompt are not all asked the same
        for one, pair in zip(targets.questions, pairs, strict=True):
            assert pair not in {(q.question, q.answer) for q in rollout.prompts[one.image // 3].questions}
            assert pair in {(q.question, gold) for q, gold in zip(rollout.answers.questions, rollout.gold, strict=True)}


def test_prompts_that_all_ask_the_same_cannot_be_shuffled(rollout):
    first = rollout.gold[:4] * 6
    questions = tuple(replace(one, question=rollout.answers.questions[q % 4].question)
                      for q, one in enumerate(rollout.answers.questions))  # fmt: skip
    same = replace(rollout, prompts=rollout.prompts[:1] * 2, gold=first)
    rewards = Rewards(
        answer_Q=torch.zeros(24), image_BJ=torch.zeros(6, 2), targets=Targets(questions=questions, gold=first)
    )
    with pytest.raises(ValueError, match=r"--reward\.shuffle: the other prompts .* --rollout\.num-prompts"):
        shuffled(rewards, same, followed=True)
    assert shuffled(rewards, same, followed=False).targets == rewards.targets  # no gradient follows them


def test_the_frozen_judge_has_draws_of_its_own(model, rollout, monkeypatch):
    """No use of a scoring seed shares its stream with another: not the judge's answers with the scored steps."""
    from openunirl.models.showo import Showo

    seen, real = [], Showo.sample_answers
    monkeypatch.setattr(Showo, "sample_answers", lambda self, *args: seen.append(args[2]) or real(self, *args))
    score(model, rollout, WORLDS["shapes"](), RewardConfig(sources=("frozen",)), ROLLOUT)
    streams = {int(k) for s in range(200) for k in key(rollout.scoring_seeds_B, s)}
    assert len(seen) == 1 and not streams & set(seen[0].tolist())
    named = [value for name, value in vars(Scoring).items() if name.isupper()]
    assert len(set(named)) == len(named) == 7


def test_where_the_control_controls_nothing_it_is_refused():
    preset = PRESETS["tiny-showo-grpo"]
    control = replace(preset, reward=RewardConfig(kind="probability", shuffle=True))
    check(control)
    followed = replace(control, loss=LossConfig(end_to_end=True, reward_coef=1.0))
    check(followed)
    check(replace(control, rollout=replace(preset.rollout, num_prompts=1)))  # images still exchange their rewards
    with pytest.raises(ValueError, match=r"--rollout\.num-prompts is 1: .*--reward\.shuffle.* at least 2"):
        check(replace(followed, rollout=replace(preset.rollout, num_prompts=1)))


@pytest.mark.parametrize("end_to_end", [False, True])
def test_gold_answers_cannot_be_shuffled(end_to_end):
    sft = replace(
        PRESETS["tiny-showo-sft"],
        reward=RewardConfig(shuffle=True),
        loss=LossConfig(method="sft", beta=0.0, end_to_end=end_to_end),
    )
    with pytest.raises(ValueError, match=r"--reward\.shuffle .* gold answers"):
        check(sft)
    check(replace(sft, loss=LossConfig(method="sft", beta=0.0, answer_coef=0.0)))  # images are kept by others' verdicts
