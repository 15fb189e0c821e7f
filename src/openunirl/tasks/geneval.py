"""The six GenEval task types: the 553 evaluation prompts, training prompts, and our own questions on both.

    nothing      -> evaluation_prompts()          -> 553 Prompts, GenEval's own records, byte for byte
    n, seed      -> training_prompts(n, seed)     -> n Prompts over 160 object names, none of them an evaluation prompt
    tag, include -> questions_for(tag, include)   -> the Questions that such a record settles

Sources: GenEval (Ghosh et al. 2023, arXiv 2310.11513; object and colour names and the sampling order of its prompts);
UniRL (arXiv 2505.23380; six types, 160 training names). UniRL's released question file is read by tasks/records.py.

Departures from UniRL:
1. Questions and gold answers are worded by us and say what they ask about ("What color is the fire hydrant?").
2. The paper does not list its 80 further training names; OTHER_OBJECTS is ours.
3. Training leaves out not only the evaluation prompts' texts but also the same scenes told the other way round
   ("a cow left of a laptop" for "a laptop right of a cow"). So single_object trains on OTHER_OBJECTS alone:
   all 80 GenEval names are evaluation prompts there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from openunirl.types import Prompt, Question

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
INVERSE_RELATION = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(INVERSE_RELATION)

PERSON = "person"  # never given a color
MOST_OBJECTS = 16
"""So many of a class are counted in a picture, those with the best scores."""

# fmt: off
GENEVAL_OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
"""COCO's 80 things in category order, spelt as GenEval spells them. The order decides the evaluation prompts."""

OTHER_OBJECTS = (
    "lion", "tiger", "camel", "kangaroo", "monkey", "rabbit", "squirrel", "turtle", "frog", "crab", "lobster",
    "dolphin", "shark", "snail", "pig", "goat", "crocodile", "hedgehog", "lemon", "pear", "pumpkin", "mushroom",
    "cucumber", "onion", "avocado", "coconut", "watermelon", "croissant", "egg", "pretzel", "guitar", "violin",
    "piano", "drum", "trumpet", "flute", "harp", "accordion", "saxophone", "hammer", "screwdriver", "shovel", "rake",
    "axe", "ladder", "bucket", "wheelbarrow", "anchor", "padlock", "lamp", "candle", "mirror", "pillow", "towel",
    "teapot", "broom", "bathtub", "basket", "barrel", "hat", "helmet", "shoe", "sock", "jacket", "crown", "camera",
    "telescope", "microscope", "calculator", "typewriter", "helicopter", "rocket", "tractor", "tent", "lighthouse",
    "windmill", "castle", "robot", "balloon", "pencil",
)
"""80 further visible things with regular plurals; none is a kind, a part or another name of another name here."""
# fmt: on

TRAINING_OBJECTS = GENEVAL_OBJECTS + OTHER_OBJECTS

EVALUATION_SEED = 43
EVALUATION_SAMPLES = 100  # drawn for each type but single_object; exact repeats are dropped afterwards
EVALUATION_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
"""Of GenEval's evaluation_metadata.jsonl (djghosh13/geneval, af4902f)."""

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def with_article(noun_phrase: str) -> str:
    """GenEval's rule: "an" before a, e, i, o, u. Example: with_article("orange cow") -> "an orange cow"."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def plural(name: str) -> str:
    """GenEval's rule: "es" after a final s, else "s". Example: "bus" -> "buses", "knife" -> "knifes"."""
    return name + ("es" if name.endswith("s") else "s")


def _numbered(count: int, name: str) -> str:
    word = _NUMBER_WORDS[count] if 0 <= count < len(_NUMBER_WORDS) else str(count)
    return f"{word} {name if count == 1 else plural(name)}"


# ------------------------------------------------------------------------------------------- questions


def questions_for(tag: str, include: Sequence[Mapping[str, Any]]) -> tuple[Question, ...]:
    """The questions a GenEval record settles, with gold answers that the rule matcher can judge under the same `tag`.

    The first is the task's own. The others ask the same scene more strictly: what a first question names, they leave
    to the model, and a position is also asked from the other object's side.
    ValueError if the tag is none of TAGS or the clauses lack what the tag is about. Source: ours (departure 1).
    Example: questions_for("colors", [{"class": "bus", "count": 1, "color": "red"}])[0].answer -> "red"
    """
    if tag not in _ASK:
        raise ValueError(f"tag {tag!r} has no questions; use one of {', '.join(TAGS)}, or write the questions yourself")
    try:
        return tuple(Question(question=question, answer=answer) for question, answer in _ASK[tag](*include))
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError(f"include {list(include)!r} does not describe a {tag} scene as GenEval does") from None


def with_question(prompt: Prompt) -> Prompt:
    """The prompt, with our questions where its record has none of its own."""
    if prompt.questions:
        return prompt
    return replace(prompt, questions=questions_for(prompt.tag, prompt.include))


def _ask_single_object(thing):
    return [("What is the main object in this picture?", thing["class"])]


def _ask_two_object(first, second):
    gold = f"{with_article(first['class'])} and {with_article(second['class'])}"
    return [("Which two objects are in this picture?", gold)]


def _ask_counting(thing):
    gold = _numbered(thing["count"], thing["class"])
    return [
        (f"How many {plural(thing['class'])} are in this picture?", gold),
        ("Which objects are in this picture, and how many of them?", gold),
    ]


def _ask_colors(thing):
    return [
        (f"What color is the {thing['class']}?", thing["color"]),
        ("Which object is in this picture, and what color is it?", f"The {thing['class']} is {thing['color']}"),
    ]


def _ask_position(ground, figure):
    relation = figure["position"][0]
    a, b = figure["class"], ground["class"]
    gold = f"The {a} is {relation} the {b}"
    return [
        (f"Where is the {a} relative to the {b}: left of, right of, above or below it?", gold),
        (
            f"Where is the {b} relative to the {a}: left of, right of, above or below it?",
            f"The {b} is {INVERSE_RELATION[relation]} the {a}",
        ),
        ("Which two objects are in this picture, and where is one relative to the other?", gold),
    ]


def _ask_color_attr(first, second):
    a, b = first["class"], second["class"]
    gold = f"The {a} is {first['color']} and the {b} is {second['color']}"
    return [
        (f"What color is the {a} and what color is the {b}?", gold),
        ("Which two objects are in this picture, and what color is each of them?", gold),
    ]


_ASK = {
    "single_object": _ask_single_object,
    "two_object": _ask_two_object,
    "counting": _ask_counting,
    "colors": _ask_colors,
    "position": _ask_position,
    "color_attr": _ask_color_attr,
}


# ------------------------------------------------------------------------------------------- prompts


def evaluation_prompts() -> list[Prompt]:
    """The 553 GenEval evaluation prompts in their order, each with our questions. Metadata equals GenEval's file.

    RuntimeError if this numpy draws another stream than the one GenEval's file was made with.
    Source: GenEval's prompt sampling, numpy's default_rng(43); exact repeats dropped, the first one kept.
    """
    rng = np.random.default_rng(EVALUATION_SEED)
    total = len(GENEVAL_OBJECTS)
    prompts = [_single_object(GENEVAL_OBJECTS[i]) for i in rng.choice(total, size=total, replace=False)]
    for tag in TAGS[1:]:
        prompts += [_draw(tag, rng, GENEVAL_OBJECTS) for _ in range(EVALUATION_SAMPLES)]
    lines = {json.dumps(prompt.metadata()): prompt for prompt in prompts}
    digest = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    if digest != EVALUATION_SHA256:
        raise RuntimeError(
            f"numpy {np.__version__} draws other evaluation prompts than GenEval's; "
            "install the numpy of constraints.txt, or read GenEval's own file with read_prompts"
        )
    return list(lines.values())


def training_prompts(n: int, seed: int, names: Sequence[str] | None = None) -> list[Prompt]:
    """`n` training prompts over `names` (None: TRAINING_OBJECTS), deterministic in `seed`; a longer list begins with
    the shorter one.

    Every six consecutive prompts hold each of TAGS once, in random order, so the types' counts differ by at most one.
    No prompt equals an evaluation prompt or shows its scene (departure 3); so of GENEVAL_OBJECTS alone there is no
    single_object, and five make a round. A prompt may occur twice (there are 80 single_object ones). ValueError if `n`
    is negative.
    """
    if n < 0:
        raise ValueError(f"n = {n}: ask for at least 0 training prompts")
    rng = np.random.default_rng(seed)
    held_out = {_scene(prompt) for prompt in evaluation_prompts()}
    names = TRAINING_OBJECTS if names is None else names
    tags = TAGS if set(names) - set(GENEVAL_OBJECTS) else TAGS[1:]
    prompts: list[Prompt] = []
    while len(prompts) < n:
        for tag in rng.permutation(tags).tolist():
            prompt = _draw(tag, rng, names)
            while _scene(prompt) in held_out:
                prompt = _draw(tag, rng, names)
            prompts.append(prompt)
    return prompts[:n]


def _draw(tag: str, rng: np.random.Generator, names: Sequence[str]) -> Prompt:
    """One random prompt. The order and the kind of the draws are GenEval's; both decide the evaluation prompts."""
    total = len(names)
    if tag == "single_object":
        return _single_object(names[rng.choice(total)])
    if tag == "two_object":
        a, b = (names[int(i)] for i in rng.choice(total, size=2, replace=False))
        return _prompt(tag, [_clause(a), _clause(b)], f"{with_article(a)} and {with_article(b)}")
    if tag == "counting":
        name = names[rng.choice(total)]
        count = int(rng.integers(2, 4, endpoint=True))
        return _prompt(tag, [_clause(name, count)], _numbered(count, name), exclude=[_clause(name, count + 1)])
    if tag == "position":
        a, b = (names[int(i)] for i in rng.choice(total, size=2, replace=False))
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        include = [_clause(b), {**_clause(a), "position": [relation, 0]}]
        return _prompt(tag, include, f"{with_article(a)} {relation} {with_article(b)}")
    colorable = names[1:] if names[0] == PERSON else names
    if tag == "colors":
        name = colorable[rng.choice(len(colorable))]
        color = COLORS[rng.choice(len(COLORS))]
        return _prompt(tag, [{**_clause(name), "color": color}], with_article(f"{color} {name}"))
    a, b = (colorable[int(i)] for i in rng.choice(len(colorable), size=2, replace=False))
    color_a, color_b = (COLORS[int(i)] for i in rng.choice(len(COLORS), size=2, replace=False))
    include = [{**_clause(a), "color": color_a}, {**_clause(b), "color": color_b}]
    return _prompt(tag, include, f"{with_article(f'{color_a} {a}')} and {with_article(f'{color_b} {b}')}")


def _single_object(name: str) -> Prompt:
    return _prompt("single_object", [_clause(name)], with_article(name))


def _clause(name: str, count: int = 1) -> dict[str, Any]:
    return {"class": name, "count": count}


def _prompt(
    tag: str, include: Sequence[Mapping[str, Any]], what: str, exclude: Sequence[Mapping[str, Any]] = ()
) -> Prompt:
    return Prompt(
        tag=tag,
        include=tuple(include),
        exclude=tuple(exclude),
        prompt=f"a photo of {what}",
        questions=questions_for(tag, include),
    )


def _scene(prompt: Prompt) -> frozenset:
    """What the picture shows, however it is told: "a dog left of a cat" and "a cat right of a dog" are one scene."""
    if prompt.tag == "position":
        ground, figure = prompt.include
        relation = figure["position"][0]
        inverse = (ground["class"], INVERSE_RELATION[relation], figure["class"])
        return frozenset({(figure["class"], relation, ground["class"]), inverse})
    return frozenset((clause["class"], clause["count"], clause.get("color")) for clause in prompt.include)
