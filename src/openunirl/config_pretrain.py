"""The configuration of `pretrain`, as config.py holds that of `train`.

In: flags. Out: a frozen PretrainConfig, and `check`, which refuses values that cannot work. Torch-free.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Training of a tiny base model from nothing."""

    name: str
    """Which tiny model."""
    output_dir: str | None = None
    """Where the finished model is written, runs/NAME by default; must not exist, or be empty."""
    seed: int = 0
    """Every draw is keyed by it."""
    image_tokenizer: str | None = None
    """Take the image tokenizer of this finished model instead of training one."""
    start_from: str | None = None
    """Continue from this folder's weights (and image tokenizer) with a fresh optimizer; give another --seed."""
    tokenizer_steps: int = 5000
    """Steps of the image tokenizer."""
    tokenizer_batch: int = 24
    """Pictures per tokenizer step."""
    tokenizer_lr: float = 1.5e-3
    """Peak learning rate of the image tokenizer."""
    steps: int = 4000
    """Steps of the unified model."""
    pool: int = 24000
    """Scenes to draw, and as many to ask about, that are rendered and encoded once."""
    draw_batch: int = 24
    """Scenes drawn per step; 0: only answers are trained."""
    ask_batch: int = 24
    """Pictures asked about per step, three or four questions each."""
    negatives: float = 0.25
    """Share of questions that name what the picture does not show."""
    damaged: float = 0.3
    """Share of asked pictures with a malformed thing."""
    position_weight: float = 6.0
    """How often pictures for position questions, and these questions, come up; single_object is 1."""
    both_sides: bool = False
    """Position questions are asked from both sides."""
    places: bool = False
    """Things are also asked for their column and row, which a model learns before it can tell a relation."""
    near_misses: float = 0.45
    """Share of drawings whose prompt is wrong in one point: a count, a colour, a shape, a relation."""
    teacher_guidance: float = 0.0
    """Above 0: no pictures are learned; the weights of --start-from, guided so, teach themselves to draw unguided."""
    teacher_temperature: float = 1.0
    """Temperature of that teacher's tokens."""
    condition_dropout: float = 0.1
    """Share of drawings without a prompt, for guidance."""
    draw_coef: float = 1.0
    """Weight of the drawing loss."""
    answer_coef: float = 1.0
    """Weight of the answering loss."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Optimizer of the unified model."""
    lr: float = 2e-3
    """Peak learning rate of the unified model."""
    weight_decay: float = 0.01
    """Weight decay of matrices."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.3
    """Share of the run, at its end, over which the learning rate falls to 0."""
    probe_steps: int = 500
    """Steps between two small evaluations, which go to pretrain.jsonl."""
    probe_prompts: int = 96
    """Validation prompts drawn in a small evaluation; four times as many reference pictures are read."""


_AT_LEAST_ONE = (
    "tokenizer_steps", "tokenizer_batch", "steps", "pool", "ask_batch", "probe_steps", "probe_prompts"
)  # fmt: skip
_NOT_NEGATIVE = (
    "weight_decay", "warmup_steps", "teacher_guidance", "draw_coef", "answer_coef", "position_weight", "seed",
    "draw_batch",
)  # fmt: skip
_POSITIVE = ("tokenizer_lr", "lr", "teacher_temperature")
_SHARES = ("negatives", "damaged", "near_misses", "condition_dropout", "decay")


def check(config: PretrainConfig) -> None:
    """Errors: ValueError for the first value that cannot work; it names the flag, the value and what is wanted."""
    wanted = {
        "a finite number": ([f.name for f in dataclasses.fields(config)], _finite),
        "at least 1": (_AT_LEAST_ONE, lambda value: value >= 1),
        "at least 0": (_NOT_NEGATIVE, lambda value: value >= 0),
        "more than 0": (_POSITIVE, lambda value: value > 0),
        "a share from 0 to 1": (_SHARES, lambda value: 0 <= value <= 1),
    }
    for words, (names, holds) in wanted.items():
        for name in names:
            if not holds(value := getattr(config, name)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}, wanted {words}")
    if not config.answer_coef and not (config.draw_coef and config.draw_batch):
        raise ValueError(
            f"--answer-coef is 0, --draw-coef {config.draw_coef} and --draw-batch {config.draw_batch}: nothing would "
            "be trained; give answers or drawings a weight"
        )
    if config.teacher_guidance and config.start_from is None:
        raise ValueError(
            f"--teacher-guidance is {config.teacher_guidance} without --start-from: the teacher would be fresh weights "
            "that draw noise; say which finished model teaches itself"
        )


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
