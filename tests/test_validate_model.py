"""What only the loaded model can tell about a configuration is told before anything is written."""

from dataclasses import replace

import pytest

from openunirl.config import EvalConfig, ModelConfig
from openunirl.models.tiny import build
from openunirl.presets import PRESETS
from openunirl.tasks import shapes
from openunirl.train import train
from openunirl.types import ImageSampling
from openunirl.validate_model import check_model


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
