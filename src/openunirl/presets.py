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

PRESETS: dict[str, RunConfig] = {
    "tiny-showo-grpo": RunConfig(
        model=ModelConfig(weights="tiny-showo", attn_implementation="eager"),
        output_dir="runs/tiny-showo-grpo",
        # The better of two learning rates on validation prompts, one seed each (docs/experiments.md). Unguided
        # rollouts score the acting policy with one forward; the answer half gets a small weight against collusion.
        rollout=RolloutConfig(
            num_prompts=8, num_generations=8, num_questions=3, sampling=ImageSampling(num_timesteps=8)
        ),
        reward=RewardConfig(source="self", kind="probability"),
        loss=LossConfig(beta=0.02, answer_coef=0.2, num_scored_steps=2),
        optim=OptimConfig(lr=3e-4, decay=1.0),
        train=TrainConfig(max_steps=80, save_steps=20, eval_steps=20),
        # the base's best of timesteps x guidance x temperature on validation prompts (docs/experiments.md)
        eval=EvalConfig(sampling=ImageSampling(num_timesteps=16, guidance_scale=1.5)),
    ),
}

BUNDLED: dict[str, str] = {"tiny-showo": "assets/tiny-showo"}
"""Models that come with the package: name -> folder, relative to the package. `openunirl pretrain` makes them."""


def bundled(name: str) -> str | None:
    """The folder of a bundled model, or None for any other name (a path or hub id, to be used as it is).

    Example: bundled("tiny-showo") ends in openunirl/assets/tiny-showo; bundled("./tiny-showo") is None.
    """
    return str(Path(__file__).parent / BUNDLED[name]) if name in BUNDLED else None
