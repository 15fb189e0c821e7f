"""When an evaluation is no score: why, and the likely cause, in one sentence.

    pictures, rows of drawn pictures -> no_drawing   -> all equal, nothing detected
    "given", "drawn", "references"   -> ORIGINS      -> what is said of such pictures
    rows of drawn pictures           -> nothing_right -> not one is right
                                     -> one_color  -> a warning where every object is called one colour
    rows of answered questions       -> no_answers   -> no answer, or hardly a reply of the chat model, can be settled

In: rows as evaluation/run.py and evaluation/photos.py make them. Out: a sentence, or None where the rows are a score.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]
_TALLY = re.compile(r"^expected .+>=\d+, found \d+ .+?; and (.+)$", re.MULTILINE)
"""In a reason: the colours that were found instead (evaluation/geneval.py)."""
_FEWEST_OBJECTS = 8
"""Of fewer objects one colour may be chance."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where pictures come from, for messages. Example: ORIGINS["references"]"""

    again: str
    """What to do about one that cannot be read."""
    blank: str
    """Why nothing may be detected in any."""
    wrong: str
    """Why not one may be right."""
    equal: str
    """Why all may be equal."""


_OTHERS = (
    "metadata of other pictures (folders in another order, or numbered from 1), a detector for another kind of picture"
)
ORIGINS = {
    "given": Origin(
        again="draw them again and repeat this call, which scores only those",
        blank="the pictures are blank or noise (look at a few)",
        wrong=f"{_OTHERS}, or a model that cannot draw yet",
        equal="the model, its decoder or a safety filter gave the same picture for every prompt",
    ),
    "drawn": Origin(
        again="delete them, and the same call draws them again",
        blank="the pictures are blank or noise (look at a few)",
        wrong="damaged weights, another model's settings (--settings), or a model that cannot draw yet",
        equal="the model, its decoder or a safety filter gave the same picture for every prompt",
    ),
    "references": Origin(
        again="get them again or remove them, and repeat this call, which scores only those",
        blank="the references are no photographs (look at a few)",
        wrong=f"{_OTHERS}, or references that do not show what their metadata says; without --references the rest is "
        "evaluated in another --output-dir",
        equal="the same picture lies under every prompt",
    ),
}
"""Pictures of any tool, those that `evaluate MODEL` draws itself, and its references."""


def no_drawing(rows: Rows, pictures_BHWC: np.ndarray, who: str) -> str | None:
    """Of rows with "objects", a number, and their pictures, uint8; `who` drew them, such as "the base"."""
    count = len(pictures_BHWC)
    if count > 1 and (pictures_BHWC == pictures_BHWC[:1]).all():
        return (
            f"all {count} pictures that {who} drew are equal: its weights or its image tokenizer are damaged, or not "
            "of one model"
        )
    if not any(row["objects"] for row in rows):
        return (
            f"no object was detected in any of the {len(rows)} pictures that {who} drew: its weights, its image "
            "tokenizer or the detector's weights are damaged, or of another kind of picture"
        )
    return None


def nothing_right(rows: Rows, shown: int, causes: str, where: str = "") -> str | None:
    """Of rows with "correct" and "reason", of which so many show objects; `where` the pictures are, " in DIR"."""
    if any(row["correct"] for row in rows):
        return None
    reason, times = Counter(line for row in rows for line in row["reason"].split("\n")).most_common(1)[0]
    return (
        f"0 of {len(rows)} pictures{where} are right although {shown} of them show objects; that is not taken for a "
        f'score. The likely causes: {causes}. The most frequent reason is "{reason}" ({times} times)'
    )


def one_color(rows: Rows) -> str | None:
    """Of rows with "correct", "reason" and "metadata": a warning where all objects that were asked for in several
    colours are called the same one."""
    wanted, seen = set[str](), Counter[str]()
    for row in rows:
        asked = [clause["color"] for clause in json.loads(row["metadata"]).get("include", ()) if "color" in clause]
        wanted.update(asked)
        seen.update(asked if row["correct"] else ())
        for tally in _TALLY.findall(row["reason"]):
            seen.update({color: int(number) for number, color in (part.split(" ", 1) for part in tally.split(", "))})
    if len(wanted) == 1 or len(seen) != 1 or seen.total() < _FEWEST_OBJECTS:
        return None
    return (
        f"all {seen.total()} objects are called {next(iter(seen))}, although {len(wanted)} colors were asked for: the "
        "color classifier's weights are damaged, or the pictures have no colors"
    )


def no_answers(own: Rows, references: Rows, llm_judge: str = "") -> str | None:
    """Of rows with "settled" and "answer" (and "reply", the chat model's): answers on the model's own pictures, and on
    reference pictures. What is empty or not settled counts as wrong; where all is, 0 would look like a score."""
    rows = [*own, *references]
    lost = [row for row in rows if not row["settled"]]
    if llm_judge and 2 * len(lost) > len(rows):
        return (
            f"{len(lost)} of {len(rows)} replies of the chat model {llm_judge} are no verdict (such as "
            f"{_shown(lost[0]['reply'])}), so there is no score of answers: it is no chat model, is damaged, or thinks "
            "for longer than a reply may be; take another --llm-judge"
        )
    for part, pictures in ((own, "its own pictures"), (references, "reference pictures")):
        if part and not any(row["settled"] and row["answer"].strip() for row in part):
            return (
                f"none of the model's {len(part)} answers on {pictures} can be judged (the first, to "
                f"{part[0]['question']!r}, is {_shown(part[0]['answer'])}), so there is no score of answers: its "
                "weights, tokenizer or --model.roles are not of one model, or --max-new-tokens is too small; where the "
                "answers are sound, have a chat model judge them, --llm-judge"
            )
    return None


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}..."
