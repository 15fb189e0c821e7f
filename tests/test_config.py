"""Configurations to JSON and back: what comes back, what is refused, and with which words."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openunirl.config import LossConfig, ModelConfig, OptimConfig, RunConfig, from_dict, to_dict
from openunirl.config_pretrain import PretrainConfig
from openunirl.presets import BUNDLED, PRESETS, bundled


def with_value(path, value):
    """A preset's JSON object with the field at the dotted path replaced."""
    values = json.loads(json.dumps(to_dict(PRESETS["tiny-showo-grpo"])))
    *parents, last = path.split(".")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), PretrainConfig(name="tiny-showo"), RunConfig(model=ModelConfig(weights="x"))]
)
def test_survives_json(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


@given(
    beta=st.floats(allow_nan=False),
    epsilon_high=st.none() | st.floats(allow_nan=False),
    scale=st.sampled_from(["group", "batch", "none"]),
    guided=st.booleans(),
)
def test_any_value_survives_json(beta, epsilon_high, scale, guided):
    config = LossConfig(beta=beta, epsilon_high=epsilon_high, scale_rewards=scale, logprob_guidance=guided)
    assert from_dict(LossConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_to_dict_is_a_copy():
    config = PRESETS["tiny-showo-grpo"]
    to_dict(config)["loss"]["beta"] = 7.0
    assert config.loss.beta != 7.0


def test_absent_fields_take_their_defaults():
    assert from_dict(RunConfig, {"model": {"weights": "x"}, "optim": {"lr": 3e-4}}) == RunConfig(
        model=ModelConfig(weights="x"), optim=OptimConfig(lr=3e-4)
    )


def test_lists_become_tuples_and_whole_numbers_are_numbers():
    config = from_dict(RunConfig, with_value("train.report_to", ["wandb", "trackio"]))
    assert config.train.report_to == ("wandb", "trackio")
    assert from_dict(RunConfig, with_value("train.report_to", [])).train.report_to == ()
    assert from_dict(RunConfig, with_value("loss.beta", 1)).loss.beta == 1.0


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("loss.bta", 0.1, ["config.loss: unknown field 'bta'", "beta"]),
        ("rollout.sampling.steps", 8, ["config.rollout.sampling: unknown field 'steps'", "num_timesteps"]),
        ("sed", 1, ["config: unknown field 'sed'", "seed"]),
        ("seed", 1.0, ["config.seed is 1.0", "int"]),
        ("seed", "1", ["config.seed is '1'", "int"]),
        ("seed", True, ["config.seed is True", "int"]),
        ("seed", None, ["config.seed is None", "int"]),
        ("loss.beta", "0.1", ["config.loss.beta is '0.1'", "float"]),
        ("loss.beta", False, ["config.loss.beta is False", "float"]),
        ("loss.epsilon_high", "no", ["config.loss.epsilon_high is 'no'", "float | None"]),
        ("reward.shuffle", 1, ["config.reward.shuffle is 1", "bool"]),
        ("reward.sources", "self", ["config.reward.sources is 'self'", "tuple"]),
        ("reward.weights", ["1"], ["config.reward.weights", "float"]),
        ("loss.estimator", "exact", ["'exact'", "trajectory", "remask", "full_mask"]),
        ("loss.estimator", ["remask"], ["config.loss.estimator", "trajectory"]),
        ("train.report_to", ["tensorbord"], ["'tensorbord'", "'tensorboard'", "'wandb'", "'trackio'"]),
        ("train.report_to", "wandb", ["config.train.report_to is 'wandb'", "tuple"]),
        ("model", "tiny-showo", ["config.model is 'tiny-showo'", "ModelConfig"]),
        ("seed", {"a": 1}, ["config.seed", "int"]),
    ],
)
def test_bad_values_are_named(path, value, words):
    with pytest.raises(ValueError) as caught:
        from_dict(RunConfig, with_value(path, value))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"config: the field 'model' is missing"):
        from_dict(RunConfig, {})
    with pytest.raises(ValueError, match=r"config\.model: the field 'weights' is missing"):
        from_dict(RunConfig, {"model": {}})


@pytest.mark.parametrize("config", PRESETS.values(), ids=list(PRESETS))
def test_presets_are_frozen_and_have_their_own_directory(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert sum(config.output_dir == other.output_dir for other in PRESETS.values()) == 1


def test_bundled_models_are_found_by_name_only():
    for name, folder in BUNDLED.items():
        found = bundled(name)
        assert found is not None and found.replace("\\", "/").endswith(f"openunirl/{folder}")
        assert bundled(f"./{name}") is None
    assert bundled("showlab/show-o") is None
