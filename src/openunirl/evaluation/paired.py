"""Is B better than A? Differences of two evaluations on the same prompts, with intervals and p-values.

    rows of A, rows of B -> common images, by prompt -> change            -> Change (value, interval, p, prompts)
                                                     -> imbalance_changes -> the same for both rates and their mean

In: rows as evaluation/run.py makes them. Out: Changes of B - A over what both hold: the same image of the same prompt,
and for answers the same question (on reference pictures: about the same picture). Prompts are the independent items;
the images of one are averaged.

Sources, p: McNemar (1947), exact: with one image a prompt, the binomial test of the prompts that changed. Otherwise the
sign-flip permutation test of the prompts' differences, which is the same test where both apply (Good 2005, ch. 3).
Intervals: with one image a prompt Newcombe's (intervals.py), widened to 0 where the test does not rule it out; else
test-based (Miettinen 1976, Am J Epidemiol 103, 226): those sizes of a change that random signs reach, around the value.
Imbalance: a ratio. Its change is the sum of what each prompt adds to the difference of both ratios, as if the pooled
one were true, and these are flipped (Hemerik, Goeman and Finos 2020, JRSS B 82, 841).

Shapes: I prompts, R draws of signs.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openunirl.evaluation.intervals import paired_shares

Row = dict[str, Any]
DRAWS = 10_000
_AT_ONCE = 1000
_ALL_SIGNS = 13
"""Of so many prompts that changed, every choice of signs is looked at."""
_LEVEL = 0.05
_FEWEST = 6
"""Of fewer prompts that changed, random signs never give p < 0.05, and so tell no interval."""
_EXPECTED = 5
"""Cochran's rule for comparing two shares: so many of each kind are expected in the smaller sample."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """B - A; without an interval where the prompts that changed are too few to tell one.

    Example: Change(value=0.1, low=0.02, high=0.18, p=0.012, prompts=553)"""

    value: float
    low: float | None
    high: float | None
    p: float
    prompts: int


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of `gained` prompts that became right and `lost` that became wrong; 1.0 where none changed.

    Example: mcnemar(8, 1) -> 0.0390625
    """
    if min(gained, lost) < 0:
        raise ValueError(f"gained = {gained}, lost = {lost}: both should be at least 0")
    n, least = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n) if n else 1.0


def sign_flip(difference_I: np.ndarray, rng: np.random.Generator, draws: int = DRAWS) -> float:
    """Two-sided p that the differences' signs are a coin's: exact where all that are not 0 have one size or are few,
    otherwise by `draws` random flips (the smallest p is then 1 / (draws + 1))."""
    return _p(difference_I, *_flipped(difference_I, rng, draws))


def _p(difference_I: np.ndarray, sums_R: np.ndarray, chance_R: np.ndarray) -> float:
    return min(1.0, float(chance_R[sums_R >= abs(difference_I.sum()) - 1e-9].sum()))  # sums of thirds round


def _flipped(difference_I: np.ndarray, rng: np.random.Generator, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """The absolute sums that the differences have under other signs, largest first, and the chance of each."""
    moved_I = difference_I[difference_I != 0]
    number, sizes = len(moved_I), np.unique(np.abs(moved_I).round(12))
    if len(sizes) <= 1:
        sums_R = sizes.sum() * np.abs(2 * np.arange(number + 1) - number)
        chance_R = np.array([math.comb(number, ups) / 2**number for ups in range(number + 1)])
    elif number <= _ALL_SIGNS:
        signs_RI = 1.0 - 2 * ((np.arange(2**number)[:, None] >> np.arange(number)) & 1)
        sums_R, chance_R = np.abs(signs_RI @ moved_I), np.full(2**number, 0.5**number)
    else:
        parts = [np.abs([moved_I.sum()])]
        for start in range(0, draws, _AT_ONCE):
            parts.append(np.abs(rng.choice((-1.0, 1.0), size=(min(_AT_ONCE, draws - start), number)) @ moved_I))
        sums_R, chance_R = np.concatenate(parts), np.full(draws + 1, 1 / (draws + 1))
    order_R = np.argsort(-sums_R)
    return sums_R[order_R], chance_R[order_R]


def _reached(sums_R: np.ndarray, chance_R: np.ndarray) -> float:
    """The largest sum that 5 % of the signs, or more, reach."""
    return float(sums_R[np.searchsorted(np.cumsum(chance_R), _LEVEL - 1e-9)])


def _tested(
    terms_I: np.ndarray, value: float, *, reach: float = 1.0, ends: tuple[float, float] | None = None
) -> dict[str, Any]:
    """p, low and high of a change by `value` to which the prompts add up; `ends`: of an interval that is better than
    the test's own; `reach`: no change can be larger."""
    flipped = _flipped(terms_I, np.random.default_rng(0), DRAWS)
    p = _p(terms_I, *flipped)
    if ends is None and (terms_I != 0).sum() < _FEWEST:
        return {"low": None, "high": None, "p": p}
    half = _reached(*flipped)
    low, high = ends or (value - half, value + half)
    if p >= _LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    return {"low": max(low, -reach), "high": min(high, reach), "p": p}


Key = tuple[Any, ...]


def image_key(row: Row) -> Key:
    """What makes two rows the same image of two evaluations."""
    return row["index"], str(row.get("sample", 0)), row["tag"], row["prompt"]


def answer_key(row: Row) -> Key:
    """What makes two rows answers to the same question about an image that both drew for one prompt."""
    return *image_key(row), str(row.get("question", ""))


def reference_key(row: Row) -> Key:
    """What makes two rows answers to the same question on the same reference picture, known by its content."""
    return *answer_key(row), str(row.get("digest", ""))


def distinct(rows: Sequence[Row], key: Callable[[Row], Key]) -> dict[Key, Row]:
    """key -> row, without the rows that share a key: which of them is whose partner is unknown."""
    times = Counter(map(key, rows))
    return {key(row): row for row in rows if times[key(row)] == 1}


def shared(a: Sequence[Row], b: Sequence[Row], key: Callable[[Row], Key]) -> tuple[list[Row], list[Row]]:
    """The rows of a and of b whose key both hold, pairwise, in a's order."""
    sides = [distinct(side, key) for side in (a, b)]
    common = [each for each in sides[0] if each in sides[1]]
    return [sides[0][each] for each in common], [sides[1][each] for each in common]


def change(
    a: Sequence[Row],
    b: Sequence[Row],
    value: Callable[[Row], float],
    key: Callable[[Row], Key] = image_key,
    *,
    tag: str = "",
    macro: bool = False,
    reach: float = 1.0,
) -> Change | None:
    """B - A of the mean of `value` over what both hold under `key`, of prompts of `tag` ("": of any); None where
    nothing is common. `macro`: prompts are weighted so that their mean is the unweighted mean over the tasks, as
    GenEval's overall score. `reach`: no change can be larger."""
    slots: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)  # the images of one prompt
    for one, other in zip(*shared(a, b, key), strict=True):
        if not tag or one["tag"] == tag:
            slots[one["tag"], one["index"]].append((float(value(one)), float(value(other))))
    if not slots:
        return None
    size = Counter(task for task, _ in slots)
    weight = {task: len(slots) / (len(size) * size[task]) if macro else 1.0 for task in size}
    difference_I = np.array([weight[task] * np.mean([y - x for x, y in told]) for (task, _), told in slots.items()])
    ends = None
    if not macro and all(len(told) == 1 and {*told[0]} <= {0.0, 1.0} for told in slots.values()):
        pairs = Counter(told[0] for told in slots.values())
        ends = paired_shares(*(pairs[pair] for pair in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0))))[1:]
    mean = float(difference_I.mean())
    return Change(
        value=mean, prompts=len(slots), **_tested(difference_I / len(difference_I), mean, reach=reach, ends=ends)
    )


# ------------------------------------------------------------------------------------------------- imbalance

RATES = ("answer_wrong_given_image_right", "image_wrong_given_answer_right")


Slot = tuple[str, int, str]
"""(tag, index, prompt)"""


def _slot(row: Row) -> Slot:
    return row["tag"], row["index"], row["prompt"]


def _counts(generated: Sequence[Row], references: Sequence[Row]) -> dict[Slot, np.ndarray]:
    """prompt -> (image right and answer wrong, image right, answer right and image wrong, answer right)."""
    read: dict[Slot, bool] = {}
    for row in references:
        read.setdefault(_slot(row), row["answer_correct"])
    found: dict[Slot, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for row in generated:
        slot, right = _slot(row), row["correct"]
        found[slot] += (right and not row["answer_correct"], right, 0, 0)
        if read.get(slot):
            found[slot] += (0, 0, not right, 1)
    return found


def imbalance_changes(
    a: tuple[Sequence[Row], Sequence[Row]], b: tuple[Sequence[Row], Sequence[Row]]
) -> dict[str, Change]:
    """B - A of both rates and of the "score"; those that can be measured. They are over the images and the reference
    pictures that both hold and on which both were asked the same question; a prompt counts where a side's rate does.

    a, b: (generated rows, reference rows).
    """
    drawn, read = shared(a[0], b[0], answer_key), shared(a[1], b[1], reference_key)
    sides = [_counts(*side) for side in zip(drawn, read, strict=True)]
    common = list(sides[0])
    if not common:
        return {}
    a_I4, b_I4 = (np.array([side[slot] for slot in common]) for side in sides)
    found: dict[str, Change] = {}
    terms, counted_I = [], np.zeros(len(common), bool)
    for place, name in enumerate(RATES):
        told = _terms(a_I4[:, 2 * place :][:, :2], b_I4[:, 2 * place :][:, :2])
        if told is not None:
            counts_I = a_I4[:, 2 * place + 1] + b_I4[:, 2 * place + 1] > 0
            found[name] = _of_ratio(told, counts_I)
            counted_I |= counts_I
            terms.append(told)
    if len(terms) == len(RATES):
        found["score"] = _of_ratio((terms[0] + terms[1]) / 2, counted_I)
    return found


def _of_ratio(terms_I: np.ndarray, counts_I: np.ndarray) -> Change:
    value = float(terms_I.sum())
    return Change(value=value, prompts=int(counts_I.sum()), **_tested(terms_I, value))


def _terms(a_I2: np.ndarray, b_I2: np.ndarray) -> np.ndarray | None:
    """[I]: what each prompt adds to the difference of two ratios, each of (wrong, counted): its wrong ones beyond those
    that the pooled ratio expects. None where a ratio is not known, or, of different pictures, by too few to compare."""
    (_, a), (_, b) = a_I2.sum(0), b_I2.sum(0)
    if not a or not b:
        return None
    pooled = float(a_I2[:, 0].sum() + b_I2[:, 0].sum()) / (a + b)
    alike = (a_I2[:, 1] == b_I2[:, 1]).all()
    if not alike and 0 < min(pooled, 1 - pooled) < _EXPECTED / min(a, b):
        return None
    return (b_I2[:, 0] - pooled * b_I2[:, 1]) / b - (a_I2[:, 0] - pooled * a_I2[:, 1]) / a
