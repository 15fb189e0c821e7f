"""The GRPO loss against hand-worked numbers, and the invariants that keep RL honest."""

import math
from dataclasses import replace

import pytest
import torch

from openunirl.advantages import answer_advantages, image_advantages
from openunirl.config import LossConfig, RolloutConfig
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals, clipped_loss, kl_k3, normalise
from openunirl.objectives import Terms, loss_parts
from openunirl.rollout import roll_out
from openunirl.tasks import shapes
from openunirl.types import ImageSampling

ROLLOUT = RolloutConfig(
    num_prompts=2, num_generations=3, num_questions=2, sampling=ImageSampling(num_timesteps=3), max_new_tokens=3
)


@pytest.fixture(scope="module")
def rollout(model):
    return roll_out(model, shapes.prompts("train", 2, 0), ROLLOUT, seed=1, step=1)


def terms(rollout, config, stats):
    images, answers = rollout.images.tokens_BN, rollout.answers.mask_QT
    return Terms(
        config=config,
        image_totals=Totals(samples=len(images), tokens=images.numel(), max_length=images.shape[1]),
        answer_totals=Totals(samples=len(answers), tokens=float(answers.sum()), max_length=3),
        temperature=1.0,
        stats=stats,
    )


def run(model, rollout, advantages_B, advantages_Q, config, parts=1):
    """(loss, gradient as one vector, stats) of one update."""
    experience = gather_experience(model, rollout, advantages_B, advantages_Q, config, temperature=1.0)
    model.net.zero_grad()
    stats, loss = Stats(), 0.0
    for part in loss_parts(model, experience, parts=parts, terms=terms(rollout, config, stats)):
        part.backward()
        loss += float(part.detach())
    gradients = [p.grad.flatten() for p in model.net.parameters() if p.grad is not None]
    return loss, torch.cat(gradients) if gradients else torch.zeros(1), stats.means()


# -------------------------------------------------------------------------------------------------- by hand


def test_k3_by_hand():
    # log-ratio of the reference log 2: 2 - log 2 - 1
    assert kl_k3(torch.tensor(-1.0), torch.tensor(-1.0 + math.log(2))).item() == pytest.approx(
        1 - math.log(2), abs=1e-6
    )
    assert kl_k3(torch.tensor(-1.3), torch.tensor(-1.3)).item() == 0


def test_clipping_by_hand():
    config = LossConfig(epsilon=0.2, epsilon_high=0.3)
    old = torch.zeros(4, 1)
    logp = torch.tensor([[1.5], [0.5], [1.5], [0.5]]).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, clips = clipped_loss(logp - old, advantages, config)
    # A > 0: min(ratio, 1.3) -> 1.3 and 0.5; A < 0: the worse of ratio and its clip -> 1.5 and 0.8
    torch.testing.assert_close(loss[:, 0], torch.tensor([-1.3, -0.5, 1.5, 0.8]))
    assert clips["clip_ratio/high_mean"][:, 0].tolist() == [1, 0, 0, 0]
    assert clips["clip_ratio/low_mean"][:, 0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("kind", "want"),
    # two answers of 1 and 3 tokens, losses 2 | 1 2 3: means 2 and 2 -> 2; 8/4 tokens -> 2; 8/(2*4) -> 1
    [("grpo", 2.0), ("bnpo", 2.0), ("dapo", 2.0), ("dr_grpo", 1.0)],
)
def test_normalisation_by_hand(kind, want):
    loss = torch.tensor([[2.0, 9.0, 9.0], [1.0, 2.0, 3.0]])
    weight = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    got = normalise(loss, weight, weight.sum(1), LossConfig(loss_type=kind), Totals(samples=2, tokens=4, max_length=4))
    assert got.item() == pytest.approx(want)


def test_grpo_and_token_means_differ_where_lengths_do():
    loss = torch.tensor([[4.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    weight = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    totals = Totals(samples=2, tokens=4, max_length=4)
    by_sample = normalise(loss, weight, weight.sum(1), LossConfig(loss_type="grpo"), totals)
    by_token = normalise(loss, weight, weight.sum(1), LossConfig(loss_type="dapo"), totals)
    assert (by_sample.item(), by_token.item()) == (2.5, 1.75)


# ----------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("estimator", ["trajectory", "remask", "training_loss", "full_mask"])
def test_first_step_has_ratio_one_and_kl_zero(model, rollout, estimator):
    config = LossConfig(estimator=estimator, num_scored_steps=2, beta=0.1, epsilon=0.0)  # any other ratio is clipped
    advantages_B, advantages_Q = torch.linspace(-1, 1, 6), torch.linspace(1, -1, 12)
    loss, gradient, stats = run(model, rollout, advantages_B, advantages_Q, config)
    assert stats["image/kl"] == 0 and stats["answer/kl"] == 0
    assert stats["clip_ratio/low_mean"] == 0 and stats["clip_ratio/high_mean"] == 0
    assert gradient.abs().sum() > 0 and math.isfinite(loss)
    # several inner steps record the old policy apart; at the first of them it is the policy, bit for bit
    experience = gather_experience(
        model, rollout, advantages_B, advantages_Q, replace(config, num_iterations=2), temperature=1.0
    )
    assert experience.old_images is not None and experience.old_answers is not None
    for old, reference in zip(experience.old_images, experience.reference_images, strict=True):
        assert torch.equal(old, reference)
    loss_again, gradient_again, _ = run(model, rollout, advantages_B, advantages_Q, replace(config, num_iterations=2))
    assert loss_again == loss and torch.equal(gradient_again, gradient)


def test_equal_rewards_give_exactly_no_policy_gradient(model, rollout):
    for value in (0.0, 1.0, 0.3):
        advantages_B = image_advantages(torch.full((6, 2), value), 3, "group")
        advantages_Q = answer_advantages(torch.full((12,), value), 3, 2, 1, "group")
        _, gradient, _ = run(model, rollout, advantages_B, advantages_Q, LossConfig(beta=0.0))
        assert (gradient == 0).all()


def test_zero_variance_leaves_the_kl(model, rollout):
    weight = next(p for n, p in model.net.named_parameters() if "fc1.weight" in n)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.2)
    _, gradient, stats = run(model, rollout, torch.zeros(6), torch.zeros(12), LossConfig(beta=0.5))
    with torch.no_grad():
        weight.copy_(kept)
    assert stats["image/kl"] > 0 and gradient.abs().sum() > 0


def test_levels_agree_at_the_first_step(model, rollout):
    """Where every ratio is 1, one per token and one per sequence have the same gradient."""
    advantages_B, advantages_Q = torch.linspace(-1, 1, 6), torch.linspace(1, -1, 12)
    for scored in (0, 2):
        config = LossConfig(num_scored_steps=scored)
        token = run(model, rollout, advantages_B, advantages_Q, config)
        sequence = run(
            model, rollout, advantages_B, advantages_Q, replace(config, importance_sampling_level="sequence")
        )
        assert sequence[0] == pytest.approx(token[0], abs=1e-6)
        torch.testing.assert_close(sequence[1], token[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_accumulation_changes_nothing(model, rollout, loss_type):
    config = LossConfig(loss_type=loss_type, num_scored_steps=0)
    advantages_B, advantages_Q = torch.linspace(-1, 1, 6), torch.linspace(1, -1, 12)
    whole = run(model, rollout, advantages_B, advantages_Q, config)
    for parts in (2, 3, 6):
        split = run(model, rollout, advantages_B, advantages_Q, config, parts=parts)
        assert split[0] == pytest.approx(whole[0], abs=1e-6)
        torch.testing.assert_close(split[1], whole[1], atol=1e-6, rtol=1e-4)


def test_accumulation_with_answers_of_different_lengths(model, rollout):
    """Parts whose longest answer is shorter than the batch's still meet their own reference and old log-probs."""
    mask_QT = rollout.answers.mask_QT.clone()
    mask_QT[:6, 1:] = False  # the first half of the images got one-token answers
    answers = replace(rollout.answers, mask_QT=mask_QT, logprobs_QT=rollout.answers.logprobs_QT * mask_QT)
    short = replace(rollout, answers=answers)
    advantages_B, advantages_Q = torch.linspace(-1, 1, 6), torch.linspace(1, -1, 12)
    config = LossConfig(num_iterations=2)
    whole = run(model, short, advantages_B, advantages_Q, config)
    split = run(model, short, advantages_B, advantages_Q, config, parts=2)
    assert split[0] == pytest.approx(whole[0], abs=1e-6)
    torch.testing.assert_close(split[1], whole[1], atol=1e-6, rtol=1e-4)


def test_only_the_group_without_variance_is_silent(model, rollout):
    """One prompt's images were all right, the other's were not: only the second trains."""
    rewards_BJ = torch.tensor([[1.0, 1.0]] * 3 + [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    advantages_B = image_advantages(rewards_BJ, 3, "group")
    assert (advantages_B[:3] == 0).all() and (advantages_B[3:] != 0).all()
    config = LossConfig(beta=0.0, answer_coef=0.0, num_scored_steps=0)
    both = run(model, rollout, advantages_B, torch.zeros(12), config)[1]
    other = torch.cat([torch.zeros(3), advantages_B[3:]])
    assert torch.equal(both, run(model, rollout, other, torch.zeros(12), config)[1])
    assert both.abs().sum() > 0


def test_the_second_inner_step_compares_with_the_first(model, rollout):
    """After an update the ratio of the recorded old policy is no longer 1, and equals exp(new - old)."""
    config = LossConfig(num_iterations=2, beta=0.0, num_scored_steps=0, epsilon=1e-4)
    advantages_B, advantages_Q = torch.linspace(-1, 1, 6), torch.linspace(1, -1, 12)
    experience = gather_experience(model, rollout, advantages_B, advantages_Q, config, temperature=1.0)
    weight = next(p for n, p in model.net.named_parameters() if "fc1.weight" in n)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.1)
    stats = Stats()
    list(loss_parts(model, experience, parts=1, terms=terms(rollout, config, stats)))
    with torch.no_grad():
        new = model.score_images(rollout.images, experience.passes[0]).logprobs_BN
        weight.copy_(kept)
    ratio = (new - experience.old_images[0]).exp()[experience.passes[0].scored_BN]
    assert (ratio - 1).abs().max() > 1e-4
    clipped = stats.means()
    assert clipped["clip_ratio/low_mean"] + clipped["clip_ratio/high_mean"] > 0.1


def test_one_sided_training(model, rollout):
    advantages_B, advantages_Q = torch.linspace(-1, 1, 6), torch.linspace(1, -1, 12)
    both = run(model, rollout, advantages_B, advantages_Q, LossConfig())[1]
    images = run(model, rollout, advantages_B, advantages_Q, LossConfig(answer_coef=0))[1]
    answers = run(model, rollout, advantages_B, advantages_Q, LossConfig(image_coef=0))[1]
    torch.testing.assert_close(images + answers, both, atol=1e-6, rtol=1e-4)


def test_the_gradient_raises_what_was_rewarded(model, rollout):
    config = LossConfig(beta=0.0, answer_coef=0.0, num_scored_steps=0)
    advantages_B = torch.tensor([1.0, 0, 0, 0, 0, 0])

    def logprob():
        experience = gather_experience(model, rollout, advantages_B, torch.zeros(12), config, temperature=1.0)
        with torch.no_grad():
            scores = [model.score_images(rollout.images, one).logprobs_BN for one in experience.passes]
        return float(sum(scores)[0].sum())

    before = logprob()
    run(model, rollout, advantages_B, torch.zeros(12), config)
    kept = {n: p.detach().clone() for n, p in model.net.named_parameters()}
    with torch.no_grad():
        for parameter in model.net.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    after = logprob()
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            parameter.copy_(kept[name])
    assert after > before


@pytest.mark.parametrize("size", [2, 5])  # at 5 two parts ask about the same image
def test_a_rollout_does_not_depend_on_its_batching(model, size):
    prompts = shapes.prompts("train", 2, 0)
    whole = roll_out(model, prompts, ROLLOUT, seed=1, step=1)
    small = roll_out(model, prompts, replace(ROLLOUT, batch_size=size), seed=1, step=1)
    second = roll_out(model, prompts[1:], ROLLOUT, seed=1, step=1, first_prompt=1)
    assert torch.equal(whole.images.tokens_BN, small.images.tokens_BN)
    assert whole.answers.texts == small.answers.texts and whole.answers.questions == small.answers.questions
    assert torch.equal(whole.answers.mask_QT, small.answers.mask_QT)
    mask_QT = whole.answers.mask_QT
    assert torch.equal(whole.answers.tokens_QT[mask_QT], small.answers.tokens_QT[mask_QT])
    torch.testing.assert_close(whole.answers.logprobs_QT, small.answers.logprobs_QT, atol=2e-5, rtol=0)
    assert torch.equal(whole.images.tokens_BN[3:], second.images.tokens_BN)
    assert whole.answers.texts[6:] == second.answers.texts
