"""Presets: a name on the command line -> a whole RunConfig. Bundled models: a name -> a folder inside the package.

In: nothing. Out: PRESETS and BUNDLED, visible dicts, torch-free. A preset fixes the model and the method; flags tweak
single fields. To add one, add an entry; `openunirl train NAME --help` shows it.
"""

from __future__ import annotations

from pathlib import Path

from openunirl.config import (
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from openunirl.types import ImageSampling

_TINY_SHOWO = ModelConfig(weights="tiny-showo", attn_implementation="eager")
# the base's best of timesteps x guidance x temperature on validation prompts (docs/experiments.md)
_TINY_SHOWO_EVAL = EvalConfig(sampling=ImageSampling(num_timesteps=16, guidance_scale=2.0, temperature=0.7))

PRESETS: dict[str, RunConfig] = {
    "tiny-showo-grpo": RunConfig(
        model=_TINY_SHOWO,
        output_dir="runs/tiny-showo-grpo",
        # Every step of the trajectory is scored: with two of eight the gradient is mostly noise. Against collusion the
        # base judges, and the answer half gets a small weight (docs/experiments.md).
        rollout=RolloutConfig(
            num_prompts=8,
            num_generations=8,
            num_questions=3,
            sampling=ImageSampling(num_timesteps=8, guidance_scale=1.5),
        ),
        reward=RewardConfig(sources=("frozen",), kind="probability"),
        loss=LossConfig(beta=0.02, answer_coef=0.02, num_scored_steps=0),
        optim=OptimConfig(lr=3e-4, decay=1.0),
        train=TrainConfig(max_steps=44, save_steps=22, eval_steps=22, mixed_precision="auto"),
        eval=_TINY_SHOWO_EVAL,
    ),
    "tiny-showo-sft": RunConfig(
        model=_TINY_SHOWO,
        output_dir="runs/tiny-showo-sft",
        # As many images a step as the GRPO preset, one per prompt (the paper), its own verdicts. Untuned.
        rollout=RolloutConfig(
            num_prompts=64,
            num_generations=1,
            num_questions=3,
            sampling=ImageSampling(num_timesteps=8, guidance_scale=1.5),
        ),
        loss=LossConfig(method="sft", beta=0.0, num_scored_steps=0),
        optim=OptimConfig(lr=1e-4, decay=1.0),
        train=TrainConfig(max_steps=44, save_steps=22, eval_steps=22, mixed_precision="auto"),
        eval=_TINY_SHOWO_EVAL,
    ),
}

TINY = ("tiny-showo", "tiny-janus")
"""What `openunirl pretrain` makes."""

BUNDLED: dict[str, str] = {"tiny-showo": "assets/tiny-showo"}
"""Models that come with the package: name -> folder, relative to the package."""


def bundled(name: str) -> str | None:
    """The folder of a bundled model, or None for any other name (a path or hub id, to be used as it is).

    Example: bundled("tiny-showo") ends in openunirl/assets/tiny-showo; bundled("./tiny-showo") is None.
    """
    return str(Path(__file__).parent / BUNDLED[name]) if name in BUNDLED else None
