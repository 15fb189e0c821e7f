"""Is B better than A? Differences of two evaluations on the same prompts, with intervals and p-values.

    rows of A, rows of B -> common images, by prompt -> change            -> Change (value, interval, p, prompts)
                                                     -> imbalance_changes -> the same for both rates and their mean

In: rows as evaluation/run.py makes them. Out: Changes of B - A over what both hold: the same image of the same prompt,
and for answers the same question (on reference pictures: about the same picture). Prompts are the independent items;
the images of one are averaged.

Sources: McNemar (1947), exact: with one image a prompt, the binomial test of the prompts that changed. Otherwise the
sign-flip permutation test of the prompts' differences, which is the same test where both apply (Good 2005, ch. 3).
Intervals: the percentile bootstrap over prompts (intervals.py). Imbalance: a ratio, so p is the bootstrap's, too.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openunirl.evaluation.intervals import paired_difference

Row = dict[str, Any]
RESAMPLES = 10_000
_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class Change:
    """B - A. Example: Change(value=0.1, low=0.02, high=0.18, p=0.012, prompts=553)"""

    value: float
    low: float
    high: float
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


def sign_flip(difference_I: np.ndarray, rng: np.random.Generator, draws: int = RESAMPLES) -> float:
    """Two-sided p that the differences' signs are a coin's: exact for 0 and +-1, otherwise by `draws` random flips (the
    smallest p is then 1 / (draws + 1))."""
    values = np.unique(np.abs(difference_I[difference_I != 0]))
    if len(values) <= 1:
        return mcnemar(int((difference_I > 0).sum()), int((difference_I < 0).sum()))
    observed = abs(difference_I.sum()) - 1e-9  # sums of thirds round
    extreme = 0
    for start in range(0, draws, _AT_ONCE):
        signs_RI = rng.choice((-1.0, 1.0), size=(min(_AT_ONCE, draws - start), len(difference_I)))
        extreme += int((np.abs(signs_RI @ difference_I) >= observed).sum())
    return (extreme + 1) / (draws + 1)


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


def prompt_differences(
    a: Sequence[Row],
    b: Sequence[Row],
    value: Callable[[Row], float],
    key: Callable[[Row], Key] = image_key,
    *,
    tag: str = "",
    macro: bool = False,
) -> np.ndarray:
    """[I]: for each prompt of `tag` ("": of any) the mean over its common images of `value` in b - in a; empty where
    nothing is common. `macro`: weighted so that their mean is the unweighted mean over the tasks, as GenEval's overall
    score."""
    slots: dict[tuple[str, int], list[float]] = defaultdict(list)  # the images of one prompt
    for one, other in zip(*shared(a, b, key), strict=True):
        if not tag or one["tag"] == tag:
            slots[one["tag"], one["index"]].append(float(value(other)) - float(value(one)))
    size = Counter(task for task, _ in slots)
    weight = {task: len(slots) / (len(size) * size[task]) if macro else 1.0 for task in size}
    return np.array([weight[task] * np.mean(told) for (task, _), told in slots.items()])


def change(
    a: Sequence[Row],
    b: Sequence[Row],
    value: Callable[[Row], float],
    key: Callable[[Row], Key] = image_key,
    *,
    tag: str = "",
    macro: bool = False,
) -> Change | None:
    """B - A of the mean of `value` over what both hold under `key`, as prompt_differences; None where nothing is
    common."""
    difference_I = prompt_differences(a, b, value, key, tag=tag, macro=macro)
    if not len(difference_I):
        return None
    rng = np.random.default_rng(0)
    mean, low, high = paired_difference(difference_I, np.zeros_like(difference_I), rng=rng, num_resamples=RESAMPLES)
    return Change(value=mean, low=low, high=high, p=sign_flip(difference_I, rng), prompts=len(difference_I))


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


def _measures(counts_R4: np.ndarray) -> np.ndarray:
    """Both rates and their mean; nan where there is nothing to count."""
    with np.errstate(invalid="ignore", divide="ignore"):
        first_R, second_R = counts_R4[..., 0] / counts_R4[..., 1], counts_R4[..., 2] / counts_R4[..., 3]
    return np.stack([first_R, second_R, (first_R + second_R) / 2], -1)


def imbalance_changes(
    a: tuple[Sequence[Row], Sequence[Row]], b: tuple[Sequence[Row], Sequence[Row]]
) -> dict[str, Change]:
    """B - A of both rates and of the "score"; those that can be measured. They are over the images and the reference
    pictures that both hold and on which both were asked the same question.

    a, b: (generated rows, reference rows).
    """
    drawn, read = shared(a[0], b[0], answer_key), shared(a[1], b[1], reference_key)
    sides = [_counts(*side) for side in zip(drawn, read, strict=True)]
    common = list(sides[0])
    if not common:
        return {}
    have_references = len({_slot(row) for row in read[0]} & set(common))
    a_I4, b_I4 = (np.array([side[slot] for slot in common]) for side in sides)
    rng, resampled = np.random.default_rng(0), []
    for start in range(0, RESAMPLES, _AT_ONCE):
        times = min(_AT_ONCE, RESAMPLES - start)
        weight_RI = rng.multinomial(len(common), np.full(len(common), 1 / len(common)), size=times)
        resampled.append(_measures(weight_RI @ b_I4) - _measures(weight_RI @ a_I4))
    difference_R3 = np.concatenate(resampled)
    observed_3 = _measures(b_I4.sum(0)) - _measures(a_I4.sum(0))
    found: dict[str, Change] = {}
    sizes = (len(common), have_references, len(common))
    for i, (name, prompts) in enumerate(zip((*RATES, "score"), sizes, strict=True)):
        known = difference_R3[~np.isnan(difference_R3[:, i]), i]
        if np.isnan(observed_3[i]) or len(known) < 0.95 * RESAMPLES:  # too few prompts to resample
            continue
        low, high = np.quantile(known, [0.025, 0.975])
        tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
        p = min(1.0, 2 * (tail + 1) / (len(known) + 1))
        found[name] = Change(value=float(observed_3[i]), low=float(low), high=float(high), p=p, prompts=prompts)
    return found
