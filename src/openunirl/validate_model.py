"""Checks what only the loaded model can tell: which samplings it can follow.

In: a model, and a RunConfig or an ImageSampling. Out: nothing, or a ValueError that names the flag. Before anything is
written, and blind to the family.
"""

from __future__ import annotations

from openunirl.config import RunConfig
from openunirl.models.protocol import UnifiedModel
from openunirl.types import ImageSampling


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
