"""The hand-written verdicts of golden/answer_cases.jsonl, and GenEval's official answers against each other."""

import itertools
import json
import os
from pathlib import Path

import pytest

from openunirl.tasks.answers import MATCHERS, match

GOLDEN = Path(os.environ.get("OPENUNIRL_GOLDEN") or Path(__file__).parents[1] / "golden")
SAME_SCENE = {"The cow is right of the laptop", "The laptop is left of the cow"}


def _rows(name):
    path = GOLDEN / name
    assert path.is_file(), f"{path} is missing: copy the golden data there or set OPENUNIRL_GOLDEN"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _official():
    answers = {tag: set() for tag in MATCHERS}
    for row in _rows("geneval_evaluation_metadata_qa.jsonl"):
        answers[row["tag"]].add(row["answer"])
    return answers


@pytest.mark.parametrize("case", _rows("answer_cases.jsonl"), ids=lambda case: case["id"])
def test_verdict(case):
    verdict = match(case["tag"], case["expected"], case["answer"])
    assert verdict.same == (case["verdict"] == "same"), f"{case['why']}: {verdict.why}"


@pytest.mark.parametrize("case", _rows("answer_undecided.jsonl"), ids=lambda case: case["why"])
def test_undecided_is_never_same(case):
    verdict = match(case["tag"], case["expected"], case["answer"])
    assert verdict.why
    assert not verdict.same


@pytest.mark.parametrize("tag", MATCHERS)
def test_official_answers_match_themselves(tag):
    for answer in _official()[tag]:
        assert match(tag, answer, answer).same
        # not word by word the same, so that the rules are what says "same"
        verdict = match(tag, answer, f"I think: {answer}.")
        assert verdict.same, (answer, verdict)


@pytest.mark.parametrize("tag", MATCHERS)
def test_different_official_answers_do_not_match(tag):
    pairs = itertools.permutations(sorted(_official()[tag]), 2)
    wrong = [pair for pair in pairs if match(tag, *pair).same and set(pair) != SAME_SCENE]
    assert not wrong


def test_the_one_scene_told_twice_matches():
    a, b = sorted(SAME_SCENE)
    assert match("position", a, b).same
    assert match("position", b, a).same
