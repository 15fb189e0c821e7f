"""What a rehearsed training step costs, phase by phase.

In: what rehearsal.py found. Out: bytes held and beside, multiply-adds, seconds. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

DRAWING, ANSWERING, SCORING, UPDATE, OPTIMIZER = "drawing", "answering", "scoring", "update", "optimizer"
EVALUATING = "evaluating"
"""No phase of a step: its work is that of a whole evaluation."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Multiply-adds and bytes a second that are reached. Example: Rates(madds=6e13, bytes=1e12)"""

    madds: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a phase: the most bytes beside those that are held throughout, multiply-adds, seconds."""

    beside: int
    madds: float
    seconds: float

    def times(self, count: float) -> Cost:
        return replace(self, madds=self.madds * count, seconds=self.seconds * count)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """One process's step. Bytes, except `parameters` and `trained`, which count entries. `base` is 0 where the frozen
    base is no copy, or rests elsewhere, `detector` where the run loads none. `largest` and `loose`: the largest unit
    that sharding gathers, and what is gathered with the root."""

    parameters: int
    trained: int
    weights: int
    tokenizer: int
    base: int
    gradients: int
    optimizer: int
    largest: int
    loose: int
    phases: dict[str, Cost]
    detector: int = 0

    def held(self, phase: str) -> int:
        """Bytes held throughout a phase; gradients are there in the update only."""
        always = self.weights + self.tokenizer + self.base + self.optimizer + self.detector
        return always + (self.gradients if phase in (UPDATE, OPTIMIZER) else 0)

    @property
    def peak(self) -> int:
        return max(self.held(name) + cost.beside for name, cost in self.phases.items())


def continued(taken: Sequence[Cost], sizes: Sequence[int]) -> Cost:
    """The sum of all passes, those beyond `taken` as much larger or smaller as their sizes say, by the last two."""
    further = sizes[len(taken) :]
    total = Cost(
        beside=max(cost.beside for cost in taken),
        madds=sum(cost.madds for cost in taken),
        seconds=sum(cost.seconds for cost in taken),
    )
    if not further:
        return total
    (before, last), (smaller, reached) = taken[-2:], sizes[len(taken) - 2 : len(taken)]
    apart = reached - smaller or 1
    grown = sum(size - reached for size in further) / apart
    most = max((size - reached) / apart * (last.beside - before.beside) for size in further)
    return Cost(
        beside=max(total.beside, last.beside + round(most)),
        madds=total.madds + len(further) * last.madds + grown * (last.madds - before.madds),
        seconds=total.seconds + len(further) * last.seconds + grown * (last.seconds - before.seconds),
    )
