"""Learning curves of a report: recorded values -> what the template draws.

In: rows of metrics.jsonl. Out: lines (raw and smoothed) and axes, for templates/panel.html.j2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.ticker import MaxNLocator

from openunirl.report_numbers import Row, number

POINTS = 400  # at most so many points of a curve are drawn


def curve(rows: Sequence[Row], named: Mapping[str, str], ends: Sequence[float] = ()) -> dict[str, Any] | None:
    """Several metrics of one run; `named`: metric -> name of its line. The rest as `curves`."""
    return curves([(name, rows, metric) for metric, name in named.items()], ends)


def curves(wanted: Sequence[tuple[str, Sequence[Row], str]], ends: Sequence[float] = ()) -> dict[str, Any] | None:
    """{"lines": [{"name", "raw", "smooth", "last"}], "x": (low, high, ticks), "y": the same}, or None without a value.

    wanted: (name of the line, rows, metric). raw, smooth: lists of (step, value), smooth an exponential moving average.
    ends: values that the y axis shows in any case.
    """
    lines, seen = [], [*ends]
    for name, rows, metric in wanted:
        points = [(number(row["step"]), number(row.get(metric))) for row in rows]
        # a resumed run tells some steps again: the last telling counts
        values = sorted({step: value for step, value in points if step is not None and value is not None}.items())
        if values:
            rate = 2 / (1 + max(5, len(values) // 12)) if len(values) >= 12 else 1.0
            smooth = list(accumulate(values, lambda old, new, rate=rate: (new[0], old[1] + rate * (new[1] - old[1]))))
            stride = math.ceil(len(values) / POINTS)
            raw, smooth = ([*some[:-1:stride], some[-1]] for some in (values, smooth))
            lines.append({"name": name, "raw": raw, "smooth": smooth, "last": values[-1][1]})
            seen += [value for _, value in values]
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line["raw"]]
    low, high = min(steps), max(max(steps), min(steps) + 1)
    x_ticks = [tick for tick in MaxNLocator(5, integer=True).tick_values(low, high) if low <= tick <= high]
    top = max(seen) if max(seen) > min(seen) else min(seen) + (abs(min(seen)) or 1.0)
    y_ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(min(seen), top)
    return {"lines": lines, "x": (low, high, x_ticks), "y": (y_ticks[0], y_ticks[-1], list(y_ticks))}
