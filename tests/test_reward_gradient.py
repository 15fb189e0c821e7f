"""The soft reward's own gradient at the relaxed image: it equals one graph's, and only what draws feels it."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from openunirl.config import LossConfig, RelaxationConfig, RewardConfig, RunConfig
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals
from openunirl.objectives import Terms, loss_parts
from openunirl.presets import PRESETS
from openunirl.types import Images, Targets
from openunirl.validate import check

CONFIG = LossConfig(
    end_to_end=True, answer_coef=0.0, beta=0.0, image_coef=0.7, reward_coef=1.5, num_scored_steps=0,
    relaxation=RelaxationConfig(tau=2.0),
)  # fmt: skip
NO_ADVANTAGE = torch.zeros(4), torch.zeros(8)
JUDGES = [{"self": 1.0}, {"frozen": 1.0}, {"self": 0.5, "frozen": 2.0}]


def asked(rollout):
    return Targets(questions=rollout.answers.questions, gold=rollout.gold)


def gradient_of(model):
    trained = [p for p in model.net.parameters() if p.requires_grad]
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])


def followed(model, rollout, config, judges, targets, parts=1):
    experience = gather_experience(model, rollout, *NO_ADVANTAGE, config, temperature=1.0, tau=2.0, targets=targets)
    model.net.zero_grad()
    images, answers = rollout.images.tokens_BN, rollout.answers.mask_QT
    terms = Terms(
        config=config,
        image_totals=Totals(samples=len(images), tokens=images.numel(), max_length=images.shape[1]),
        answer_totals=Totals(samples=len(answers), tokens=float(answers.sum()), max_length=3),
        temperature=1.0,
        stats=Stats(),
        judges=judges,
    )
    for part in loss_parts(model, experience, parts=parts, terms=terms):
        part.backward()
    return gradient_of(model), terms.stats


def one_graph(model, rollout, config, judges):
    """The same as a single graph: the image is a function of the weights, the judge's weights are constants."""
    experience = gather_experience(model, rollout, *NO_ADVANTAGE, config, temperature=1.0, tau=2.0)
    y_BNV = F.one_hot(rollout.images.tokens_BN, model.num_codes).double()
    for k, one in enumerate(experience.passes):
        soft_BNV = model.score_images(rollout.images, one, relax=experience.relaxations[k]).onehots_BNV
        y_BNV = y_BNV + config.image_coef * one.weight_BN.double()[..., None] * (soft_BNV - soft_BNV.detach())
    learner, base = model.net, model.reference_net
    loss = torch.zeros((), dtype=torch.float64)
    for source, weight in judges.items():
        judge = base
        if source == "self":  # a copy of the present weights, without gradient
            model.net = learner
            model.freeze_reference()
            judge = model.reference_net
        model.net = judge
        scores = model.score_answers(Images(onehots_BNV=y_BNV), rollout.answers.questions, rollout.gold)
        mean_Q = (scores.logprobs_QT * scores.mask_QT).sum(1) / scores.mask_QT.sum(1)
        loss = loss - config.reward_coef * weight * mean_Q.mean()
    model.net, model.reference_net = learner, base
    model.net.zero_grad()
    loss.backward()
    return gradient_of(model)


@pytest.mark.parametrize("judges", JUDGES, ids=["self", "frozen", "both"])
def test_it_equals_one_graph(doubled, judges):
    model, rollout = doubled
    want = one_graph(model, rollout, CONFIG, judges)
    assert want.abs().max() > 1e-6
    for parts in (1, 2):
        got, stats = followed(model, rollout, CONFIG, judges, asked(rollout), parts)
        assert float((got - want).abs().max() / want.abs().max()) < 1e-10
        assert stats.means()["reward/gold_logprob"] < 0


def test_who_judges_feels_nothing(doubled):
    model, rollout = doubled
    got, _ = followed(model, rollout, replace(CONFIG, image_coef=0.0), {"self": 1.0}, asked(rollout))
    assert (got == 0).all()


def test_other_targets_give_another_gradient(doubled):
    """What the control shuffles."""
    model, rollout = doubled
    own, _ = followed(model, rollout, CONFIG, {"frozen": 1.0}, asked(rollout))
    exchanged = replace(asked(rollout), gold=rollout.gold[4:] + rollout.gold[:4])
    other, _ = followed(model, rollout, CONFIG, {"frozen": 1.0}, exchanged)
    assert float((own - other).norm() / own.norm()) > 0.05


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": LossConfig(reward_coef=1.0, end_to_end=False)},
        {"reward": RewardConfig(kind="answer")},
        {"reward": RewardConfig(kind="probability", sources=("detector",))},
    ],
)
def test_where_there_is_no_such_gradient_it_is_refused(changed):
    preset = PRESETS["tiny-showo-grpo"]
    soft = replace(
        preset,
        loss=LossConfig(reward_coef=1.0, end_to_end=True),
        reward=RewardConfig(kind="probability", sources=("frozen",)),
    )
    check(soft)
    broken: RunConfig = replace(soft, **changed)
    with pytest.raises(ValueError, match=r"--loss\.reward-coef is 1\.0: it follows the gradient of a soft reward"):
        check(broken)


def test_weights_of_the_soft_judges():
    mixed = RewardConfig(kind="probability", sources=("frozen", "detector"), weights=(0.5, 2.0))
    assert mixed.soft_judges == {"frozen": 0.5}
    assert RewardConfig(kind="probability").soft_judges == {"self": 1.0}
    assert RewardConfig(kind="answer").soft_judges == {}
