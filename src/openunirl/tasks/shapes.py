"""GenEval's six task types in the synthetic world: prompts, scenes that satisfy them, questions, and the truth.

In: a seed or a numpy Generator. Out: Prompts (types.py), Scenes (shapes_oracle.py draws them), questions with answers.
Source: the tags, prompts and metadata follow GenEval (Ghosh et al. 2023, arXiv 2310.11513); the world itself is ours.

Departures from GenEval:
1. Position prompts name colours, so that enough different contents exist to hold some of them out.
2. The objects are drawn shapes, so an exact oracle takes the place of the detector.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from openunirl.evaluation.geneval import relations
from openunirl.tasks.shapes_oracle import (
    CELL,
    COLORS,
    LATTICE,
    MAX_THINGS,
    SHAPES,
    SPACING,
    TEMPLATE_BOXES,
    Scene,
    Thing,
)
from openunirl.tasks.shapes_oracle import render as render  # offered here too, with the scenes
from openunirl.tasks.shapes_oracle import render_batch as render_batch
from openunirl.types import Match, Prompt, Question

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = ("zero", "one", "two", "three", "four")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(INVERSE)
NONE = "none"
SPLITS = ("train", "validation", "heldout")
_TEXTS = {
    "single_object": "what is the main item in this image?",
    "two_object": "what are two items in this image?",
    "counting": "how many {plural} are in this image?",
    "colors": "what is the color of the {a}?",
    "position": "where is the {color_a} {a} relative to the {color_b} {b}?",
    "color_attr": "what are the colors of the {a} and the {b}?",
}


@cache
def _relation(shape_a: str, shape_b: str, columns: int, rows: int) -> str | None:
    (ax0, ay0, ax1, ay1), box_b = TEMPLATE_BOXES[shape_a], TEMPLATE_BOXES[shape_b]
    dx, dy = columns * CELL, rows * CELL
    holding = {relations((ax0 + dx, ay0 + dy, ax1 + dx, ay1 + dy), box_b, slack) for slack in (0.05, 0.1, 0.15)}
    return next(iter(holding))[0] if len(holding) == 1 and len(next(iter(holding))) == 1 else None


def relation_between(a: Thing, b: Thing) -> str | None:
    """Where a is relative to b by GenEval's rule on their boxes, if exactly one relation holds, and clearly.

    None if none or two hold, or if a position threshold somewhat below or above GenEval's 0.1 would change that: then
    boxes that are a pixel off could change the verdict.
    """
    return _relation(a.shape, b.shape, a.column - b.column, a.row - b.row)


# ------------------------------------------------------------------------------------------ questions


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question before it is worded: the task type it belongs to and what it names.

    Example: Query(tag="position", shapes=("circle", "square"), colors=("red", "blue"))
    """

    tag: str
    shapes: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        a, b = (*self.shapes, "", "")[:2]
        color_a, color_b = (*self.colors, "", "")[:2]
        return _TEXTS[self.tag].format(a=a, b=b, color_a=color_a, color_b=color_b, plural=plural(a))


def answer_to(query: Query, scene: Scene) -> str | None:
    """The true answer on any scene, absent and malformed things being "none" (a count: "zero").

    None where the question has no single answer and must not be asked: more than one class (single_object), more than
    two items (two_object), several items of a named kind, or a pair without exactly one clear relation (position).
    """
    match query.tag:
        case "single_object":
            classes = {thing.shape for thing in scene.items} or {NONE}
            return classes.pop() if len(classes) == 1 else None
        case "two_object":
            classes = sorted((thing.shape for thing in scene.items), key=SHAPES.index)
            return " and ".join([*classes, NONE, NONE][:2]) if len(classes) <= 2 else None
        case "counting":
            return NUMBERS[len(scene.of(query.shapes[0]))]
        case "colors" | "color_attr":
            found = [scene.of(shape) for shape in query.shapes]
            if any(len(things) > 1 for things in found):
                return None
            return " and ".join(things[0].color if things else NONE for things in found)
        case "position":
            found = [scene.of(shape, color) for shape, color in zip(query.shapes, query.colors, strict=True)]
            if any(len(things) > 1 for things in found):
                return None
            return relation_between(found[0][0], found[1][0]) if all(found) else NONE
        case _:
            raise ValueError(f"unknown task type {query.tag!r}; one of {TAGS}")


def match(tag: str, expected: str, answer: str) -> Match:
    """Whether an answer means the gold answer: equal words, case and spacing aside; a list of shapes has no order."""
    words = [" ".join(text.lower().split()) for text in (expected, answer)]
    parts = [sorted(text.split(" and ")) for text in words]
    unordered = all(part in (*SHAPES, NONE) for part in parts[0])
    same = parts[0] == parts[1] if unordered else words[0] == words[1]
    return Match(same=same, why=f"{tag}: {words[1]!r} {'is' if same else 'is not'} {words[0]!r}")


def plural(shape: str) -> str:
    """GenEval's naive plural."""
    return shape + ("es" if shape.endswith("s") else "s")


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def vocabulary() -> list[str]:
    """Every word of every prompt, question and answer, sorted; "?" is a word of its own."""
    texts = ["a an photo of and ?", *SHAPES, *map(plural, SHAPES), *COLORS, *NUMBERS, *RELATIONS, NONE]
    texts += [text.format(a="", b="", color_a="", color_b="", plural="").replace("?", " ?") for text in _TEXTS.values()]
    return sorted({word for text in texts for word in text.split()})


# -------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a prompt is about. Example: Content(tag="color_attr", shapes=("circle", "star"), colors=("red", "blue"))

    `count` is for counting; `relation`, of the first object to the second, for position.
    """

    tag: str
    shapes: tuple[str, ...]
    colors: tuple[str, ...] = ()
    relation: str = ""
    count: int = 1

    def flipped(self) -> Content:
        """The same content told from the other object's side."""
        relation = INVERSE.get(self.relation, "")
        return Content(tag=self.tag, shapes=self.shapes[::-1], colors=self.colors[::-1], relation=relation)

    def split(self) -> str:
        """train, validation or heldout by a hash that is the same from both sides, for every seed and machine."""
        first_named = self if list(self.shapes) == sorted(self.shapes, key=SHAPES.index) else self.flipped()
        text = "|".join((self.tag, first_named.relation, *first_named.shapes, *first_named.colors))
        tenth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
        return {8: "validation", 9: "heldout"}.get(tenth, "train")

    def prompt(self) -> Prompt:
        """The task record, in GenEval's form."""
        pairs = itertools.zip_longest(self.colors, self.shapes, fillvalue="")
        names = [_with_article(f"{color} {shape}".strip()) for color, shape in pairs]
        include = [{"class": shape, "count": self.count} for shape in self.shapes]
        for clause, color in zip(include, self.colors, strict=False):
            clause["color"] = color
        text, exclude = " and ".join(names), ()
        if self.tag == "counting":
            text = f"{NUMBERS[self.count]} {plural(self.shapes[0])}"
            exclude = ({"class": self.shapes[0], "count": self.count + 1},)
        elif self.tag == "position":
            text = f"{names[0]} {self.relation} {names[1]}"
            include = [include[1], {**include[0], "position": [self.relation, 0]}]
        return Prompt(
            tag=self.tag,
            include=tuple(include),
            exclude=exclude,
            prompt=f"a photo of {text}",
            questions=tuple(Question(question=query.text, answer=answer) for query, answer in self._asked()),
        )

    def _asked(self) -> list[tuple[Query, str]]:
        """The task's own question, then further ones that the prompt settles, with their answers: in training they say
        which part of a picture is right."""
        shapes = " and ".join(sorted(self.shapes, key=SHAPES.index))
        main, both = (Query(tag="single_object"), shapes), (Query(tag="two_object"), shapes)
        named = self.colors if self.tag == "position" else ()
        own = Query(tag=self.tag, shapes=self.shapes, colors=named)
        other = Query(tag=self.tag, shapes=self.shapes[::-1], colors=named[::-1])
        each = [(Query(tag="counting", shapes=(shape,)), NUMBERS[1]) for shape in self.shapes]
        return {
            "single_object": [main, *each],
            "two_object": [both, *each],
            "counting": [(own, NUMBERS[self.count]), main],
            "colors": [(own, " and ".join(self.colors)), main, *each],
            "position": [(own, self.relation), (other, INVERSE.get(self.relation, "")), both],
            "color_attr": [(own, " and ".join(self.colors)), (other, " and ".join(self.colors[::-1])), both],
        }[self.tag]


@cache
def contents(tag: str, split: str) -> tuple[Content, ...]:
    """Every content of a task type in a split, once, told from one side; ValueError for an unknown tag or split.

    The contents of position and color_attr are divided over the splits (about 80/10/10, by content: every object pair
    and every relation occurs in train). The other four types have few contents, and every split has all of them.
    """
    if tag not in TAGS or split not in SPLITS:
        raise ValueError(f"no task type {tag!r} in split {split!r}; take one of {TAGS} and one of {SPLITS}")
    pairs, color_pairs = list(itertools.combinations(SHAPES, 2)), list(itertools.permutations(COLORS, 2))
    match tag:
        case "single_object":
            return tuple(Content(tag=tag, shapes=(shape,)) for shape in SHAPES)
        case "two_object":
            return tuple(Content(tag=tag, shapes=pair) for pair in pairs)
        case "counting":
            counts = itertools.product(SHAPES, range(2, MAX_THINGS + 1))
            return tuple(Content(tag=tag, shapes=(shape,), count=count) for shape, count in counts)
        case "colors":
            return tuple(Content(tag=tag, shapes=(s,), colors=(c,)) for s, c in itertools.product(SHAPES, COLORS))
    everything = (
        Content(tag=tag, shapes=pair, colors=colors, relation=relation)
        for pair, colors, relation in itertools.product(pairs, color_pairs, RELATIONS if tag == "position" else [""])
    )
    return tuple(content for content in everything if content.split() == split)


def prompts(split: str, n: int, seed: int) -> list[Prompt]:
    """n prompts of a split ("train", "validation", "heldout"), the six task types in turn; the same for the same seed.

    Within a call each content of a type comes once, from a random side, before any comes twice. For position and
    color_attr no content is in two splits; for the other types only scenes and seeds differ (see `contents`).
    """
    pools = [contents(tag, split) for tag in TAGS]
    streams = [
        _shuffled_cycles(pool, np.random.default_rng([seed, SPLITS.index(split), i])) for i, pool in enumerate(pools)
    ]
    return [next(streams[i % len(TAGS)]).prompt() for i in range(n)]


def _shuffled_cycles(pool: Sequence[Content], rng: np.random.Generator) -> Iterator[Content]:
    while True:
        for i in rng.permutation(len(pool)):
            yield from_either_side(pool[i], rng)


def from_either_side(content: Content, rng: np.random.Generator) -> Content:
    return content.flipped() if len(content.shapes) == 2 and rng.random() < 0.5 else content


# --------------------------------------------------------------------------------------------- sampling


@cache
def _layouts(n: int) -> np.ndarray:
    """[layouts, n, 2] every set of n (column, row) places that are far enough apart; n up to MAX_THINGS."""
    places = [(column, row) for column in range(LATTICE) for row in range(LATTICE)]
    sets: list[list[tuple[int, int]]] = [[]]
    for _ in range(n):
        sets = [
            [*chosen, place]
            for chosen in sets
            for place in places
            if all(
                place > other and max(abs(place[0] - other[0]), abs(place[1] - other[1])) >= SPACING for other in chosen
            )
        ]
    return np.array(sets)


def sample_scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A picture's content that satisfies the prompt, and nothing else in it: places and unnamed colours are random.

    A position pair is placed where exactly the asked relation holds. ValueError for objects outside this world.
    """
    wanted = [(clause["class"], clause.get("color")) for clause in prompt.include for _ in range(clause["count"])]
    if not 1 <= len(wanted) <= MAX_THINGS:
        raise ValueError(f"{prompt.prompt!r} asks for {len(wanted)} things; a scene holds 1 to {MAX_THINGS}")
    kinds = [(shape, color or COLORS[rng.integers(len(COLORS))]) for shape, color in wanted]
    relation = prompt.include[-1].get("position", [None])[0]
    layouts = _layouts(len(kinds))
    while True:
        places = rng.permutation(layouts[rng.integers(len(layouts))])
        things = [
            Thing(shape=shape, color=color, column=int(column), row=int(row))
            for (shape, color), (column, row) in zip(kinds, places, strict=True)
        ]
        # the second clause's object is the one that is placed relative to the first's
        if relation is None or relation_between(things[1], things[0]) == relation:
            return Scene(things=tuple(things))
