"""GRPO's loss types and ratio levels, on a model that gives the log-probs it is told: numbers worked out by hand."""

import math

import pytest
import torch

from openunirl.config import LossConfig
from openunirl.experience import Experience
from openunirl.losses import Stats, Totals
from openunirl.objectives import Terms, loss_parts
from openunirl.types import ScorePass
from told import Told, untold_rollout

B, N = 6, 16


@pytest.fixture
def rollout():
    return untold_rollout(B, N)


BY_HAND = [
    # two answers of 1 and 3 tokens; ratios 1/2 | 2, 4, 1; advantages 1 and -1; epsilon 0.2; longest possible 4
    # token: losses -1/2 | 2, 4, 1
    ("grpo", "token", (-1 / 2 + 7 / 3) / 2),
    ("bnpo", "token", (-1 / 2 + 7) / 4),
    ("dapo", "token", (-1 / 2 + 7) / 4),
    ("dr_grpo", "token", (-1 / 2 + 7) / (2 * 4)),
    # sequence: ratios 1/2 | (2 * 4 * 1)^(1/3) = 2; losses -1/2 | 2, 2, 2
    ("grpo", "sequence", (-1 / 2 + 2) / 2),
    ("bnpo", "sequence", (-1 / 2 + 6) / 4),
    ("dapo", "sequence", (-1 / 2 + 6) / 4),
    ("dr_grpo", "sequence", (-1 / 2 + 6) / (2 * 4)),
]


@pytest.mark.parametrize(("kind", "level", "want"), BY_HAND)
def test_every_loss_type_and_ratio_level_by_hand(rollout, kind, level, want):
    old_QT = torch.tensor([[-1.0, 0, 0], [-2.0, -3.0, -1.5]], dtype=torch.float64)
    mask_QT = torch.tensor([[True, False, False], [True, True, True]])
    ratios = torch.tensor([[0.5, 1, 1], [2.0, 4.0, 1.0]], dtype=torch.float64)
    # the base gave the first token twice the policy's probability: k3 = 2 - log 2 - 1, and it is the policy elsewhere
    reference_QT = old_QT + ratios.log() + torch.tensor([[math.log(2), 0, 0], [0, 0, 0]], dtype=torch.float64)
    logp_QT = (old_QT + ratios.log()).requires_grad_()
    for beta in (0.0, 0.1):
        config = LossConfig(loss_type=kind, importance_sampling_level=level, beta=beta, image_coef=0.0, epsilon=0.2)
        experience = Experience(
            rollout=rollout,
            advantages_B=torch.zeros(6),
            advantages_Q=torch.tensor([1.0, -1.0]),
            passes=(),
            reference_answers=reference_QT,
            old_answers=old_QT,
        )
        totals = Totals(samples=2, tokens=4, max_length=4)
        on = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
        (loss,) = loss_parts(Told(logp_QT=logp_QT, mask_QT=mask_QT), experience, parts=1, terms=on)
        share = {"grpo": 1 / 2, "bnpo": 1 / 4, "dapo": 1 / 4, "dr_grpo": 1 / 8}[kind]
        assert loss.item() == pytest.approx(want + beta * share * (1 - math.log(2)), abs=1e-12)


@pytest.mark.parametrize(("level", "high", "low"), [("token", 0.0, 2 / 4), ("sequence", 0.0, 1 / 2)])
def test_what_was_clipped_is_told_of_each_half(rollout, level, high, low):
    """Ratios of two answers 1 | 1/2, 1/2, 1: clipped low are two tokens of four, and one sequence of two (advantages 1
    and -1); of six images' tokens, half of them in each of two passes, the first image's are all clipped high."""
    ratios_QT = torch.tensor([[1.0, 1, 1], [0.5, 0.5, 1.0]], dtype=torch.float64)
    logp_BN = torch.zeros(B, N, dtype=torch.float64)
    logp_BN[0] = math.log(2)
    even_BN = (torch.arange(N) % 2 == 0).expand(B, N)
    passes = tuple(
        ScorePass(shown_BN=~scored_BN, scored_BN=scored_BN, weight_BN=torch.ones(B, N))
        for scored_BN in (even_BN, ~even_BN)
    )
    experience = Experience(
        rollout=rollout,
        advantages_B=torch.ones(B).double(),
        advantages_Q=torch.tensor([1.0, -1.0]),
        passes=passes,
        reference_images=(logp_BN * 0,) * 2,
        reference_answers=torch.zeros(2, 3),
        old_images=(logp_BN * 0,) * 2,
        old_answers=torch.zeros(2, 3),
    )
    config, totals = LossConfig(importance_sampling_level=level), Totals(samples=2, tokens=4, max_length=4)
    on = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    mask_QT = torch.tensor([[True, False, False], [True, True, True]])
    list(loss_parts(Told(logp_BN=logp_BN, logp_QT=ratios_QT.log(), mask_QT=mask_QT), experience, parts=1, terms=on))
    means, count = on.stats.means(), (B * N, 4) if level == "token" else (B, 2)
    assert means["answer/clip_ratio/low_mean"] == pytest.approx(low) and means["answer/clip_ratio/high_mean"] == high
    assert means["image/clip_ratio/high_mean"] == pytest.approx(1 / B) and means["image/clip_ratio/low_mean"] == 0
    assert means["clip_ratio/low_mean"] == pytest.approx(low * count[1] / sum(count))
    assert means["clip_ratio/high_mean"] == pytest.approx(count[0] / B / sum(count))


def test_the_gradient_of_a_ratio_per_sequence_by_hand(rollout):
    """loss = 2 beside each of 3 tokens, mean 2; d(ratio)/d(logp) = ratio / 3 for each token; half the batch."""
    logp_QT = torch.tensor([[-1.0, 0, 0], [2.0, 4.0, 1.0]], dtype=torch.float64)
    logp_QT[1] = logp_QT[1].log()
    logp_QT.requires_grad_()
    config = LossConfig(importance_sampling_level="sequence", beta=0.0, image_coef=0.0)
    totals = Totals(samples=2, tokens=4, max_length=4)
    experience = Experience(
        rollout=rollout,
        advantages_B=torch.zeros(6),
        advantages_Q=torch.tensor([0.0, -1.0]),
        passes=(),
        reference_answers=torch.zeros(2, 3),
        old_answers=torch.zeros(2, 3),
    )
    on = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    model = Told(logp_QT=logp_QT, mask_QT=torch.tensor([[True, False, False], [True, True, True]]))
    (loss,) = loss_parts(model, experience, parts=1, terms=on)
    loss.backward()
    torch.testing.assert_close(logp_QT.grad, torch.tensor([[0.0, 0, 0], [1 / 3, 1 / 3, 1 / 3]]).double())


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_a_sequence_over_several_passes_equals_one_graph(rollout, kind, weight):
    """One ratio per image, its tokens scored by three passes (weight 1.5: by two of three): the gradient is that of the
    whole, although a pass at a time is back-propagated."""
    generator = torch.Generator().manual_seed(2)
    shape = (B, N)
    old_BN = -torch.rand(shape, generator=generator, dtype=torch.float64)
    logp_BN = (old_BN + 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    step_BN = torch.randint(0, 3, shape, generator=generator)
    step_BN[0] = 1  # an image whose tokens were all revealed at once
    passes = tuple(
        ScorePass(shown_BN=step_BN < k, scored_BN=step_BN == k, weight_BN=torch.full(shape, weight))
        for k in range(3 if weight == 1.0 else 2)
    )
    advantages_B = torch.linspace(-1, 1, 6).double()
    config = LossConfig(loss_type=kind, importance_sampling_level="sequence", beta=0.0, answer_coef=0.0, epsilon=0.05)
    experience = Experience(
        rollout=rollout,
        advantages_B=advantages_B,
        advantages_Q=torch.zeros(12),
        passes=passes,
        reference_images=tuple(old_BN * one.scored_BN for one in passes),
        old_images=tuple(old_BN * one.scored_BN for one in passes),
    )
    totals = Totals(samples=B, tokens=B * N, max_length=N)
    on = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    got = 0.0
    for part in loss_parts(Told(logp_BN=logp_BN), experience, parts=1, terms=on):
        part.backward()
        got += part.item()
    gradient, logp_BN.grad = logp_BN.grad.clone(), None

    weight_BN = sum(one.weight_BN * one.scored_BN for one in passes).double()
    length = N
    ratio_B = ((logp_BN - old_BN) * weight_BN).sum(1).div(length).exp()
    loss_B = -torch.minimum(ratio_B * advantages_B, ratio_B.clamp(0.95, 1.05) * advantages_B)
    loss_B.mean().backward()  # images are equally long, so all four normalisations are this one
    assert got == pytest.approx((loss_B * weight_BN.sum(1) / length).mean().item(), abs=1e-12)
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(gradient, logp_BN.grad, atol=1e-14, rtol=1e-10)
