"""GenEval's scorer: does one image show what its prompt asks for, and how often over a whole set?

    detections of one class, tag   -> keep       -> indices of the objects that count
    metadata, detections, colors   -> score      -> Verdict (correct, reason)
    judge, metadata, pictures      -> judge_pictures -> one Verdict a picture
    results (tag, prompt, correct) -> summarize  -> GenEvalSummary (accuracies with n and 95 % intervals)
                                   -> official_summary -> the text that GenEval's summary_scores.py prints

Source: GenEval (Ghosh et al. 2023, arXiv 2310.11513), its evaluate_images.py and summary_scores.py. Verdicts and
reasons equal the official ones (tests/parity/test_geneval_cases.py), which needs float32 wherever they use it.

Departures:
1. In a reason two relations are written left/right before above/below; officially the order is a set's.
2. Every accuracy carries a Wilson interval; that of the overall score combines the tasks' intervals as independent
   ones (MOVER, Zou and Donner 2008). Images of one prompt are counted as independent, so intervals are narrow there.
3. Scores or boxes that are not finite are an error (a detector in half precision), not a silent "found 0"; so are
   position targets that are no earlier clause, which officially end in an IndexError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openunirl.evaluation.intervals import mean_interval, wilson
from openunirl.tasks.geneval import COLORS, MOST_OBJECTS
from openunirl.types import Detection, Judge, Verdict

Box = Sequence[float]
ColorsOf = Callable[[str, list[Detection]], Sequence[str]]
"""(class name, kept detections) -> one color name for each."""

_DEAD_ZONE = np.float32(1e-3)  # a revised offset below it, in pixels, is no offset
_COSINE = np.float32(0.5)  # a direction holds within 60 degrees


@dataclass(frozen=True, kw_only=True)
class ScoreParams:
    """GenEval's thresholds. Example: ScoreParams(max_overlap=0.5)

    threshold, counting_threshold: a detection counts above this score (the second for tag "counting").
    max_objects: at most so many objects of a class. max_overlap: IoU from which the lower score is dropped; 1 = never.
    position_threshold: share of both objects' sizes by which an offset must exceed to be one.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = MOST_OBJECTS
    max_overlap: float = 1.0
    position_threshold: float = 0.1


OFFICIAL = ScoreParams()


# ------------------------------------------------------------------------------------------- geometry


def iou(box_a: Box, box_b: Box) -> float:
    """Intersection over union of two (x0, y0, x1, y1) boxes, in float32; a side from 2 to 5 is 4 pixels long.

    Negative sides count as 0; 0.0 where the union is empty.
    """
    a, b = np.asarray(box_a, np.float32), np.asarray(box_b, np.float32)
    shared = _area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]))
    union = _area(a) + _area(b) - shared
    return float(shared / union) if union else 0.0


def _area(box: np.ndarray) -> np.float32:
    width, height = np.maximum(box[2:] - box[:2] + np.float32(1), np.float32(0))
    return width * height


def relations(box_a: Box, box_b: Box, position_threshold: float = OFFICIAL.position_threshold) -> tuple[str, ...]:
    """Where A lies relative to B: none, one or two of "left of", "right of", "above", "below", in this order.

    Boxes are (x0, y0, x1, y1) in pixels, y downwards. The offset of the centres is shortened on each axis by
    position_threshold times both sizes; what is left is compared with the length of the whole offset.
    """
    corners_a = np.asarray(box_a, np.float32).reshape(2, 2)
    corners_b = np.asarray(box_b, np.float32).reshape(2, 2)
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
    sizes = np.abs(corners_a[1] - corners_a[0]) + np.abs(corners_b[1] - corners_b[0])
    beyond = np.maximum(np.abs(offset) - np.float32(position_threshold) * sizes, np.float32(0)) * np.sign(offset)
    if (np.abs(beyond) < _DEAD_ZONE).all():
        return ()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = {"left of": dx < -_COSINE, "right of": dx > _COSINE, "above": dy < -_COSINE, "below": dy > _COSINE}
    return tuple(name for name, true in holds.items() if true)


# ------------------------------------------------------------------------------------------- one image


def keep(detections: Sequence[Detection], tag: str, params: ScoreParams = OFFICIAL) -> list[int]:
    """Indices of the objects of one class that count, best score first; of equal scores the later one first.

    Cut by score (float32, strictly above), then to max_objects, then by overlap. ValueError for a box or a score that
    is not finite.
    """
    if not detections:
        return []
    scores = np.array([detection.score for detection in detections], np.float32)
    boxes = np.array([detection.box for detection in detections], np.float32)
    for index in range(len(detections)):
        if not (np.isfinite(scores[index]) and np.isfinite(boxes[index]).all()):
            raise ValueError(
                f"detection {index} is not finite: box {detections[index].box}, score {detections[index].score}; the "
                "detector's weights are probably damaged, or it does not run in float32"
            )
    threshold = np.float32(params.counting_threshold if tag == "counting" else params.threshold)
    best_first = np.argsort(scores, kind="stable")[::-1]
    candidates = [int(index) for index in best_first if scores[index] > threshold][: params.max_objects]
    if params.max_overlap == 1:
        return candidates
    max_overlap = np.float32(params.max_overlap)
    kept: list[int] = []
    for index in candidates:
        if all(np.float32(iou(boxes[index], boxes[other])) < max_overlap for other in kept):
            kept.append(index)
    return kept


def score(
    metadata: Mapping[str, Any],
    detections: Mapping[str, Sequence[Detection]],
    colors: ColorsOf,
    params: ScoreParams = OFFICIAL,
) -> Verdict:
    """GenEval's verdict on one image.

    metadata: tag, include, exclude (Prompt.metadata()). detections: class name -> detections before any threshold, in
    detector order; a class that is missing has none. `colors` is asked only about the objects a clause claims.
    ValueError for a position target that is no earlier clause, for detections that are not finite, or for a number of
    colors other than that of the objects.
    """
    kept: dict[str, list[Detection]] = {}
    for name, found in detections.items():
        kept[name] = [found[index] for index in keep(found, metadata["tag"], params)]
    reasons: list[str] = []
    claimed: list[list[Detection] | None] = []  # for each include clause its objects, None where it failed
    for clause in metadata.get("include", ()):
        objects = kept.get(clause["class"], [])[: clause["count"]]
        failure = _missing(clause, objects) or _miscolored(clause, objects, colors)
        failure = failure or _misplaced(clause, objects, claimed, params.position_threshold)
        claimed.append(None if failure else objects)
        reasons += [failure] if failure else []
    for clause in metadata.get("exclude", ()):
        number = len(kept.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    details = {name: [[*each.box, each.score] for each in objects] for name, objects in kept.items() if objects}
    return Verdict(correct=not reasons, reason="\n".join(reasons), details=details)


def judge_pictures(
    judge: Judge, metadata: Sequence[Mapping[str, Any]], pictures: Sequence[np.ndarray]
) -> list[Verdict]:
    """One verdict for each uint8 RGB picture [H, W, 3] and its prompt's metadata record.

    ValueError, naming the picture and its prompt, where `score` raises one.
    """
    verdicts: list[Verdict] = []
    for record, picture, found in zip(metadata, pictures, judge.detect(pictures), strict=True):

        def colors(name: str, objects: list[Detection], picture: np.ndarray = picture) -> Sequence[str]:
            return judge.colors(picture, objects, name)

        try:
            verdicts.append(score(record, found, colors))
        except ValueError as error:
            raise ValueError(f"picture {len(verdicts)} (prompt {record['prompt']!r}): {error}") from error
    return verdicts


def _missing(clause: Mapping[str, Any], objects: list[Detection]) -> str:
    """Why the clause fails for want of objects; "" if there are enough."""
    if len(objects) >= clause["count"]:
        return ""
    return f"expected {clause['class']}>={clause['count']}, found {len(objects)}"


def _miscolored(clause: Mapping[str, Any], objects: list[Detection], colors: ColorsOf) -> str:
    """Why the clause fails by color; "" if it names none or enough objects have it."""
    if "color" not in clause:
        return ""
    name, color = clause["class"], clause["color"]
    seen = list(colors(name, objects))
    if len(seen) != len(objects):
        raise ValueError(f"the color classifier named {len(seen)} colors for {len(objects)} objects of class {name!r}")
    if seen.count(color) >= clause["count"]:
        return ""
    others = sorted(set(seen) - set(COLORS))
    tally = ", ".join(f"{seen.count(each)} {each}" for each in (*COLORS, *others) if each in seen)
    return f"expected {color} {name}>={clause['count']}, found {seen.count(color)} {color}; and {tally}"


def _misplaced(
    clause: Mapping[str, Any],
    objects: list[Detection],
    claimed: Sequence[list[Detection] | None],
    position_threshold: float,
) -> str:
    """Why the clause fails by position; "" if it names none or every pair of objects holds it."""
    if "position" not in clause:
        return ""
    name, (relation, target) = clause["class"], clause["position"]
    if not 0 <= target < len(claimed):
        raise ValueError(f"position target {target} of clause {len(claimed)} ({name!r}) should be an earlier clause")
    targets = claimed[target]
    if targets is None:
        return f"no target for {name} to be {relation}"
    for a in objects:
        for b in targets:
            true = relations(a.box, b.box, position_threshold)
            if relation not in true:
                return f"expected {name} {relation} target, found {' and '.join(true)} target"
    return ""


# ------------------------------------------------------------------------------------------- many images


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A share of right ones. Example: Accuracy(accuracy=0.8, correct=8, n=10, ci95=(0.49, 0.94))"""

    accuracy: float
    correct: int
    n: int
    ci95: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class GenEvalSummary:
    """All accuracies of one evaluation; dataclasses.asdict gives what goes into its JSON.

    overall: unweighted mean over the tasks present, `n` images in all. tasks, images: over images; prompts_any and
    prompts_all: over distinct prompts, right if any or if all of their images are (GenEval prints the first).

    Example: GenEvalSummary(overall=0.8, n=10, ci95=(0.49, 0.94), tasks={"colors": Accuracy(...)}, images=Accuracy(...),
                            prompts_any=Accuracy(...), prompts_all=Accuracy(...))
    """

    overall: float
    n: int
    ci95: tuple[float, float]
    tasks: dict[str, Accuracy]
    images: Accuracy
    prompts_any: Accuracy
    prompts_all: Accuracy


def summarize(results: Sequence[Mapping[str, Any]]) -> GenEvalSummary:
    """Accuracies over rows with the keys tag, prompt and correct (a bool), one for each image; tasks as they appear.
    Rows of one prompt are those of one metadata, or, where they hold none as a text, of one tag and prompt.

    ValueError for no rows, or for a row without these keys.
    """
    if not results:
        raise ValueError("no results to summarize: score at least one image")
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[Any, list[bool]] = {}
    for number, row in enumerate(results, start=1):
        if not {"tag", "prompt", "correct"} <= row.keys() or not isinstance(row["correct"], bool | np.bool_):
            raise ValueError(f"result {number} is {dict(row)!r}: it needs tag, prompt and correct (true or false)")
        by_tag.setdefault(row["tag"], []).append(bool(row["correct"]))
        own = row.get("metadata")  # what summary_scores.py groups by: one text may stand for two scenes
        by_prompt.setdefault(own if isinstance(own, str) else (row["tag"], row["prompt"]), []).append(
            bool(row["correct"])
        )
    tasks = {tag: _accuracy(verdicts) for tag, verdicts in by_tag.items()}
    overall = sum(task.accuracy for task in tasks.values()) / len(tasks)
    return GenEvalSummary(
        overall=overall,
        n=len(results),
        ci95=mean_interval([(task.accuracy, *task.ci95) for task in tasks.values()]),
        tasks=tasks,
        images=_accuracy([verdict for verdicts in by_tag.values() for verdict in verdicts]),
        prompts_any=_accuracy([any(verdicts) for verdicts in by_prompt.values()]),
        prompts_all=_accuracy([all(verdicts) for verdicts in by_prompt.values()]),
    )


def _accuracy(verdicts: Sequence[bool]) -> Accuracy:
    correct, n = sum(verdicts), len(verdicts)
    return Accuracy(accuracy=correct / n, correct=correct, n=n, ci95=wilson(correct, n))


def official_summary(results: Sequence[Mapping[str, Any]]) -> str:
    """What GenEval's summary_scores.py prints for these rows, final newline included. ValueError as summarize."""
    summary = summarize(results)
    tasks = [f"{tag:<16} = {task.accuracy:.2%} ({task.correct} / {task.n})" for tag, task in summary.tasks.items()]
    lines = [
        "Summary",
        "=======",
        f"Total images: {summary.n}",
        f"Total prompts: {summary.prompts_any.n}",
        f"% correct images: {summary.images.accuracy:.2%}",
        f"% correct prompts: {summary.prompts_any.accuracy:.2%}",
        "",
        "Task breakdown",
        "==============",
        *tasks,
        "",
        f"Overall score (avg. over tasks): {summary.overall:.5f}",
    ]
    return "\n".join(lines) + "\n"
