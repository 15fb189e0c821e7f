"""The four objectives on both families: end-to-end equals one graph, what is silent stays silent, halves add up."""

import json
import math
from dataclasses import replace

import pytest
import torch

from by_hand import loss_by_hand, passes_of
from openunirl.advantages import imitated
from openunirl.config import (
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RelaxationConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals
from openunirl.models.protocol import load_model
from openunirl.models.tiny import build
from openunirl.objectives import LOSSES, Terms, loss_parts
from openunirl.rewards import Rewards
from openunirl.rollout import roll_out
from openunirl.tasks import shapes
from openunirl.train import train
from openunirl.types import ImageSampling

FAMILIES = ["tiny-showo", "tiny-janus"]
OBJECTIVES = list(LOSSES)
SAMPLING = ImageSampling(num_timesteps=3, guidance_scale=2.0, temperature=0.8)
ROLLOUT = RolloutConfig(num_prompts=2, num_generations=2, num_questions=2, sampling=SAMPLING, max_new_tokens=3)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.linspace(1, -1, 8)
KEPT = torch.tensor([2.0, 0.0, 2.0, 0.0]), torch.ones(8)


@pytest.fixture(scope="module", params=FAMILIES)
def setting(request):
    """(model, rollout); the model is made larger so that probabilities are far from uniform."""
    model = build(request.param, shapes.vocabulary(), seed=5)
    with torch.no_grad():
        for name, weight in model.net.named_parameters():
            if weight.ndim == 2:
                weight.mul_(3.0 if "head" in name else 1.5)
    model.freeze_reference()
    return model, roll_out(model, shapes.prompts("train", 2, 0), ROLLOUT, seed=1, step=1)


def terms(rollout, config, stats=None):
    images, answers = rollout.images.tokens_BN, rollout.answers.mask_QT
    return Terms(
        config=config,
        image_totals=Totals(samples=len(images), tokens=images.numel(), max_length=images.shape[1]),
        answer_totals=Totals(samples=len(answers), tokens=float(answers.sum()), max_length=3),
        temperature=1.0,
        stats=stats or Stats(),
    )


def gradient_of(model):
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained(model)])


def trained(model):
    return [p for p in model.net.parameters() if p.requires_grad]


def run(model, rollout, config, advantages=None, parts=1):
    """(loss, gradient, means) of one update."""
    advantages = advantages or (KEPT if config.method == "sft" else ADVANTAGES)
    experience = gather_experience(model, rollout, *advantages, config, temperature=1.0, tau=0.7, parts=parts)
    model.net.zero_grad()
    on, loss = terms(rollout, config), 0.0
    for part in loss_parts(model, experience, parts=parts, terms=on):
        loss += float(part.detach())
        if part.requires_grad:
            part.backward()
    return loss, gradient_of(model), on.stats.means()


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "end_to_end"), OBJECTIVES)
def test_every_objective_trains(family, method, end_to_end, tmp_path, monkeypatch, capsys):
    """Two steps of the same loop, several prompts with one image each for SFT; the weights move and stay finite, and
    each step's relaxation reaches the model."""
    start = build(family, shapes.vocabulary(), seed=9)
    start.save(tmp_path / "model")
    score_images, relaxed = type(start).score_images, []

    def watched(model, *args, relax=None, **kwargs):
        relaxed.append(relax and (relax.tau, relax.noise))
        return score_images(model, *args, relax=relax, **kwargs)

    monkeypatch.setattr(type(start), "score_images", watched)
    out = train(
        RunConfig(
            model=ModelConfig(weights=str(tmp_path / "model")),
            output_dir=str(tmp_path / "run"),
            rollout=replace(ROLLOUT, num_prompts=4, num_generations=1 if method == "sft" else 2),
            reward=RewardConfig(kind="probability" if method == "grpo" else "answer"),  # else all rewards would be 0
            loss=LossConfig(
                method=method, end_to_end=end_to_end, beta=0.0 if method == "sft" else 0.1, num_iterations=2,
                relaxation=RelaxationConfig(tau=0.8, final_tau=0.5, noise="plain"),
            ),
            optim=OptimConfig(lr=1e-3, gradient_accumulation_steps=2),
            train=TrainConfig(max_steps=2, report_to=()),
            eval=EvalConfig(num_prompts=0),
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    unread = "warning: --rollout.sampling.num-timesteps 3 does nothing"
    assert (unread in capsys.readouterr().err) == start.draws_tokens_in_turn
    told = [one for one in dict.fromkeys(relaxed) if one is not None]
    assert told == ([(0.8, "plain"), (0.5, "plain")] if end_to_end else [])
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert ("kl" in lines[0]) == (method == "grpo") and ("answer/nll" in lines[0]) == (method == "sft")
    tuned = load_model(out / "checkpoints" / "step-000002")
    moved = [not torch.equal(a, b) for a, b in zip(start.net.parameters(), tuned.net.parameters(), strict=True)]
    assert any(moved) and all(line["grad_norm"] > 0 for line in lines)
    assert ("sft/kept_share" in lines[0]) == (method == "sft" and not end_to_end)
    if method == "grpo":
        assert all(line["reward_std"] > 0 and line["advantage_abs"] > 0 for line in lines)


# --------------------------------------------------------------------------------------------------- one graph


def one_graph(model, rollout, config):
    """(loss, gradient) of the plain graph, written down a second time (by_hand.py)."""
    loss = loss_by_hand(model, rollout, config, KEPT if config.method == "sft" else ADVANTAGES, tau=0.7)
    model.net.zero_grad()
    loss.backward()
    return loss.item(), gradient_of(model)


def far(gradient, want):
    return float((gradient - want).abs().max() / want.abs().max())


PASSES = {
    "all steps": ({"num_scored_steps": 0}, "conditional"),
    "two of three steps": ({"num_scored_steps": 2}, "plain"),
    "two masks": ({"estimator": "training_loss", "num_draws": 2, "mask_time": 0.5}, "conditional"),
    "two weighted masks": ({"estimator": "remask", "num_draws": 2}, "plain"),
}
"""Estimators, and noise; autoregressive models read the noise only."""


@pytest.mark.parametrize("method", ["grpo", "sft"])
@pytest.mark.parametrize("passes", PASSES)
def test_end_to_end_equals_one_graph(doubled, method, passes):
    """Replayed pass by pass, in one part and in two: within 1e-10 of the largest entry of the plain graph's
    gradient."""
    (model, rollout), (estimator, noise) = doubled, PASSES[passes]
    config = LossConfig(
        method=method, end_to_end=True, image_coef=0.7, answer_coef=1.3, beta=0.1 if method == "grpo" else 0.0,
        relaxation=RelaxationConfig(noise=noise), **estimator,
    )  # fmt: skip
    if model.draws_tokens_in_turn and config.num_draws > 1:  # scores exactly, whatever the estimator: as above
        (one,) = passes_of(model, rollout, config)
        assert one.scored_BN.all() and (one.weight_BN == 1).all()
        return
    loss, want = one_graph(model, rollout, config)
    for parts in (1, 2):
        got_loss, got, _ = run(model, rollout, config, parts=parts)
        assert got_loss == pytest.approx(loss, abs=1e-9)
        assert got.dtype == torch.float64 and want.abs().max() > 1e-3
        assert far(got, want) < 1e-10
    apart = run(model, rollout, replace(config, end_to_end=False, image_coef=0.7 * (method == "grpo")))[1]
    assert float((apart - want).norm() / want.norm()) > 1e-3  # the answers' gradient does reach the image tokens


@pytest.mark.parametrize("method", ["grpo", "sft"])
@pytest.mark.parametrize("guided", [True, False])
def test_apart_the_drawing_half_equals_one_graph(doubled, method, guided):
    """Scored as it acted, and as its conditional branch alone."""
    model, rollout = doubled
    config = LossConfig(
        method=method, answer_coef=0.0, beta=0.1 if method == "grpo" else 0.0, logprob_guidance=guided,
        estimator="trajectory" if guided else "remask", num_draws=2,
    )  # fmt: skip
    loss, want = one_graph(model, rollout, config)
    got_loss, got, _ = run(model, rollout, config)
    assert got_loss == pytest.approx(loss, abs=1e-9) and far(got, want) < 1e-10
    other = run(model, rollout, replace(config, logprob_guidance=not guided))[1]
    assert float((other - want).norm() / want.norm()) > 1e-2


# ----------------------------------------------------------------------------------------------- the invariants


@pytest.mark.parametrize("end_to_end", [False, True])
def test_first_step_has_ratio_one_and_kl_zero(setting, end_to_end):
    model, rollout = setting
    for level in ("token", "sequence"):
        for iterations in (1, 2):
            config = LossConfig(
                end_to_end=end_to_end, beta=0.1, num_iterations=iterations, importance_sampling_level=level,
                num_scored_steps=0, epsilon=0.0,
            )  # fmt: skip
            _, gradient, means = run(model, rollout, config)
            assert means["image/kl"] == 0 and means["answer/kl"] == 0
            assert means["clip_ratio/low_mean"] == 0 and means["clip_ratio/high_mean"] == 0  # epsilon is 0
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize("end_to_end", [False, True])
def test_it_has_them_in_parts_and_in_low_precision_too(setting, end_to_end, monkeypatch):
    """bfloat16 log-probs depend on the batch that they are computed in."""
    model, rollout = setting
    for net in (model.net, model.reference_net):
        monkeypatch.setattr(net, "forward", torch.autocast("cpu", torch.bfloat16)(net.forward))
    config = LossConfig(end_to_end=end_to_end, beta=0.1, num_iterations=2, num_scored_steps=0, epsilon=0.0)
    _, gradient, means = run(model, rollout, config, parts=4)
    assert means["image/kl"] == 0 and means["answer/kl"] == 0
    assert means["clip_ratio/low_mean"] == 0 and means["clip_ratio/high_mean"] == 0  # epsilon is 0
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("end_to_end", [False, True])
def test_no_advantage_gives_exactly_no_gradient(setting, end_to_end):
    model, rollout = setting
    config = LossConfig(end_to_end=end_to_end, beta=0.0, num_scored_steps=0)
    loss, gradient, _ = run(model, rollout, config, (torch.zeros(4), torch.zeros(8)))
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize(("method", "end_to_end"), OBJECTIVES)
def test_accumulation_changes_nothing(setting, method, end_to_end):
    model, rollout = setting
    config = LossConfig(method=method, end_to_end=end_to_end, beta=0.0 if method == "sft" else 0.1, num_scored_steps=0)
    whole = run(model, rollout, config)
    for parts in (2, 4):
        split = run(model, rollout, config, parts=parts)
        assert split[0] == pytest.approx(whole[0], abs=2e-5)
        assert float((split[1] - whole[1]).norm() / whole[1].norm()) < 1e-4


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_halves_add_up(setting, method):
    """Apart, the two coefficients switch the halves; end-to-end, image_coef=0 leaves understanding only."""
    model, rollout = setting
    config = LossConfig(method=method, beta=0.0, num_scored_steps=0)
    both = run(model, rollout, config)[1]
    images = run(model, rollout, replace(config, answer_coef=0.0))[1]
    answers = run(model, rollout, replace(config, image_coef=0.0))[1]
    assert float((images + answers - both).norm() / both.norm()) < 1e-5
    for end_to_end in (False, True):
        alone = run(model, rollout, replace(config, end_to_end=end_to_end, image_coef=0.0))[1]
        assert float((alone - answers).norm() / answers.norm()) < 1e-4


def test_end_to_end_grpo_without_answers_trains_images_as_apart(setting):
    model, rollout = setting
    config = LossConfig(answer_coef=0.0, beta=0.05)
    apart, coupled = (run(model, rollout, replace(config, end_to_end=e)) for e in (False, True))
    assert apart[0] == coupled[0] and torch.equal(apart[1], coupled[1])


def test_the_image_gradient_of_end_to_end_scales_with_image_coef(setting):
    model, rollout = setting
    config = LossConfig(method="sft", end_to_end=True, beta=0.0, num_scored_steps=0)
    zero, one, two = (run(model, rollout, replace(config, image_coef=c))[1] for c in (0.0, 1.0, 2.0))
    reached = one - zero
    assert reached.norm() > 1e-3 * one.norm()
    assert float((two - zero - 2 * reached).norm() / reached.norm()) < 1e-3


# -------------------------------------------------------------------------------------------------------- SFT


def test_sft_is_the_likelihood_of_gold_answers_and_kept_images(setting):
    """Against the sampler's own log-probs: images 0 and 2 were judged right, so their mean is the image loss."""
    model, rollout = setting
    config = LossConfig(method="sft", beta=0.0, num_scored_steps=0)
    image_loss = run(model, rollout, replace(config, answer_coef=0.0))[0]
    assert image_loss == pytest.approx(-rollout.images.logprobs_BN[[0, 2]].mean().item(), abs=2e-4)
    answer_loss = run(model, rollout, replace(config, image_coef=0.0))[0]
    with torch.no_grad():
        scores = model.score_answers(rollout.images.images, rollout.answers.questions, rollout.gold, support="full")
    want = -(scores.logprobs_QT.sum(1) / scores.mask_QT.sum(1)).mean()
    assert answer_loss == pytest.approx(want.item(), abs=1e-5)


def test_images_that_were_judged_wrong_leave_no_trace(setting):
    model, rollout = setting
    config = LossConfig(method="sft", beta=0.0, answer_coef=0.0, num_scored_steps=0)
    loss, gradient, _ = run(model, rollout, config, (torch.zeros(4), torch.ones(8)))
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("end_to_end", [False, True])
def test_images_without_a_weight_are_not_scored_and_are_not_missed(setting, end_to_end, monkeypatch):
    model, rollout = setting
    config = LossConfig(method="sft", end_to_end=end_to_end, beta=0.0, num_scored_steps=0)
    advantages = torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    sizes = []
    score_images = model.score_images

    def counting(images, *args, **kwargs):
        sizes.append(len(images.tokens_BN))
        return score_images(images, *args, **kwargs)

    monkeypatch.setattr(model, "score_images", counting)
    loss, gradient, _ = run(model, rollout, config, advantages)
    assert set(sizes) == {2}
    monkeypatch.setattr("openunirl.objectives.counted", lambda chunk, config: chunk)
    whole, expected, _ = run(model, rollout, config, advantages)
    assert set(sizes) == {2, 4} and loss == pytest.approx(whole, abs=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_what_is_imitated_by_hand():
    rewards = Rewards(image_BJ=torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.5]]), answer_Q=torch.zeros(8))
    one = {"share": lambda total: total, "std": lambda values: float(values.std())}
    images_B, answers_Q = imitated(rewards, ROLLOUT, LossConfig(method="sft"), **one)
    assert images_B.tolist() == [4.0, 0.0, 0.0, 0.0] and answers_Q.tolist() == [1.0] * 8
    nothing = Rewards(image_BJ=torch.zeros(4, 2), answer_Q=torch.zeros(8))
    assert imitated(nothing, ROLLOUT, LossConfig(method="sft"), **one)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("weights", "image_BJ", "full_BJ", "right"),
    [
        ("one source", [[1, 1], [1, 0]], [[1, 1], [1, 1]], [True, False]),
        ("two sources: one verdict of two is not enough", [[2, 2], [2, 1]], [[2, 2], [2, 2]], [True, False]),
        ("0.1 + 0.2 is not 0.3 in float32", [[0.1 + 0.2, 0.3]], [[0.3, 0.1 + 0.2]], [True]),
        ("half a weight", [[0.5, 0.5], [0.5, 0.0]], [[0.5, 0.5], [0.5, 0.5]], [True, False]),
        ("nothing is known of a question", [[1, math.nan], [0, math.nan]], [[1, math.nan]] * 2, [True, False]),
        ("nothing at all", [[math.nan, math.nan]], [[math.nan, math.nan]], [False]),
        ("a source that does not apply", [[2, 1], [1, 1]], [[2, 1], [2, 1]], [True, False]),
    ],
)
def test_which_images_were_judged_right(weights, image_BJ, full_BJ, right):
    rewards = Rewards(answer_Q=torch.zeros(4), image_BJ=torch.tensor(image_BJ), full_BJ=torch.tensor(full_BJ))
    assert rewards.right_B.tolist() == right


def test_end_to_end_parts_must_be_back_propagated_in_turn(setting):
    model, rollout = setting
    for method in ("grpo", "sft"):
        config = LossConfig(method=method, end_to_end=True, beta=0.0)
        experience = gather_experience(model, rollout, *ADVANTAGES, config, temperature=1.0, tau=0.7)
        parts = loss_parts(model, experience, parts=1, terms=terms(rollout, config))
        next(parts)
        with pytest.raises(RuntimeError, match="back-propagate a part before asking for the next"):
            next(parts)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_sft_steps_raise_the_gold_answers(setting, end_to_end):
    """A small step along the gradient lowers the answers' loss."""
    model, rollout = setting
    config = LossConfig(method="sft", end_to_end=end_to_end, beta=0.0, image_coef=0.0)
    before, gradient, _ = run(model, rollout, config)
    kept = {n: p.detach().clone() for n, p in model.net.named_parameters()}
    with torch.no_grad():
        for parameter in trained(model):
            if parameter.grad is not None:
                parameter -= 0.05 / float(gradient.norm()) * parameter.grad
    after = run(model, rollout, config)[0]
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            parameter.copy_(kept[name])
    assert after < before
