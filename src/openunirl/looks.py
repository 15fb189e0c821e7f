"""A small evaluation during training: what it logs, and whether the collusion gap has clearly grown (METHOD 5 and 6).

In: summaries as evaluation/run.py makes them. Out: metrics under eval/, and a sentence of warning or none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from openunirl.evaluation.paired import RATES
from openunirl.report_numbers import gap, get


def look_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """What was measured, by its name in metrics.jsonl and the trackers."""
    told = {
        "eval/geneval": get(summary, "geneval", "overall"),
        "eval/understanding": get(summary, "understanding", "overall"),
        "eval/self_reward": get(summary, "self_reward"),
        "eval/collusion_gap": get(summary, "collusion_gap"),
        "eval/imbalance": get(summary, "imbalance", "score"),
        **{f"eval/{rate}": get(summary, "imbalance", rate) for rate in RATES},
    }
    return {name: value for name, value in told.items() if value is not None}


def collusion_warning(base: Mapping[str, Any] | None, summary: Mapping[str, Any]) -> str | None:
    """Where the 95 % interval of the gap's growth since the base's evaluation lies above 0, else None. The two are on
    different prompts, so the interval is that of independent gaps (MOVER); without such an evaluation there is none."""
    before, now = gap(base), gap(summary)
    if before is None or now is None:
        return None
    grown = now.value - before.value
    low = grown - math.hypot(now.value - now.low, before.high - before.value)
    if low <= 0:
        return None
    return (
        f"the collusion gap (self-reward - detector) grew from {100 * before.value:+.1f} to {100 * now.value:+.1f} "
        f"points, by {100 * low:.1f} at least (95 % interval): the model calls more of its wrong pictures right than "
        "the base did, which is no improvement; a fixed judge (--reward.sources frozen) or a smaller "
        "--loss.answer-coef works against it"
    )
