"""What a run is about: prompts, answer matching, and - for evaluation - reference pictures and a detector.

In: a name. Out: a World. Training uses `training_prompts` and `match` and nothing else of it, save where a run asks for
the reward "detector" by name: no rendered picture and no detector ever reaches a loss or a reward of the demo.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openunirl.tasks import answers, geneval, shapes
from openunirl.tasks.shapes_oracle import Oracle
from openunirl.types import Judge, Match, Prompt


@dataclass(frozen=True, kw_only=True)
class World:
    """Example: WORLDS["shapes"]().training_prompts(8, seed=0)"""

    label: str
    """Whose verdict the accuracies are, such as "oracle"."""
    training_prompts: Callable[[int, int], list[Prompt]]
    """(how many, seed)."""
    evaluation_prompts: Callable[[str, int, int], list[Prompt]]
    """(split, how many, seed); balanced over the task types."""
    match: Callable[[str, str, str], Match]
    """(tag, gold answer, model answer)."""
    references: Callable[[Sequence[Prompt], int], np.ndarray]
    """One right picture per prompt, uint8 [P, H, W, 3]; for evaluation only."""
    judge: Callable[[], Judge] | None
    """The detector of the evaluation, and of the reward "detector"; None where there is none yet."""


def _shapes_references(prompts: Sequence[Prompt], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 3])
    return shapes.render_batch([shapes.sample_scene(prompt, rng) for prompt in prompts], rng)


def _shapes() -> World:
    return World(
        label="oracle",
        training_prompts=lambda n, seed: shapes.prompts("train", n, seed),
        evaluation_prompts=shapes.prompts,
        match=shapes.match,
        references=_shapes_references,
        judge=Oracle,
    )


def _no_references(prompts: Sequence[Prompt], seed: int) -> np.ndarray:
    raise ValueError(
        f"GenEval's world cannot draw reference pictures for {len(prompts)} prompts; give a folder of them"
    )


def _geneval_prompts(split: str, n: int, seed: int) -> list[Prompt]:
    """GenEval's own, in their order; fewer than all: the task types take turns."""
    prompts, seen, turns = geneval.evaluation_prompts(), Counter(), []
    for prompt in prompts:
        turns.append(seen[prompt.tag])
        seen[prompt.tag] += 1
    chosen = sorted(range(len(prompts)), key=lambda i: turns[i])[:n]
    return [prompts[i] for i in sorted(chosen)]


def _geneval() -> World:
    return World(
        label="GenEval",
        training_prompts=geneval.training_prompts,
        evaluation_prompts=_geneval_prompts,
        match=answers.match,
        references=_no_references,
        judge=None,
    )


WORLDS: dict[str, Callable[[], World]] = {"shapes": _shapes, "geneval": _geneval}
