"""Checks what only the loaded model can tell: which samplings it can follow, and which options it reads.

In: a model, and a RunConfig or an ImageSampling. Out: nothing, a ValueError that names the flag, or sentences about
options that do nothing and words that mean nothing to it. Before anything is written, and blind to the family.
"""

from __future__ import annotations

from collections.abc import Iterable

from openunirl.config import LossConfig, RunConfig
from openunirl.models.protocol import UnifiedModel
from openunirl.types import ImageSampling

_STEPS = ("num_timesteps", "confidence_temperature")
_ESTIMATORS = ("estimator", "num_scored_steps", "num_draws", "mask_time")


def check_sampling_of(model: UnifiedModel, sampling: ImageSampling, flag: str = "--sampling") -> None:
    """Errors: ValueError for a sampling that this model cannot follow."""
    try:
        model.check_sampling(sampling)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def check_model(config: RunConfig, model: UnifiedModel) -> None:
    """Errors: ValueError for the first setting that this model cannot be trained or evaluated with."""
    check_sampling_of(model, config.rollout.sampling, "--rollout.sampling")
    check_sampling_of(model, config.eval.sampling, "--eval.sampling")
    steps, scored = config.rollout.sampling.num_timesteps, config.loss.num_scored_steps
    if config.loss.estimator == "trajectory" and scored > steps and not model.draws_tokens_in_turn:
        raise ValueError(
            f"--loss.num-scored-steps is {scored}, more than --rollout.sampling.num-timesteps {steps}; 0 scores all"
        )


def unread(config: RunConfig, model: UnifiedModel) -> list[str]:
    """A sentence about options that were changed and do nothing with this model; none where all are read."""
    if not model.draws_tokens_in_turn:
        draws, estimator = config.loss.num_draws, config.loss.estimator
        if draws == LossConfig().num_draws or estimator in ("remask", "training_loss"):
            return []
        return [f"--loss.num-draws {draws} does nothing: --loss.estimator {estimator} draws no random masks"]
    sections = (
        ("rollout.sampling", config.rollout.sampling, ImageSampling(), _STEPS),
        ("eval.sampling", config.eval.sampling, ImageSampling(), _STEPS),
        ("loss", config.loss, LossConfig(), _ESTIMATORS),
    )
    flags = [
        f"--{section}.{name.replace('_', '-')} {getattr(given, name)}"
        for section, given, default, names in sections
        for name in names
        if getattr(given, name) != getattr(default, name)
    ]
    if not flags:
        return []
    verb = "does" if len(flags) == 1 else "do"
    return [
        f"{', '.join(flags)} {verb} nothing: {config.model.weights} draws its tokens one after the other, and scores "
        "them exactly"
    ]


def unknown_words(model: UnifiedModel, weights: str, texts: Iterable[str], origin: str) -> list[str]:
    """A sentence on what the texts say that the model's tokenizer has no word for, if anything: a tiny model's knows
    its own world only. `origin`: where the texts are from."""
    words = model.unknown_words(texts)
    if not words:
        return []
    more = f" and {len(words) - 8} more" if len(words) > 8 else ""
    return [
        f"{origin}: the tokenizer of {weights} does not know the words {', '.join(words[:8])}{more}, so that the model "
        "cannot tell them apart: use words that it knows, or another model"
    ]
