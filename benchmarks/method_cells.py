"""The cells of the method's table: what each one trains, told as the fields in which it differs from a preset.

In: a cell's name, a model, a number of images, a seed. Out: its RunConfig. All cells but the recipe start from the same
preset, NAME-grpo of the model (tiny-showo's where it has none), made COMMON: prompts, images, questions, sampler,
scored steps, updates and learning rate are equal, so that two cells differ in what they name and in nothing else. The
cells of half, judge, answers and control vary GRPO, not end-to-end.

Source: the comparisons of UniRL (arXiv 2505.23380) and METHOD 4. Departures: detector, frozen judge, K answers,
shuffled rewards and SFT's halves are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from openunirl.config import RunConfig
from openunirl.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Example: Cell(says="GRPO, end-to-end", change={"loss": {"end_to_end": True}})"""

    says: str
    change: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Section of RunConfig -> field -> value."""
    trains: bool = True
    """False: the base itself."""
    recipe: bool = False
    """Starts from the preset NAME-sft as it is, and not from what is common."""


COMMON: Mapping[str, Mapping[str, Any]] = {
    "rollout": {"num_prompts": 4, "sampling": {"num_timesteps": 8}},
    "reward": {"kind": "answer"},
    "loss": {"num_scored_steps": 2, "answer_coef": 1.0, "num_iterations": 1},
    "train": {"wise_ft_alpha": 1.0},
}
"""What all cells but the recipe change in their preset: the paper's reward and weights, many updates of few prompts,
images in 8 steps, 2 of them scored, as fits into the minutes of a cell (an autoregressive model has no such steps)."""

IMAGES = 1280
"""Generated images of a cell: what the slowest cell draws and learns from in less than three minutes of one core."""

_SFT: Mapping[str, Any] = {"method": "sft", "beta": 0.0}

CELLS: dict[str, Cell] = {
    "base": Cell(says="base, not trained", trains=False),
    "sft-e2e": Cell(says="SFT, end-to-end", change={"loss": {**_SFT, "end_to_end": True}}),
    "sft": Cell(says="SFT", change={"loss": _SFT}),
    "sft-t2i-only": Cell(says="SFT, images only", change={"loss": {**_SFT, "answer_coef": 0.0}}),
    "sft-mmu-only": Cell(says="SFT, answers only", change={"loss": {**_SFT, "image_coef": 0.0}}),
    "grpo-e2e": Cell(says="GRPO, end-to-end", change={"loss": {"end_to_end": True}}),
    "grpo": Cell(says="GRPO"),
    "t2i-only": Cell(says="GRPO, images only", change={"loss": {"answer_coef": 0.0}}),
    "mmu-only": Cell(says="GRPO, answers only", change={"loss": {"image_coef": 0.0}}),
    "frozen": Cell(says="GRPO, frozen judge", change={"reward": {"sources": ("frozen",)}}),
    "detector": Cell(says="GRPO, detector reward", change={"reward": {"sources": ("detector",)}}),
    "k4": Cell(says="GRPO, 4 answers", change={"rollout": {"num_answers": 4}}),
    "shuffled": Cell(says="GRPO, shuffled rewards (control)", change={"reward": {"shuffle": True}}),
    "recipe": Cell(says="the demo's recipe", recipe=True),
}

ROUNDS = 3
"""Rounds of a recipe that renews its base (`ref_model_sync_steps`): in a cell as in the whole preset."""

CONTRASTS: tuple[tuple[str, str, str], ...] = (
    ("GRPO against SFT", "grpo", "sft"),
    ("the same, end-to-end", "grpo-e2e", "sft-e2e"),
    ("end-to-end against not, GRPO", "grpo-e2e", "grpo"),
    ("end-to-end against not, SFT", "sft-e2e", "sft"),
    ("both halves against images only", "grpo", "t2i-only"),
    ("the same, SFT", "sft", "sft-t2i-only"),
    ("both halves against answers only", "grpo", "mmu-only"),
    ("the same, SFT", "sft", "sft-mmu-only"),
    ("frozen judge against its own", "frozen", "grpo"),
    ("detector against its own judgement", "detector", "grpo"),
    ("4 answers against 1", "k4", "grpo"),
    ("rewards against shuffled rewards", "grpo", "shuffled"),
    ("the demo's recipe against GRPO", "recipe", "grpo"),
)
"""(what is compared, the first cell, the second); differences are the first's minus the second's."""


def preset_of(model: str, cell: str) -> str:
    """The name of the preset that a model's cell starts from."""
    start = "sft" if CELLS[cell].recipe else "grpo"
    own = f"{model}-{start}"
    return own if own in PRESETS else f"tiny-showo-{start}"


def changed(kept: Any, change: Mapping[str, Any]) -> Any:
    """A dataclass with other values; a mapping changes fields of a field."""
    values = {
        name: changed(getattr(kept, name), value) if isinstance(value, Mapping) else value
        for name, value in change.items()
    }
    return replace(kept, **values)


def images_per_step(config: RunConfig) -> int:
    return config.rollout.num_prompts * config.rollout.num_generations


def cell_config(name: str, model: str, *, images: int, seed: int, probes: int, probe_prompts: int) -> RunConfig:
    """What the cell trains: `images` generated images, `probes` small evaluations of `probe_prompts` prompts on the
    way, none before and after; the caller names its directory. For `base`: the preset, of which only the evaluation's
    settings are used.

    Errors: ValueError for an unknown cell, and for a number of images that is no whole number of steps.
    Example: cell_config("grpo", "tiny-showo", images=128, seed=0, probes=2, probe_prompts=48).train.max_steps == 2
    """
    if name not in CELLS:
        raise ValueError(f"unknown cell {name!r}; known: {', '.join(CELLS)}")
    cell = CELLS[name]
    config = PRESETS[preset_of(model, name)]
    for change in ({}, cell.change) if cell.recipe else (COMMON, cell.change):
        config = changed(config, change)
    per_step = images_per_step(config)
    if images < per_step or images % per_step:
        raise ValueError(f"--images is {images}: cell {name} draws {per_step} a step, give a multiple of that")
    steps = images // per_step
    config = changed(config, {"train": {"mixed_precision": "no"}})  # by "auto" the machine would choose
    if config.loss.ref_model_sync_steps:
        config = changed(config, {"loss": {"ref_model_sync_steps": -(-steps // ROUNDS)}})
    if config.loss.replay_steps:  # the same share of the steps only collects
        collected = max(1, steps * config.loss.replay_steps // config.train.max_steps)
        config = changed(config, {"loss": {"replay_steps": collected}})
    return replace(
        config,
        seed=seed,
        output_dir="",
        model=replace(config.model, weights=model),
        train=replace(
            config.train, max_steps=steps, save_steps=-(-steps // 4), save_total_limit=1, eval_steps=-(-steps // probes)
        ),
        eval=replace(config.eval, num_prompts=0, during_prompts=probe_prompts),
    )
