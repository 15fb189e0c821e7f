"""SFT on what the frozen base drew: who draws, what is kept, which answers are learned."""

from dataclasses import replace

import pytest
import torch

from openunirl.advantages import imitated
from openunirl.config import LoraConfig, LossConfig, RewardConfig, RolloutConfig
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals
from openunirl.models.masked import Estimator, scoring_passes
from openunirl.models.protocol import load_model
from openunirl.models.tiny import build
from openunirl.objectives import Terms, loss_parts
from openunirl.presets import PRESETS
from openunirl.rewards import Rewards
from openunirl.rollout import roll_out
from openunirl.tasks import shapes
from openunirl.types import ImageRollout, ImageSampling
from openunirl.validate import check

FAMILIES = ["tiny-showo", "tiny-janus"]
SAMPLING = ImageSampling(num_timesteps=3)
CAREFUL = ImageSampling(num_timesteps=3, guidance_scale=2.0, temperature=0.5)
ROLLOUT = RolloutConfig(num_prompts=2, num_generations=2, num_questions=2, sampling=SAMPLING, max_new_tokens=3)
BASE = replace(ROLLOUT, drawn_by="base", base_guidance_scale=2.0, base_temperature=0.5)
PRESET = PRESETS["tiny-showo-sft"]
SAMPLED = replace(PRESET.rollout, answer_temperature=1.0)


@pytest.fixture(scope="module", params=FAMILIES)
def moved(request):
    """A model whose policy has left its base."""
    model = build(request.param, shapes.vocabulary(), seed=5)
    model.freeze_reference()
    with torch.no_grad():
        for name, weight in model.net.named_parameters():
            if weight.ndim == 2:
                weight.mul_(3.0 if "head" in name else 1.4)
    return model


def drawn(model, config):
    return roll_out(model, shapes.prompts("train", 2, 0), config, seed=1, step=1)


def test_the_base_draws_with_its_own_setting_and_the_policy_is_scored_with_its_own(moved):
    ours, base = drawn(moved, ROLLOUT), drawn(moved, BASE)
    with moved.reference():
        want = drawn(moved, replace(ROLLOUT, sampling=CAREFUL))
    assert torch.equal(base.images.tokens_BN, want.images.tokens_BN)
    assert not torch.equal(base.images.tokens_BN, ours.images.tokens_BN)
    assert base.images.sampling == SAMPLING
    same = drawn(moved, replace(BASE, base_guidance_scale=None, base_temperature=None))
    with moved.reference():
        assert torch.equal(same.images.tokens_BN, drawn(moved, ROLLOUT).images.tokens_BN)


def test_the_policy_answers_even_where_the_base_draws(moved):
    base = drawn(moved, BASE)
    with moved.reference():
        base_answers = drawn(moved, replace(ROLLOUT, sampling=CAREFUL)).answers
    assert not torch.equal(base.answers.logprobs_QT, base_answers.logprobs_QT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_that_followed_lies_beside_the_policy_and_is_not_read_for_it(family, tmp_path):
    def fresh():
        model = build(family, shapes.vocabulary(), seed=5)
        model.freeze_reference()
        return model

    def shift(model, by):
        with torch.no_grad():
            for weight in model.net.parameters():
                weight.add_(by)

    model = fresh()
    shift(model, 0.01)
    model.sync_reference()
    shift(model, 0.02)
    model.save(tmp_path)
    model.save_reference(tmp_path)
    again, plain = fresh(), load_model(tmp_path)
    again.load_weights(tmp_path)
    again.load_reference(tmp_path)
    for read, want in ((again.net, model.net), (plain.net, model.net), (again.reference_net, model.reference_net)):
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), want.parameters(), strict=True))
    assert again.base_moved and not plain.base_moved

    untouched = fresh()
    untouched.save_reference(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_kept_answers_by_hand():
    rewards = Rewards(image_BJ=torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), answer_Q=torch.zeros(8))
    one = {"share": lambda total: total, "std": lambda values: float(values.std())}
    images_B, answers_Q = imitated(rewards, ROLLOUT, LossConfig(method="sft", gold_answers="kept"), **one)
    assert images_B.tolist() == [2.0, 0.0, 0.0, 2.0]
    assert answers_Q.tolist() == [2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0]


def test_answers_on_images_that_were_not_kept_leave_no_trace(moved):
    rollout = drawn(moved, BASE)
    config = LossConfig(method="sft", beta=0.0, gold_answers="kept", estimator="remask")
    experience = gather_experience(moved, rollout, torch.zeros(4), torch.zeros(8), config, temperature=1.0)
    totals = Totals(samples=8, tokens=24, max_length=3)
    terms = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    moved.net.zero_grad()
    for part in loss_parts(moved, experience, parts=1, terms=terms):
        part.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in moved.net.parameters())


def test_the_training_losss_weights_add_up_to_a_log_prob_on_average():
    """Every masked token weighs pi / 2: over many masks an image's weights add up to N, within 4 standard errors."""
    blank = torch.zeros(4000, 64, dtype=torch.int64)
    rollout = ImageRollout(
        prompts=("",) * 4000, tokens_BN=blank, reveal_step_BN=blank, logprobs_BN=blank.float(), sampling=SAMPLING
    )
    early = scoring_passes(rollout, Estimator(name="training_loss", mask_time=0.5), torch.arange(4000))[0]
    assert (early.scored_BN.sum(1) >= 45).all()  # cos(pi / 4) of 64
    assert abs(float((early.weight_BN * early.scored_BN).sum(1).mean()) - 64) < 1
    (even,) = scoring_passes(rollout, Estimator(name="training_loss"), torch.arange(4000))
    (same,) = scoring_passes(rollout, Estimator(name="remask"), torch.arange(4000))
    assert torch.equal(even.scored_BN, same.scored_BN) and not (even.scored_BN & even.shown_BN).any()
    total_B = (even.weight_BN * even.scored_BN).sum(1)
    assert abs(float(total_B.mean()) - 64) < 4 * float(total_B.std()) / 4000**0.5 + 0.5  # half a token of rounding
    assert even.weight_BN.unique().numel() == 1


@pytest.mark.parametrize("count", [1, 3])
def test_some_steps_of_the_trajectory_stand_for_all_of_them_on_average(count):
    """Over many draws a token of each of the four steps weighs 1, within 4 standard errors; none is scored twice."""
    steps_BN = torch.arange(4).expand(4000, 4)
    sampling = replace(SAMPLING, num_timesteps=4)
    rollout = ImageRollout(
        prompts=("",) * 4000,
        tokens_BN=steps_BN,
        reveal_step_BN=steps_BN,
        logprobs_BN=steps_BN.float(),
        sampling=sampling,
    )
    passes = scoring_passes(rollout, Estimator(num_scored_steps=count), torch.arange(4000))
    weight_BN = sum(one.weight_BN * one.scored_BN for one in passes)
    assert len(passes) == count and sum(one.scored_BN.int() for one in passes).max() == 1
    assert (abs(weight_BN.mean(0) - 1) < 4 * weight_BN.std(0) / 4000**0.5).all()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"rollout": replace(PRESET.rollout, drawn_by="policy")}, "--rollout.base-temperature is 0.7"),
        ({"rollout": replace(PRESET.rollout, base_guidance_scale=-1.0)}, "--rollout.base-guidance-scale is -1.0"),
        ({"reward": RewardConfig(kind="probability")}, "--reward.kind is probability"),
        ({"loss": LossConfig(), "rollout": SAMPLED}, "--rollout.drawn-by is base"),
        ({"loss": LossConfig(gold_answers="kept"), "rollout": ROLLOUT}, "--loss.gold-answers is kept"),
        ({"loss": replace(PRESET.loss, mask_time=0.0)}, "--loss.mask-time is 0.0"),
        ({"loss": replace(PRESET.loss, ref_model_sync_steps=-1)}, "--loss.ref-model-sync-steps is -1"),
        (
            {"loss": replace(PRESET.loss, ref_model_sync_steps=5), "lora": LoraConfig(rank=2)},
            "--loss.ref-model-sync-steps is 5 with --lora.rank 2",
        ),
        ({"loss": replace(PRESET.loss, estimator="trajectory")}, "--loss.mask-time is 0.5 with --loss.estimator"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_named(changed, named):
    check(PRESET)
    check(replace(PRESET, reward=RewardConfig(shuffle=True)))  # a control: images and answers of others are kept
    with pytest.raises(ValueError) as error:
        check(replace(PRESET, **changed))
    assert named in str(error.value)
