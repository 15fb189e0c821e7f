"""Presets: a name on the command line -> a whole RunConfig. Bundled models: a name -> a folder inside the package.

In: nothing. Out: PRESETS and BUNDLED, visible dicts, torch-free. A preset fixes the model and the method; flags tweak
single fields. To add one, add an entry; `openunirl train NAME --help` shows it.
"""

from __future__ import annotations

from dataclasses import replace
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
from openunirl.presets_real import REAL_PRESETS
from openunirl.types import ImageSampling

_TINY_SHOWO = ModelConfig(weights="tiny-showo", attn_implementation="eager")
# the base's best of timesteps x guidance x temperature on validation prompts (docs/experiments.md)
_TINY_SHOWO_BEST = ImageSampling(num_timesteps=16, guidance_scale=1.0, temperature=1.0)

_TINY_JANUS = ModelConfig(weights="tiny-janus", attn_implementation="eager")
_TINY_JANUS_BEST = ImageSampling(guidance_scale=1.0, temperature=1.0)  # likewise, of guidance x temperature

PRESETS: dict[str, RunConfig] = {
    "tiny-showo-sft": RunConfig(
        model=_TINY_SHOWO,
        output_dir="runs/tiny-showo-sft",
        # Rejection sampling: the base draws, the model answers every question on its own picture, and what draws learns
        # from the pictures whose answers were all right. What answers is not trained: on pictures drawn in 8 steps it
        # comes to miscount as they do (understanding of counts .95 -> .68 with answer_coef 0.03). The base draws, and
        # not the policy: random masks score a sampled picture too kindly, and a policy that imitates itself by them
        # collapses within 20 steps. It draws at a lower temperature than the policy is scored at, so that its care is
        # imitated, too. Every 130 steps the policy becomes the next base: three rounds. At the end .3 of what training
        # did is taken back: that costs little drawing, and halves what understanding lost. Drawing in 8 steps, and two
        # masks a picture, keep it within ten minutes on a slow machine.
        rollout=RolloutConfig(
            num_prompts=32,
            num_generations=1,
            num_questions=4,
            sampling=replace(_TINY_SHOWO_BEST, num_timesteps=8),
            drawn_by="base",
            base_temperature=0.7,
            answer_temperature=0.0,
        ),
        loss=LossConfig(
            method="sft",
            beta=0.0,
            answer_coef=0.0,
            estimator="training_loss",
            num_draws=2,
            num_iterations=2,
            mask_time=0.5,
            ref_model_sync_steps=130,
        ),
        optim=OptimConfig(lr=5e-4, warmup_steps=8, decay=1.0),
        train=TrainConfig(max_steps=390, wise_ft_alpha=0.7, save_steps=130, eval_steps=195, mixed_precision="auto"),
        eval=EvalConfig(sampling=_TINY_SHOWO_BEST),
    ),
    "tiny-showo-grpo": RunConfig(
        model=_TINY_SHOWO,
        output_dir="runs/tiny-showo-grpo",
        # Every step of the trajectory is scored, and rollouts are drawn as the evaluation draws. Against collusion the
        # answer half gets a small weight. It is stable, and gains little in this time (docs/experiments.md).
        rollout=RolloutConfig(num_prompts=8, num_generations=8, num_questions=4, sampling=_TINY_SHOWO_BEST),
        reward=RewardConfig(kind="probability"),
        loss=LossConfig(beta=0.01, answer_coef=0.02, num_scored_steps=0, scale_rewards="batch"),
        optim=OptimConfig(lr=1e-4, decay=1.0),
        train=TrainConfig(max_steps=60, save_steps=30, eval_steps=30, mixed_precision="auto"),
        eval=EvalConfig(sampling=_TINY_SHOWO_BEST),
    ),
    "tiny-janus-grpo": RunConfig(
        model=_TINY_JANUS,
        output_dir="runs/tiny-janus-grpo",
        # One exact pass scores an image, and the reward is whether the sampled answer is right: its probability would
        # be another pass. So there is time for many small updates; few large ones move the weights by chance, which
        # costs more than they gain (docs/experiments.md).
        rollout=RolloutConfig(
            num_prompts=16, num_generations=8, num_questions=4, sampling=_TINY_JANUS_BEST, answer_temperature=0.5
        ),
        loss=LossConfig(beta=0.05, answer_coef=0.0, num_iterations=1, scale_rewards="batch"),
        optim=OptimConfig(lr=2e-4, warmup_steps=8, decay=1.0),
        train=TrainConfig(max_steps=140, save_steps=35, eval_steps=70, mixed_precision="auto"),
        eval=EvalConfig(sampling=_TINY_JANUS_BEST),
    ),
    "tiny-janus-sft": RunConfig(
        model=_TINY_JANUS,
        output_dir="runs/tiny-janus-sft",
        # Rejection sampling, in one round. The first 120 steps only draw and judge; then each step's six updates
        # imitate pictures kept in the last 120: few pictures this model learns by heart (docs/experiments.md). The
        # base draws at a lower temperature than the policy is scored at, so that its care is imitated, too.
        rollout=RolloutConfig(
            num_prompts=64,
            num_generations=1,
            num_questions=4,
            sampling=_TINY_JANUS_BEST,
            drawn_by="base",
            base_temperature=0.8,
            answer_temperature=0.0,
        ),
        loss=LossConfig(method="sft", beta=0.0, answer_coef=0.0, num_iterations=6, replay_steps=120, replay_size=48),
        optim=OptimConfig(lr=5e-4, warmup_steps=8, decay=1.0),
        train=TrainConfig(max_steps=200, save_steps=40, eval_steps=160, mixed_precision="auto"),
        eval=EvalConfig(sampling=_TINY_JANUS_BEST),
    ),
} | REAL_PRESETS

TINY = ("tiny-showo", "tiny-janus")
"""What `openunirl pretrain` makes."""

BUNDLED: dict[str, str] = {"tiny-showo": "assets/tiny-showo", "tiny-janus": "assets/tiny-janus"}
"""Models that come with the package: name -> folder, relative to the package."""


def bundled(name: str) -> str | None:
    """The folder of a bundled model, or None for any other name (a path or hub id, to be used as it is).

    Example: bundled("tiny-showo") ends in openunirl/assets/tiny-showo; bundled("./tiny-showo") is None.
    """
    return str(Path(__file__).parent / BUNDLED[name]) if name in BUNDLED else None
