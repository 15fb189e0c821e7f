"""What a tiny model is trained on from nothing: (prompt, scene) to draw, (scene, questions, answers) to understand.

In: a numpy Generator. Out: examples of the train split. Source: ours.
The base is to have the imbalance that UniRL starts from, a good eye and a poor hand. Its eye is trained on true answers
only. Its hand is trained on captions of which a share nearly fits: another count, a colour or shape that looks alike,
the relation from the wrong side, two colours exchanged. These are the mistakes that captions of web images make, and
those that GenEval finds in large models; guidance and temperature cannot undo them, because a wrong picture is then
about as likely as the right one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from openunirl.tasks.shapes import (
    INVERSE,
    NONE,
    NUMBERS,
    TAGS,
    Content,
    Query,
    answer_to,
    contents,
    from_either_side,
    sample_scene,
)
from openunirl.tasks.shapes_oracle import COLORS, LATTICE, MAX_THINGS, SHAPES, Scene, sample_graft
from openunirl.types import Prompt, Question

QUESTION_WEIGHTS: Mapping[str, float] = dict.fromkeys(TAGS, 1.0) | {
    "two_object": 4.0,
    "counting": 10.0,
    "position": 6.0,
    "color_attr": 1.5,
}

DRAWING_WEIGHTS: Mapping[str, float] = {
    "single_object": 0.5,
    "two_object": 2.0,
    "counting": 1.5,
    "colors": 0.5,
    "position": 2.0,
    "color_attr": 2.0,
}

_ALIKE = (("circle", "ring"), ("square", "diamond"), ("triangle", "heart"), ("cross", "star"))
_ALIKE += (("red", "orange"), ("yellow", "white"), ("blue", "purple"), ("green", "black"))
LOOKALIKE: Mapping[str, str] = dict(_ALIKE) | {b: a for a, b in _ALIKE}
"""Shape or colour -> the one it is taken for."""


def near_miss(content: Content) -> Content:
    """What a picture shows whose caption tells `content`, but is wrong in one point; always the same point.

    Example: two circles for "three circles"; "blue circle and red star" for "red circle and blue star".
    """
    match content.tag:
        case "counting":
            return replace(content, count=content.count + 1 if content.count < MAX_THINGS else content.count - 1)
        case "colors":
            return replace(content, colors=(LOOKALIKE[content.colors[0]],))
        case "position":
            return replace(content, relation=INVERSE[content.relation])
        case "color_attr":
            return replace(content, colors=content.colors[::-1])
        case _:  # single_object, two_object: the object named first
            return replace(content, shapes=(LOOKALIKE[content.shapes[0]], *content.shapes[1:]))


def training_example(rng: np.random.Generator, near_misses: float = 0.0) -> tuple[Prompt, Scene]:
    """A prompt to draw from the train split, task types as DRAWING_WEIGHTS says, and a scene that satisfies it, or with
    share `near_misses` one that satisfies its near miss."""
    pool = contents(_pick_tag(DRAWING_WEIGHTS, rng), "train")
    content = from_either_side(pool[rng.integers(len(pool))], rng)
    shown = near_miss(content) if rng.random() < near_misses else content
    return content.prompt(), sample_scene(shown.prompt(), rng)


def random_example(
    rng: np.random.Generator,
    negatives: float = 0.2,
    damaged: float = 0.2,
    weights: Mapping[str, float] = QUESTION_WEIGHTS,
    both_sides: bool = False,
    places: bool = False,
) -> tuple[Scene, list[Question]]:
    """A scene and three or four different questions on it, with true answers, to train the answering half.

    The scene is like one of a task type drawn by `weights`, and so are the questions: the first is that type's own.
    With share `damaged` one thing is malformed. With share `negatives` a question names what is not there: another
    shape, another colour, or colours exchanged. Where a scene allows too few other questions, more name what is absent.
    With `both_sides` a question of position is followed by the one from the other side, beyond the three or four: the
    two differ in order only, and without that lesson a model may long know the axis of a relation and not its sense.
    With `places` everything that a shape and a colour name is asked for its place, too.
    What is asked of position and color_attr never has a held-out content as its true answer.
    """
    tag = _pick_tag(weights, rng)
    pool = contents(tag, "train")
    scene = sample_scene(from_either_side(pool[rng.integers(len(pool))], rng).prompt(), rng)
    kinds = [(thing.shape, thing.color) for thing in scene.things]
    if rng.random() < damaged:
        things = list(scene.things)
        broken = int(rng.integers(len(things)))
        things[broken] = replace(things[broken], graft=sample_graft(*kinds[broken], rng))
        scene = Scene(things=tuple(things))
    truths = {query: answer_to(query, scene) for query in _queries(kinds)}
    absent = {query: answer_to(query, scene) for query in _altered(kinds, rng) if query not in truths}
    truths, absent = _askable(truths), _askable(absent)
    asked: list[Question] = []
    for number in range(int(rng.integers(3, 5))):
        pools = (absent, truths) if rng.random() < negatives else (truths, absent)
        own = [[query for query in pool if query.tag == tag] for pool in pools if number == 0]
        candidates = next(filter(None, [*own, list(pools[0]), list(pools[1])]))
        tags = sorted({query.tag for query in candidates})
        shares = np.array([weights[kind] for kind in tags])
        chosen = tags[int(rng.choice(len(tags), p=shares / shares.sum()))]
        candidates = [query for query in candidates if query.tag == chosen]
        query = candidates[int(rng.integers(len(candidates)))]
        told = [query]
        if both_sides and query.tag == "position":
            told.append(replace(query, shapes=query.shapes[::-1], colors=query.colors[::-1]))
        for one in told:
            if answer := truths.pop(one, "") or absent.pop(one, ""):
                asked.append(Question(question=one.text, answer=answer))
    return scene, [*asked, *place_questions(scene)] if places else asked


def place_questions(scene: Scene) -> list[Question]:
    """Where each thing lies that its shape and colour name alone: column and row in five steps from the top left.

    Example: "where is the red circle in this image?", "zero and four" for one in the lower left corner.
    """
    kinds = [(thing.shape, thing.color) for thing in scene.things]
    return [
        Question(
            question=f"where is the {thing.color} {thing.shape} in this image?",
            answer=" and ".join(
                NUMBERS[round(at * (len(NUMBERS) - 1) / (LATTICE - 1))] for at in (thing.column, thing.row)
            ),
        )
        for thing in scene.things
        if thing.graft is None and kinds.count((thing.shape, thing.color)) == 1
    ]


def _pick_tag(weights: Mapping[str, float], rng: np.random.Generator) -> str:
    return str(rng.choice(TAGS, p=np.array([weights[t] for t in TAGS]) / sum(weights[t] for t in TAGS)))


def _queries(kinds: Sequence[tuple[str, str]]) -> list[Query]:
    """Every question that names only the given (shape, colour) kinds, from both sides."""
    queries = [Query(tag="single_object"), Query(tag="two_object")]
    queries += [Query(tag=tag, shapes=(shape,)) for shape, _ in kinds for tag in ("counting", "colors")]
    for (a, color_a), (b, color_b) in itertools.permutations(kinds, 2):
        if a != b:
            queries.append(Query(tag="position", shapes=(a, b), colors=(color_a, color_b)))
            queries.append(Query(tag="color_attr", shapes=(a, b)))
    return list(dict.fromkeys(queries))


def _altered(kinds: Sequence[tuple[str, str]], rng: np.random.Generator) -> list[Query]:
    """Questions that name the kinds with one of them in another colour or shape, or with colours exchanged."""
    shapes, colors = [shape for shape, _ in kinds], [color for _, color in kinds]
    new_shape = str(rng.choice([shape for shape in SHAPES if shape not in shapes]))
    new_color = str(rng.choice([color for color in COLORS if color not in colors]))
    changed = int(rng.integers(len(kinds)))
    others = [kind for i, kind in enumerate(kinds) if i != changed]
    recolored, reshaped = (shapes[changed], new_color), (new_shape, colors[changed])
    exchanged = list(zip(shapes, np.roll(colors, 1).tolist(), strict=True))
    named = [[*others, recolored], [*others, reshaped], exchanged, [kinds[changed], (new_shape, new_color)]]
    return [query for some in named for query in _queries(some)]


def _askable(answers: Mapping[Query, str | None]) -> dict[Query, str]:
    """Without the questions that have no single answer and those whose answer states a held-out content."""
    kept: dict[Query, str] = {}
    for query, answer in answers.items():
        if answer is not None:
            stated = query.tag in ("position", "color_attr") and NONE not in answer.split()
            colors, relation = (query.colors, answer) if query.tag == "position" else (tuple(answer.split(" and ")), "")
            content = Content(tag=query.tag, shapes=query.shapes, colors=colors, relation=relation)
            if not stated or content.split() == "train":
                kept[query] = answer
    return kept
