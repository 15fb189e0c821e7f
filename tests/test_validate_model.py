"""What only the loaded model can tell about a configuration is told before anything is written."""

from dataclasses import replace

import pytest

from openunirl.config import EvalConfig, ModelConfig
from openunirl.models.protocol import load_model
from openunirl.models.tiny import build
from openunirl.presets import PRESETS
from openunirl.tasks import shapes
from openunirl.train import train
from openunirl.types import ImageSampling
from openunirl.validate import check
from openunirl.validate_model import check_model, unread


@pytest.fixture(scope="module", params=["tiny-showo", "tiny-janus"])
def model(request):
    return build(request.param, shapes.vocabulary(), seed=9)


def preset(model, **parts):
    """One for the model's way of drawing, with other parts."""
    of = "janus-pro-1b-grpo" if model.draws_tokens_in_turn else "tiny-showo-grpo"
    return replace(PRESETS[of], model=ModelConfig(weights="here"), **parts)


@pytest.mark.parametrize("section", ["rollout", "eval"])
def test_both_samplings_are_checked_against_the_model(model, section):
    config = preset(model)
    check_model(config, model)
    changed = replace(getattr(config, section), sampling=ImageSampling(top_p=0.0))
    with pytest.raises(ValueError, match=rf"--{section}\.sampling: .*top_p=0.0"):
        check_model(replace(config, **{section: changed}), model)


def test_a_run_that_could_not_be_evaluated_leaves_no_directory(tmp_path):
    build("tiny-showo", shapes.vocabulary(), seed=9).save(tmp_path / "model")
    config = replace(
        PRESETS["tiny-showo-grpo"],
        model=ModelConfig(weights=str(tmp_path / "model")),
        output_dir=str(tmp_path / "run"),
        eval=EvalConfig(sampling=ImageSampling(top_k=5)),
    )
    with pytest.raises(ValueError, match=r"--eval\.sampling: top_k=5 must be 0"):
        train(config)
    assert not (tmp_path / "run").exists()


def with_steps(config, scored, steps):
    sampling = replace(config.rollout.sampling, num_timesteps=steps)
    return replace(
        config,
        rollout=replace(config.rollout, sampling=sampling),
        loss=replace(config.loss, num_scored_steps=scored),
    )


def test_more_steps_than_there_are_cannot_be_scored_by_a_model_that_draws_in_steps(model):
    config = with_steps(preset(model), scored=9, steps=2)
    check(config)
    check_model(with_steps(config, scored=2, steps=2), model)
    if model.draws_tokens_in_turn:
        return check_model(config, model)  # it reads neither
    with pytest.raises(
        ValueError, match=r"--loss\.num-scored-steps is 9, more than --rollout\.sampling\.num-timesteps 2"
    ):
        check_model(config, model)


UNREAD = {
    "--rollout.sampling.num-timesteps 3": {"rollout": {"sampling": ImageSampling(num_timesteps=3)}},
    "--eval.sampling.confidence-temperature 4.5": {"eval": {"sampling": ImageSampling(confidence_temperature=4.5)}},
    "--loss.estimator remask": {"loss": {"estimator": "remask"}},
    "--loss.num-scored-steps 1": {"loss": {"num_scored_steps": 1}},
    "--loss.num-draws 2": {"loss": {"num_draws": 2}},
    "--loss.mask-time 0.5": {"loss": {"estimator": "training_loss", "mask_time": 0.5}},
}


@pytest.mark.parametrize("flag", UNREAD)
def test_options_that_do_nothing_are_told(model, flag):
    config = preset(model)
    assert unread(config, model) == []
    for section, values in UNREAD[flag].items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    told = " ".join(unread(config, model))
    if model.draws_tokens_in_turn:
        assert flag in told and "nothing: here draws its tokens one after the other" in told
    else:
        assert told == (
            f"{flag} does nothing: --loss.estimator trajectory draws no random masks" if "draws" in flag else ""
        )


def test_random_masks_are_read_where_they_are_drawn(model):
    config = preset(model)
    config = replace(config, loss=replace(config.loss, estimator="training_loss", num_draws=2))
    assert bool(unread(config, model)) == model.draws_tokens_in_turn


def test_roles_are_refused_where_no_prompt_has_any():
    with pytest.raises(ValueError, match=r"leave --model\.roles out"):
        load_model(ModelConfig(weights="tiny-showo", roles=("User", "Assistant")))
