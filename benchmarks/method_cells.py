"""The cells of the method's table: what each one trains, told as the fields in which it differs from a preset.

In: a cell's name, a model, a number of images, a seed. Out: its RunConfig. Two presets are the starting points,
NAME-grpo and NAME-sft of the model where there are such, else tiny-showo's; what neither SIZED_DOWN nor a cell names
stays the preset's. The cells of half, judge, answers and control vary GRPO, not end-to-end.

Source: the comparisons of UniRL (arXiv 2505.23380) and METHOD 4. Departures: detector, frozen judge, K answers and
shuffled rewards are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from openunirl.config import RunConfig
from openunirl.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Example: Cell(says="GRPO, end-to-end", start="grpo", change={"loss": {"end_to_end": True}})"""

    says: str
    start: Literal["grpo", "sft"] | None
    """The preset that is varied; None: nothing is trained."""
    change: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Section of RunConfig -> field -> value."""


_BOTH: Mapping[str, Any] = {"answer_coef": 0.03, "gold_answers": "kept"}  # the preset trains drawing alone

CELLS: dict[str, Cell] = {
    "base": Cell(says="base, not trained", start=None),
    "sft-e2e": Cell(says="SFT, end-to-end", start="sft", change={"loss": {"end_to_end": True, **_BOTH}}),
    "sft": Cell(says="SFT", start="sft", change={"loss": _BOTH}),
    "sft-t2i-only": Cell(says="SFT, images only", start="sft"),
    "grpo-e2e": Cell(says="GRPO, end-to-end", start="grpo", change={"loss": {"end_to_end": True}}),
    "grpo": Cell(says="GRPO", start="grpo"),
    "t2i-only": Cell(says="GRPO, images only", start="grpo", change={"loss": {"answer_coef": 0.0}}),
    "mmu-only": Cell(says="GRPO, answers only", start="grpo", change={"loss": {"image_coef": 0.0}}),
    "frozen": Cell(says="GRPO, frozen judge", start="grpo", change={"reward": {"sources": ("frozen",)}}),
    "detector": Cell(says="GRPO, detector reward", start="grpo", change={"reward": {"sources": ("detector",)}}),
    "k4": Cell(says="GRPO, 4 answers", start="grpo", change={"rollout": {"num_answers": 4}}),
    "shuffled": Cell(says="GRPO, shuffled rewards (control)", start="grpo", change={"reward": {"shuffle": True}}),
}

SIZED_DOWN: Mapping[str, Mapping[str, Any]] = {
    "rollout": {"sampling": {"num_timesteps": 8}},
    "loss": {"num_scored_steps": 2},
    "train": {"wise_ft_alpha": 1.0},
}
"""What every cell changes in its preset: images in 8 steps, 2 of them scored, as fits into the minutes of a cell (an
autoregressive model has no such steps), and all that training added is kept, so that objectives are compared."""
ROUNDS = 3
"""Rounds of a preset that renews its base (`ref_model_sync_steps`): in a cell as in the whole preset."""

CONTRASTS: tuple[tuple[str, str, str], ...] = (
    ("GRPO against SFT", "grpo", "sft"),
    ("the same, end-to-end", "grpo-e2e", "sft-e2e"),
    ("end-to-end against not, GRPO", "grpo-e2e", "grpo"),
    ("end-to-end against not, SFT", "sft-e2e", "sft"),
    ("both halves against images only", "grpo", "t2i-only"),
    ("the same, SFT", "sft", "sft-t2i-only"),
    ("both halves against answers only", "grpo", "mmu-only"),
    ("frozen judge against its own", "frozen", "grpo"),
    ("detector against its own judgement", "detector", "grpo"),
    ("4 answers against 1", "k4", "grpo"),
    ("rewards against shuffled rewards", "grpo", "shuffled"),
)
"""(what is compared, the first cell, the second); differences are the first's minus the second's."""


def preset_of(model: str, start: str) -> str:
    """The name of the preset that a model's cells start from."""
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
    config = PRESETS[preset_of(model, cell.start or "grpo")]
    for change in (SIZED_DOWN, cell.change):
        config = changed(config, change)
    per_step = images_per_step(config)
    if images < per_step or images % per_step:
        raise ValueError(f"--images is {images}: cell {name} draws {per_step} a step, give a multiple of that")
    steps = images // per_step
    if config.loss.ref_model_sync_steps:
        config = changed(config, {"loss": {"ref_model_sync_steps": -(-steps // ROUNDS)}})
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
