"""The synthetic world: its prompts, its truth, its pictures, and the oracle against GenEval's scorer."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from openunirl.evaluation.geneval import relations, score
from openunirl.tasks import shapes, shapes_examples
from openunirl.tasks.shapes import Query, answer_to
from openunirl.tasks.shapes_oracle import Graft, Oracle, Scene, Thing, clearly_malformed, render, render_batch

ORACLE = Oracle()


def thing(color: str, shape: str, column: int, row: int, graft: Graft | None = None) -> Thing:
    return Thing(shape=shape, color=color, column=column, row=row, graft=graft)


def verdict(prompt, picture):
    found = ORACLE.detect([picture])[0]
    return score(prompt.metadata(), found, lambda name, objects: ORACLE.colors(picture, objects, name))


PAIR = Scene(things=(thing("red", "circle", 0, 2), thing("blue", "square", 4, 2)))
HALF = Graft(shape=None, color="red", cells=(0, 1, 2, 3, 4))
BROKEN = Scene(things=(thing("red", "circle", 0, 2, HALF), thing("blue", "square", 4, 2)))
STARS = Scene(things=tuple(thing(color, "star", 0, row) for color, row in (("red", 0), ("red", 3))))
EMPTY = Scene(things=())

# ------------------------------------------------------------------------------------------- pictures


def test_a_thing_lies_in_its_own_block_in_its_color():
    picture = render(PAIR, np.random.default_rng(0)).astype(float) / 255
    assert picture.shape == (64, 64, 3)
    np.testing.assert_allclose(picture[28, 12], (0.88, 0.10, 0.12), atol=0.06)  # the circle's centre: row 2, column 0
    np.testing.assert_allclose(picture[28, 44], (0.12, 0.28, 0.90), atol=0.06)
    outside = np.ones((64, 64), dtype=bool)
    outside[16:40, 0:24] = outside[16:40, 32:56] = False
    np.testing.assert_allclose(picture[outside], 0.62, atol=0.06)
    assert 0.008 < picture[outside].std() < 0.012


def test_a_picture_depends_on_its_generator_only():
    pictures = render_batch([PAIR, PAIR], np.random.default_rng(3))
    assert np.array_equal(pictures[0], render(PAIR, np.random.default_rng(3)))
    assert not np.array_equal(pictures[0], pictures[1])


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="pink"):
        thing("pink", "circle", 0, 0)
    with pytest.raises(ValueError, match="column 6"):
        thing("red", "circle", 6, 0)
    with pytest.raises(ValueError, match="closer than 3"):
        Scene(things=(thing("red", "circle", 0, 0), thing("red", "circle", 2, 2)))
    with pytest.raises(ValueError, match="recognisable"):
        thing("red", "circle", 0, 0, Graft(shape=None, color="red", cells=(0,)))
    with pytest.raises(ValueError, match="test"):
        shapes.prompts("test", 6, 0)
    with pytest.raises(ValueError, match="float64"):
        ORACLE.detect([np.zeros((64, 64, 3))])


def test_damage_is_never_borderline():
    everything = tuple(range(9))
    assert not clearly_malformed("circle", "red", Graft(shape="circle", color="red", cells=(0, 1, 2, 3)))  # no change
    assert not clearly_malformed(
        "circle", "red", Graft(shape="square", color="blue", cells=everything)
    )  # a blue square
    assert clearly_malformed("circle", "red", Graft(shape="circle", color="blue", cells=(0, 1, 2, 3, 4)))
    assert clearly_malformed("circle", "red", Graft(shape=None, color="red", cells=everything))


# ---------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize(
    ("tag", "named", "colors", "scene", "answer"),
    [
        ("single_object", (), (), PAIR, None),
        ("single_object", (), (), BROKEN, "square"),
        ("single_object", (), (), STARS, "star"),
        ("single_object", (), (), EMPTY, "none"),
        ("two_object", (), (), PAIR, "circle and square"),
        ("two_object", (), (), BROKEN, "square and none"),
        ("two_object", (), (), STARS, "star and star"),
        ("two_object", (), (), EMPTY, "none and none"),
        ("counting", ("star",), (), STARS, "two"),
        ("counting", ("circle",), (), BROKEN, "zero"),
        ("colors", ("square",), (), PAIR, "blue"),
        ("colors", ("circle",), (), BROKEN, "none"),
        ("colors", ("star",), (), STARS, None),
        ("position", ("circle", "square"), ("red", "blue"), PAIR, "left of"),
        ("position", ("square", "circle"), ("blue", "red"), PAIR, "right of"),
        ("position", ("circle", "square"), ("blue", "red"), PAIR, "none"),
        ("position", ("circle", "square"), ("red", "blue"), BROKEN, "none"),
        ("color_attr", ("circle", "square"), (), PAIR, "red and blue"),
        ("color_attr", ("square", "circle"), (), PAIR, "blue and red"),
        ("color_attr", ("square", "circle"), (), BROKEN, "blue and none"),
        ("color_attr", ("star", "circle"), (), STARS, None),
    ],
)
def test_the_truth_on_any_scene(tag, named, colors, scene, answer):
    assert answer_to(Query(tag=tag, shapes=named, colors=colors), scene) == answer


def test_relations_are_genevals_and_clear():
    clear = 0
    for column, row in itertools.product(range(6), repeat=2):
        if max(abs(column - 2), abs(row - 2)) >= 3:
            a, b = thing("red", "heart", column, row), thing("blue", "ring", 2, 2)
            relation = shapes.relation_between(a, b)
            if relation is not None:
                clear += 1
                assert relations(a.box, b.box) == (relation,)
                assert shapes.relation_between(b, a) == shapes.INVERSE[relation]
    assert clear > 5
    diagonal = shapes.relation_between(thing("red", "circle", 0, 0), thing("blue", "square", 3, 3))
    assert diagonal is None  # left of and above both hold


def test_match():
    assert shapes.match("colors", "red", " Red ").same
    assert shapes.match("two_object", "circle and square", "square and circle").same
    assert not shapes.match("two_object", "circle and circle", "circle and square").same
    assert not shapes.match("color_attr", "red and blue", "blue and red").same
    assert not shapes.match("counting", "two", "").same


# -------------------------------------------------------------------------------------------- prompts


def test_prompts_have_genevals_form():
    by_tag = {prompt.tag: prompt for prompt in shapes.prompts("train", 6, 0)}
    assert list(by_tag) == list(shapes.TAGS)
    content = shapes.Content(tag="position", shapes=("circle", "star"), colors=("red", "orange"), relation="left of")
    assert content.prompt().metadata() == {
        "tag": "position",
        "include": [
            {"class": "star", "count": 1, "color": "orange"},
            {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
        "prompt": "a photo of a red circle left of an orange star",
    }
    assert [(q.question, q.answer) for q in content.prompt().questions] == [
        ("where is the red circle relative to the orange star?", "left of"),
        ("where is the orange star relative to the red circle?", "right of"),
        ("what are two items in this image?", "circle and star"),
    ]
    assert shapes.Content(tag="counting", shapes=("cross",), count=3).prompt().metadata() == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }


def sides(pool) -> set[str]:
    """The prompts of contents, from both sides."""
    return {side.prompt().prompt for content in pool for side in (content, content.flipped())}


def test_splits_are_disjoint_by_content_and_reproducible():
    assert shapes.prompts("heldout", 30, 5) == shapes.prompts("heldout", 30, 5)
    assert shapes.prompts("heldout", 30, 5) != shapes.prompts("heldout", 30, 6)
    for tag in ("position", "color_attr"):
        pools = {split: set(shapes.contents(tag, split)) for split in shapes.SPLITS}
        total = sum(map(len, pools.values()))
        assert total == len(set.union(*pools.values())) == 28 * 56 * (4 if tag == "position" else 1)
        assert 0.77 < len(pools["train"]) / total < 0.83
        assert all(content.flipped().split() == content.split() for content in pools["heldout"])
        texts = {
            split: {side.prompt().prompt for c in pool for side in (c, c.flipped())} for split, pool in pools.items()
        }
        assert not texts["train"] & (texts["heldout"] | texts["validation"])
        triples = {(content.shapes, content.relation) for content in set.union(*pools.values())}
        assert triples == {(content.shapes, content.relation) for content in pools["train"]}
    assert shapes.Content(tag="color_attr", shapes=("circle", "star"), colors=("red", "blue")).split() == "train"


def test_contents_repeat_only_after_all_were_used():
    counting = [prompt.prompt for prompt in shapes.prompts("train", 6 * 48, 0) if prompt.tag == "counting"]
    assert set(Counter(counting[:24]).values()) == set(Counter(counting[24:]).values()) == {1}


def test_scenes_satisfy_their_prompts_and_hold_nothing_else():
    rng = np.random.default_rng(1)
    for prompt in shapes.prompts("validation", 120, 1):
        scene = shapes.sample_scene(prompt, rng)
        assert len(scene.things) == sum(clause["count"] for clause in prompt.include)
        truths = {
            query.text: answer_to(query, scene)
            for query in shapes_examples._queries([(item.shape, item.color) for item in scene.things])
        }
        assert [truths[question.question] for question in prompt.questions] == [q.answer for q in prompt.questions]


def test_the_vocabulary_covers_every_text():
    words = set(shapes.vocabulary())
    rng = np.random.default_rng(2)
    asked = [question for _ in range(500) for question in shapes_examples.random_example(rng, 0.5, 0.5)[1]]
    texts = [text for question in asked for text in (question.question, question.answer)]
    for prompt in shapes.prompts("train", 1200, 0):
        texts += [prompt.prompt, *(question.question for question in prompt.questions)]
    assert {word for text in texts for word in text.replace("?", " ?").split()} == words


def test_random_examples_ask_what_they_should():
    rng = np.random.default_rng(3)
    plain = [shapes_examples.random_example(rng, negatives=0.0, damaged=0.0) for _ in range(300)]
    hard = [shapes_examples.random_example(rng, negatives=1.0, damaged=1.0) for _ in range(300)]
    for _, asked in plain + hard:
        assert 3 <= len({question.question for question in asked}) == len(asked) <= 4
    assert all(item.graft is None for scene, _ in plain for item in scene.things)
    assert all(sum(item.graft is not None for item in scene.things) == 1 for scene, _ in hard)

    def share(examples):
        answers = [question.answer for _, asked in examples for question in asked]
        return np.mean(["none" in answer or answer == "zero" for answer in answers])

    assert share(plain) < 0.3 and share(hard) > 0.9
    heldout = sides(shapes.contents("position", "heldout"))
    for _, asked in plain + hard:
        for question in asked:
            if question.question.startswith("where") and question.answer != "none":
                a, b = question.question.removeprefix("where is the ").removesuffix("?").split(" relative to the ")
                a, b = (("an " if name[0] in "aeiou" else "a ") + name for name in (a, b))
                assert f"a photo of {a} {question.answer} {b}" not in heldout


def test_training_examples_are_weighted_and_from_train():
    rng = np.random.default_rng(4)
    drawn = [shapes_examples.training_example(rng)[0] for _ in range(1700)]
    counts, weights = Counter(prompt.tag for prompt in drawn), shapes_examples.DRAWING_WEIGHTS
    for tag in shapes.TAGS:  # 4 standard errors
        share = weights[tag] / sum(weights.values())
        assert abs(counts[tag] / 1700 - share) < 4 * (share * (1 - share) / 1700) ** 0.5
    train = sides(shapes.contents("color_attr", "train"))
    assert {prompt.prompt for prompt in drawn if prompt.tag == "color_attr"} <= train


# --------------------------------------------------------------------------------------------- oracle


def test_the_oracle_judges_reference_scenes_right():
    rng = np.random.default_rng(5)
    prompts = shapes.prompts("heldout", 2000, 5)
    right = [verdict(prompt, render(shapes.sample_scene(prompt, rng), rng)).correct for prompt in prompts]
    assert np.mean(right) >= 0.995


def test_the_oracle_finds_boxes_and_all_items_and_no_malformed_thing():
    rng = np.random.default_rng(6)
    scenes = [shapes_examples.random_example(rng, damaged=0.7)[0] for _ in range(600)]
    wrong = 0
    for scene, found in zip(scenes, ORACLE.detect(list(render_batch(scenes, rng))), strict=True):
        boxes = sorted((name, detection.box) for name, objects in found.items() for detection in objects)
        wanted = sorted((item.shape, item.box) for item in scene.items)
        same = [name for name, _ in boxes] == [name for name, _ in wanted]
        pairs = zip(boxes, wanted, strict=False)
        wrong += not (same and all(np.abs(np.subtract(a, b)).max() <= 1 for (_, a), (_, b) in pairs))
    assert wrong <= 0.01 * len(scenes)


def blurred(picture: np.ndarray) -> np.ndarray:
    """A 3x3 binomial blur: about what a tokenizer does to edges."""
    padded = np.pad(picture.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return ((rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4).round().astype(np.uint8)


def test_the_oracle_bears_blur_but_no_damage():
    rng = np.random.default_rng(7)
    prompts = shapes.prompts("heldout", 300, 7)
    right = [verdict(prompt, blurred(render(shapes.sample_scene(prompt, rng), rng))).correct for prompt in prompts]
    assert np.mean(right) >= 0.99
    scenes = [shapes_examples.random_example(rng, damaged=1.0)[0] for _ in range(300)]
    found = ORACLE.detect([blurred(render(scene, rng)) for scene in scenes])
    counts = [sum(map(len, objects.values())) for objects in found]
    assert np.mean([count == len(scene.items) for count, scene in zip(counts, scenes, strict=True)]) >= 0.99


def test_wrong_content_gets_a_wrong_verdict():
    rng = np.random.default_rng(8)
    for content in shapes.contents("position", "heldout")[:60]:
        turned = shapes.Content(
            tag="position", shapes=content.shapes, colors=content.colors, relation=shapes.INVERSE[content.relation]
        )
        exchanged = shapes.Content(tag="color_attr", shapes=content.shapes, colors=content.colors[::-1])
        asked = shapes.Content(tag="color_attr", shapes=content.shapes, colors=content.colors)
        picture = render(shapes.sample_scene(turned.prompt(), rng), rng)
        assert verdict(asked.prompt(), picture).correct
        assert not verdict(content.prompt(), picture).correct
        assert not verdict(asked.prompt(), render(shapes.sample_scene(exchanged.prompt(), rng), rng)).correct
    for shape in shapes.SHAPES:
        three, four = (shapes.Content(tag="counting", shapes=(shape,), count=count).prompt() for count in (3, 4))
        assert not verdict(three, render(shapes.sample_scene(four, rng), rng)).correct
        assert not verdict(four, render(shapes.sample_scene(three, rng), rng)).correct


@pytest.mark.parametrize("value", [0, 158, 255])
def test_nothing_is_found_in_flat_and_noisy_pictures(value):
    noise = np.random.default_rng(value).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert ORACLE.detect([np.full((64, 64, 3), value, dtype=np.uint8), noise]) == [{}, {}]


def test_a_near_miss_is_wrong_in_one_point_that_the_oracle_sees():
    rng = np.random.default_rng(8)
    for tag in shapes.TAGS:
        for content in shapes.contents(tag, "train")[:40]:
            missed = shapes_examples.near_miss(content)
            assert missed == shapes_examples.near_miss(content) != content
            picture = render(shapes.sample_scene(missed.prompt(), rng), rng)
            assert verdict(missed.prompt(), picture).correct
            assert not verdict(content.prompt(), picture).correct, (content, missed)


def test_near_misses_are_as_frequent_as_asked():
    rng = np.random.default_rng(9)
    examples = [shapes_examples.training_example(rng, near_misses=0.4) for _ in range(600)]
    right = [verdict(prompt, render(scene, rng)).correct for prompt, scene in examples]
    assert 0.52 < np.mean(right) < 0.68  # 4 standard errors
    true = [shapes_examples.training_example(rng) for _ in range(100)]
    assert all(verdict(prompt, render(scene, rng)).correct for prompt, scene in true)


def test_a_question_of_position_may_be_asked_from_both_sides():
    rng = np.random.default_rng(3)
    plain = [shapes_examples.random_example(rng, negatives=0.0) for _ in range(200)]
    both = [shapes_examples.random_example(rng, negatives=0.0, both_sides=True) for _ in range(200)]

    def relations(asked):
        named = [q.question.removeprefix("where is the ").removesuffix("?").split(" relative to the ") for q in asked]
        return {tuple(pair): q.answer for pair, q in zip(named, asked, strict=True) if len(pair) == 2}

    turned = 0
    for _, asked in both:
        assert len({question.question for question in asked}) == len(asked)
        told = relations(asked)
        for pair, answer in told.items():
            other = told.get(pair[::-1])
            assert other is None or other == shapes.INVERSE.get(answer, answer)
            turned += other is not None
    pairs = sum(len(relations(asked)) for _, asked in both)
    assert turned > 0.85 * pairs  # the other side may state what is held out
    assert sum(pair[::-1] in relations(asked) for _, asked in plain for pair in relations(asked)) < 0.5 * turned


def test_every_thing_with_a_name_of_its_own_is_asked_for_its_place():
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(100):
        scene, asked = shapes_examples.random_example(rng, places=True)
        told = {q.question: q.answer for q in asked if q.question.endswith("in this image?")}
        for thing in scene.things:
            question = f"where is the {thing.color} {thing.shape} in this image?"
            alike = [t for t in scene.things if (t.shape, t.color) == (thing.shape, thing.color)]
            assert (question in told) == (thing.graft is None and len(alike) == 1)
            if question in told:
                column, row = (shapes.NUMBERS.index(word) for word in told[question].split(" and "))
                assert abs(column / 4 - thing.column / 5) <= 0.1 and abs(row / 4 - thing.row / 5) <= 0.1
                found += 1
    assert found > 50
