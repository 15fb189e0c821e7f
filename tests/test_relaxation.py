"""The straight-through Gumbel-softmax: its value, its gradient, and the distribution of its noise.

The statistical tests have fixed keys, so they give the same verdict on every run; the false-alarm rate stated with each
is the chance that a correct construction would have failed on keys picked blindly.
"""

import pytest
import torch
from torch.nn import functional as F

from openunirl.config import RelaxationConfig
from openunirl.draws import KeyedDraws, key, uniforms
from openunirl.models.masked import Estimator
from openunirl.models.policy import log_policy
from openunirl.models.tiny import build
from openunirl.relaxation import Relaxation, conditional_gumbel, plain_gumbel, relax_tokens, straight_through, tau_at
from openunirl.tasks import shapes
from openunirl.types import ImageSampling

COUNT = 40_000
CELLS = 4  # per code; 4^3 = 64 equally likely cells
CHI2_63 = 116.5  # chi-square, 63 degrees of freedom: 1 in 20,000 beyond


def policy(codes=3):
    """Log-probs of a guided, temperature-scaled policy, far from uniform."""
    logits = torch.randn(2, codes, generator=torch.Generator().manual_seed(1)) * 1.5
    return log_policy(logits, ImageSampling(temperature=0.7), 2.5)


def sampled(logp_1V, count=COUNT):
    """Tokens drawn from the policy, and the conditional noise for them."""
    logp_SV = logp_1V.double().expand(count, -1)
    keys_S = key(17, torch.arange(count))
    chosen_S = KeyedDraws(keys_S).tokens(0, logp_SV.exp()[:, None])[:, 0]
    uniform_SK = uniforms(key(keys_S, 5), 0, logp_1V.shape[1] + 1).double()
    return logp_SV, chosen_S, uniform_SK


def chi_square(noise_SV):
    """Of the joint counts of all codes' noise, each cut into cells of equal probability under Gumbel(0, 1)."""
    cell_SV = (torch.exp(-torch.exp(-noise_SV)) * CELLS).long().clamp(0, CELLS - 1)
    index_S = (cell_SV * CELLS ** torch.arange(noise_SV.shape[1])).sum(1)
    counts = torch.bincount(index_S, minlength=CELLS ** noise_SV.shape[1]).double()
    expected = len(noise_SV) / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


# ------------------------------------------------------------------------------------------------- distribution


def test_over_sampled_tokens_the_conditional_noise_is_independent_gumbel_noise():
    """The joint distribution of all codes' noise; false alarms 1 in 20,000."""
    logp_SV, chosen_S, uniform_SK = sampled(policy())
    noise_SV = conditional_gumbel(logp_SV, chosen_S, uniform_SK)
    assert chi_square(noise_SV) < CHI2_63


def test_given_the_token_the_noise_is_what_rejection_would_keep():
    """For each token: the joint counts of plain noise kept only where it has that argmax, against the conditional
    noise for that token. Two-sample chi-square; false alarms below 1 in 20,000 a token (at most 63 degrees)."""
    logp_1V = policy()
    perturbed = logp_1V.double() + plain_gumbel(uniforms(key(23, torch.arange(COUNT)), 0, 3).double())
    _, _, uniform_SK = sampled(logp_1V)
    for token in range(3):
        kept = (perturbed - logp_1V.double())[perturbed.argmax(1) == token]
        assert len(kept) > 500
        row = slice(0, len(kept))
        chosen_S = torch.full((len(kept),), token)
        drawn = conditional_gumbel(logp_1V.double().expand(len(kept), -1), chosen_S, uniform_SK[row])
        first, second = (
            torch.bincount(
                (((-torch.exp(-g)).exp() * CELLS).long().clamp(0, CELLS - 1) * CELLS ** torch.arange(3)).sum(1),
                minlength=CELLS**3,
            ).double()
            for g in (kept, drawn)
        )
        total = first + second
        statistic = ((first - second) ** 2 / total.clamp_min(1)).sum()
        assert float(statistic) < CHI2_63


def test_the_test_can_tell():
    """Noise conditioned on the wrong token, and noise that is not cut off at the largest, both fail by far."""
    logp_SV, chosen_S, uniform_SK = sampled(policy())
    assert chi_square(conditional_gumbel(logp_SV, (chosen_S + 1) % 3, uniform_SK)) > 10 * CHI2_63
    uncut_SV = plain_gumbel(uniform_SK[:, :3])
    largest_S1 = plain_gumbel(uniform_SK[:, 3:])
    uncut_SV = (logp_SV + uncut_SV).scatter(1, chosen_S[:, None], largest_S1) - logp_SV
    assert chi_square(uncut_SV) > 2 * CHI2_63


def test_the_sampled_token_is_the_largest():
    logp_SV, chosen_S, uniform_SK = sampled(policy(), 5000)
    perturbed_SV = logp_SV + conditional_gumbel(logp_SV, chosen_S, uniform_SK)
    largest_S = perturbed_SV.gather(1, chosen_S[:, None])[:, 0]
    assert (largest_S >= perturbed_SV.max(1).values - 1e-12).all()
    plain = (logp_SV + plain_gumbel(uniform_SK[:, :3])).argmax(1)
    assert (plain != chosen_S).float().mean() > 0.2


def test_a_hopeless_token_is_still_the_largest():
    """Log-probs far below what exp can hold."""
    logp = torch.tensor([[0.0, -200.0, -3000.0]]).log_softmax(-1)
    noise = conditional_gumbel(logp, torch.tensor([2]), torch.tensor([[0.5, 0.3, 0.9, 0.7]]))
    assert noise.isfinite().all() and (logp + noise).argmax() == 2


# ------------------------------------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("noise", ["conditional", "plain"])
def test_the_value_is_exactly_the_one_hot(noise, tau):
    logp_SV, chosen_S, _ = sampled(policy(), 300)
    relax = Relaxation(seeds_B=key(3, torch.arange(3)), tau=tau, noise=noise)
    y_SV = relax_tokens(logp_SV.float(), chosen_S, torch.arange(300), 100, relax)
    assert torch.equal(y_SV, F.one_hot(chosen_S, 3).float())


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_the_gradient_is_that_of_the_softmax(tau):
    """d(y.c)/dl = p * (c - p.c) / tau with the noise held fixed, by hand; through the policy's guidance, too."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2 * 5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    logp_SV = log_policy(logits, ImageSampling(temperature=0.7), 2.5)
    chosen_S = torch.tensor([0, 3, 6, 2, 2])
    noise_SV = conditional_gumbel(logp_SV.detach(), chosen_S, uniforms(key(1, torch.arange(5)), 0, 8).double())
    along_SV = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    (straight_through(logp_SV, chosen_S, noise_SV, tau) * along_SV).sum().backward()
    p_SV = ((logp_SV.detach() + noise_SV) / tau).softmax(-1)
    by_policy_SV = p_SV * (along_SV - (p_SV * along_SV).sum(1, keepdim=True)) / tau
    # the acting logits are (uncond + 2.5 * (cond - uncond)) / 0.7; log_softmax only shifts them
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:5], by_policy_SV * 2.5 / 0.7, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(logits.grad[5:], by_policy_SV * -1.5 / 0.7, atol=1e-12, rtol=1e-10)


def test_noise_is_keyed_by_image_and_token():
    """The same token alone, in another order or beside other images, is relaxed alike."""
    logp_SV = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1).requires_grad_()
    chosen_S, seeds_B = torch.arange(8) % 5, key(9, torch.arange(2))

    def gradient(rows, seeds, places):
        y_SV = relax_tokens(logp_SV[rows], chosen_S[rows], places, 4, Relaxation(seeds_B=seeds))
        return torch.autograd.grad((y_SV * torch.arange(5.0)).sum(), logp_SV)[0][rows]

    whole = gradient(torch.arange(8), seeds_B, torch.arange(8))
    rows = torch.tensor([5, 7])
    assert torch.equal(gradient(rows, seeds_B[1:], rows - 4), whole[rows])
    assert not torch.equal(gradient(rows, key(10, torch.arange(1)), rows - 4), whole[rows])


def test_schedules_by_hand():
    linear = RelaxationConfig(tau=1.0, final_tau=0.2, schedule="linear")
    assert [tau_at(linear, step, 5) for step in (1, 3, 5)] == pytest.approx([1.0, 0.6, 0.2])
    exponential = RelaxationConfig(tau=1.0, final_tau=0.25)
    assert [tau_at(exponential, step, 3) for step in (1, 2, 3)] == pytest.approx([1.0, 0.5, 0.25])
    assert tau_at(RelaxationConfig(tau=0.7), 9, 10) == 0.7 and tau_at(linear, 1, 1) == 1.0


def test_unknown_noise_is_named():
    with pytest.raises(ValueError, match="'gaussian'"):
        relax_tokens(
            torch.zeros(1, 2), torch.zeros(1).long(), torch.zeros(1).long(), 1,
            Relaxation(seeds_B=torch.zeros(1).long(), noise="gaussian"),  # type: ignore[arg-type]
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- at a model


@pytest.mark.parametrize("name", ["tiny-showo", "tiny-janus"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_rollout_relaxes_to_its_own_tokens(name, guidance):
    """Every token once over the passes, exactly its one-hot, zero where a pass scores nothing; and a gradient."""
    model = build(name, shapes.vocabulary(), seed=3)
    sampling = ImageSampling(num_timesteps=3, guidance_scale=guidance, temperature=0.8)
    seeds_B = key(1, torch.arange(2))
    rollout = model.sample_images(["a photo of a circle", "a photo of a red star"], seeds_B, sampling)
    total = torch.zeros(*rollout.tokens_BN.shape, model.num_codes)
    for one in model.scoring_passes(rollout, Estimator(), seeds_B):
        scores = model.score_images(rollout, one, relax=Relaxation(seeds_B=seeds_B))
        assert scores.onehots_BNV is not None
        assert (scores.onehots_BNV[~one.scored_BN] == 0).all()
        total = total + scores.onehots_BNV
        torch.testing.assert_close(scores.logprobs_BN, model.score_images(rollout, one).logprobs_BN, atol=0, rtol=0)
    assert torch.equal(total, F.one_hot(rollout.tokens_BN, model.num_codes).float())
    (total * torch.randn(model.num_codes, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert sum(float(p.grad.abs().sum()) for p in model.net.parameters() if p.grad is not None) > 0
