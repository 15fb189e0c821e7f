"""What a run is about: prompts, answer matching, and - for evaluation - reference pictures and a detector.

In: a name. Out: a World. Training uses `training_prompts` and `match` and nothing else of it, save where a run asks for
the reward "detector" by name: no rendered picture and no detector ever reaches a loss or a reward of the demo.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openunirl.tasks import answers, geneval, shapes
from openunirl.tasks.shapes_oracle import Oracle
from openunirl.types import Judge, Match, Prompt


@dataclass(frozen=True, kw_only=True)
class Found:
    """A reference picture in a file, and what is asked about it; `index`: its prompt's number among those evaluated,
    `sample`: its own among those of its prompt.

    Example: Found(index=0, sample=0, prompt=Prompt(...), file=Path("references/00000/samples/0000.png"))
    """

    index: int
    sample: int
    prompt: Prompt
    file: Path


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
    """The detector of the evaluation, and of the reward "detector"; None where there is none: photographs want one
    that is loaded (evaluation/photo_world.py)."""
    judged_by: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the detector's weights, where it has any."""
    classes: frozenset[str] | None = None
    """Everything that the detector can find; None: whatever prompts ask for."""
    colors: frozenset[str] | None = None
    """Everything that it can call a colour."""
    found: Callable[[Sequence[Prompt], int], list[Found]] | None = None
    """(evaluated prompts, at most how many): reference pictures of a world that cannot draw them, and finds some."""

    def can_judge(self, metadata: Mapping[str, Any]) -> bool:
        """Whether the detector has a name for all that a prompt's record asks for: others it would never find."""
        clauses = [*metadata.get("include", ()), *metadata.get("exclude", ())]
        return all(
            known is None or clause.get(name) is None or clause[name] in known
            for clause in clauses
            for name, known in (("class", self.classes), ("color", self.colors))
        )


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


def first_of_each_task(prompts: Sequence[Prompt], n: int) -> list[Prompt]:
    """`n` of the prompts in their order, all where there are fewer: the task types take turns."""
    seen, turns = Counter(), []
    for prompt in prompts:
        turns.append(seen[prompt.tag])
        seen[prompt.tag] += 1
    chosen = sorted(range(len(prompts)), key=lambda i: turns[i])[:n]
    return [prompts[i] for i in sorted(chosen)]


def _geneval_prompts(split: str, n: int, seed: int) -> list[Prompt]:
    """GenEval's own."""
    return first_of_each_task(geneval.evaluation_prompts(), n)


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
