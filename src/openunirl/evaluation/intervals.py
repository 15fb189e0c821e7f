"""Intervals for accuracies and for differences between two runs.

    correct, n        -> wilson             -> (low, high)
    2x2 counts        -> paired_shares      -> (difference of two shares of the same items, low, high)
    shares, intervals -> mean_interval      -> (low, high) of their mean
    a, b on one set   -> paired_difference  -> (mean difference, low, high)

Sources: Wilson (1927), the score interval; Newcombe (1998, Statistics in Medicine 17, 2635, method 10), its extension
to paired shares; Efron and Tibshirani (1993, ch. 13), the percentile bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution

_INDICES_AT_ONCE = 1 << 20  # bounds the memory of the resampled indices (8 MB)


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share: `k` right of `n` independent trials, both whole numbers, 0 <= k <= n.

    (0.0, 1.0) for n = 0: nothing is known. ValueError unless 0 <= k <= n.
    Example: wilson(8, 10) -> (0.490, 0.943)
    """
    if not 0 <= k <= n:
        raise ValueError(f"k = {k} right of n = {n}: k should be between 0 and n")
    if n == 0:
        return 0.0, 1.0
    shrink = 1 / (1 + Z_95**2 / n)
    centre = shrink * (k / n + Z_95**2 / (2 * n))
    half_width = shrink * Z_95 * math.sqrt(k * (n - k) / n**3 + Z_95**2 / (4 * n**2))
    # Both ends are exact in arithmetic without rounding; 0.9999999 for "all right" would read as a defect.
    low = 0.0 if k == 0 else centre - half_width
    high = 1.0 if k == n else centre + half_width
    return low, high


def mean_interval(shares: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """The 95 % MOVER interval of the unweighted mean of independent shares, each (value, low, high).

    ValueError for no shares. Example: mean_interval([(0.8, 0.49, 0.94), (0.5, 0.24, 0.76)]) -> (0.448, 0.798)
    """
    if not shares:
        raise ValueError("no shares, so no mean: pass one (value, low, high) at least")
    mean = sum(value for value, _, _ in shares) / len(shares)
    below = math.hypot(*(value - low for value, low, _ in shares)) / len(shares)
    above = math.hypot(*(high - value for value, _, high in shares)) / len(shares)
    return mean - below, mean + above


def paired_shares(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float, float]:
    """(share of a - share of b, low, high): the 95 % interval for two verdicts on the same items, by Newcombe's
    square-and-add of Wilson intervals, the correlation corrected for continuity.

    It has a width where the verdicts never differ, and (0.0, -1.0, 1.0) stands for no items. ValueError for counts
    below 0. Example: paired_shares(20, 12, 2, 16) -> (0.2, 0.056, 0.329)
    """
    if min(both, only_a, only_b, neither) < 0:
        raise ValueError(f"counts {both}, {only_a}, {only_b}, {neither}: none should be below 0")
    n = both + only_a + only_b + neither
    if n == 0:
        return 0.0, -1.0, 1.0
    a, b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = wilson(both + only_a, n), wilson(both + only_b, n)
    covariance = both * neither - only_a * only_b
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)
    spread = math.sqrt((both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither))
    phi = covariance / spread if spread else 0.0

    def length(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    return a - b, a - b - length(a - low_a, high_b - b), a - b + length(high_a - a, b - low_b)


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, rng: np.random.Generator, num_resamples: int = 10_000
) -> tuple[float, float, float]:
    """(mean of a - b, low, high): the 95 % percentile bootstrap over items, for two runs judged on the same items.

    `a` and `b` are 1-D, 0/1 or real, and a[i], b[i] belong to one item. Items should be independent: with several
    images for one prompt, pass the prompts' means. Deterministic in the state of `rng`.
    ValueError for no items, unequal lengths, values that are not finite, or num_resamples < 1.
    Example: paired_difference([1, 1, 0, 1], [0, 1, 0, 0], rng=np.random.default_rng(0)) -> (0.5, 0.0, 1.0)
    """
    a_I, b_I = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)  # I items
    if a_I.ndim != 1 or a_I.shape != b_I.shape or a_I.size == 0:
        raise ValueError(f"shapes {a_I.shape} and {b_I.shape}: pass two 1-D arrays over the same items, one or more")
    if num_resamples < 1:
        raise ValueError(f"num_resamples = {num_resamples}: draw at least 1 (10000 is usual)")
    usable_I = np.isfinite(a_I) & np.isfinite(b_I)
    if not usable_I.all():
        bad = int(np.flatnonzero(~usable_I)[0])
        raise ValueError(f"item {bad}: a = {a_I[bad]}, b = {b_I[bad]}; leave out items without a finite value in both")
    difference_I = a_I - b_I
    items = difference_I.size
    at_once = max(1, _INDICES_AT_ONCE // items)
    means = []
    for start in range(0, num_resamples, at_once):
        index_RI = rng.integers(items, size=(min(at_once, num_resamples - start), items))  # R resamples
        means.append(difference_I[index_RI].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(difference_I.mean()), float(low), float(high)
