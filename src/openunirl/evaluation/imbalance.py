"""How often a model succeeds at one task and fails at the other on the same content (METHOD 6).

In: rows of generated images (correct, answer_correct) and of reference images (answer_correct). Out: the two rates,
their 2x2 counts per task and overall, and their mean, the imbalance score; 0 is perfect balance.

Source: UniRL (arXiv 2505.23380), the released cycle scripts. Departures: 1. the score is the mean of the two rates (the
paper reports them apart); 2. Wilson intervals of the rates, and of the score a MOVER interval (intervals.py), as if
its two rates were independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openunirl.evaluation.intervals import mean_interval, wilson


def accuracy(correct: int, n: int) -> dict[str, Any]:
    """{"accuracy", "correct", "n", "ci95"}; accuracy is None when there is nothing to count."""
    return {"accuracy": correct / n if n else None, "correct": correct, "n": n, "ci95": list(wilson(correct, n))}


def accuracy_by_task(rows: Sequence[dict[str, Any]], field: str) -> dict[str, Any]:
    """Accuracy of a 0/1 field over all rows, and per tag in order of first appearance."""
    tags = dict.fromkeys(row["tag"] for row in rows)
    tasks = {
        tag: accuracy(sum(r[field] for r in rows if r["tag"] == tag), sum(r["tag"] == tag for r in rows))
        for tag in tags
    }
    whole = accuracy(sum(row[field] for row in rows), len(rows))
    return {"overall": whole["accuracy"], "n": whole["n"], "ci95": whole["ci95"], "tasks": tasks}


def imbalance(generated: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Both rates. `index` in the rows says which prompt an image belongs to; references beyond the drawn prompts, and
    prompts beyond the references, are left out of the second rate."""
    whole = _rates(generated, references)
    tags = dict.fromkeys(row["tag"] for row in generated)
    tasks = {
        tag: _rates([r for r in generated if r["tag"] == tag], [r for r in references if r["tag"] == tag])
        for tag in tags
    }
    return {**whole, "tasks": tasks}


def _rates(generated: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> dict[str, Any]:
    # (i) on its own images: the detector's verdict against its own answer
    own = _table([(row["correct"], row["answer_correct"]) for row in generated])
    # (ii) the same prompt read on a reference image, the first where there are several, and drawn
    read: dict[int, bool] = {}
    for row in references:
        read.setdefault(row["index"], row["answer_correct"])
    paired = [(row["correct"], read[row["index"]]) for row in generated if row["index"] in read]
    cross = _table(paired)
    first = accuracy(own["image_right_answer_wrong"], own["image_right_answer_wrong"] + own["image_right_answer_right"])
    second = accuracy(
        cross["image_wrong_answer_right"], cross["image_wrong_answer_right"] + cross["image_right_answer_right"]
    )
    # of how many distinct prompts each rate tells
    first["distinct_prompts"] = len({row["prompt"] for row in generated if row["correct"]})
    second["distinct_prompts"] = len({row["prompt"] for row in generated if read.get(row["index"])})
    rates = [part for part in (first, second) if part["n"]]
    score = score_interval = None
    if len(rates) == 2:
        score = sum(part["accuracy"] for part in rates) / 2
        ends = mean_interval([(part["accuracy"], *part["ci95"]) for part in rates])
        score_interval = {"n": [part["n"] for part in rates], "ci95": list(ends)}
    return {
        "answer_wrong_given_image_right": first["accuracy"],
        "image_wrong_given_answer_right": second["accuracy"],
        "score": score,
        "score_interval": score_interval,
        "intervals": {"answer_wrong_given_image_right": first, "image_wrong_given_answer_right": second},
        "own_images": own,
        "reference_images": cross,
    }


def _table(pairs: Sequence[tuple[bool, bool]]) -> dict[str, int]:
    return {
        f"image_{'right' if image else 'wrong'}_answer_{'right' if answer else 'wrong'}": sum(
            (bool(i), bool(a)) == (image, answer) for i, a in pairs
        )
        for image in (True, False)
        for answer in (True, False)
    }
