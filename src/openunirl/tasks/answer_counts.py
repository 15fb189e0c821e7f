"""How many things an answer counts: tokens and the gold count -> Match.

    "There are 2 clocks."                -> a quantity 2, bound to clock
    "three items: two clocks and a cat"  -> 3 bound to nothing, 2 bound to clock, 1 bound to cat

Source: ours; UniRL's counting question asks "How many items in this image?".
Departures: see answers.py, 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openunirl.tasks.answer_text import (
    COLOR,
    NUMBER,
    OBJECT,
    SCENE,
    STOP,
    VAGUE,
    WORD,
    Token,
    gold_phrase,
    preposition_of,
    read,
    vocabulary_with,
)
from openunirl.tasks.answer_words import (
    ADJECTIVES,
    ARITHMETIC_NOUNS,
    BOUNDS,
    COPULAS,
    FUNCTION_WORDS,
    GENERIC_NOUNS,
    GROUP_NUMBERS,
    LOCATIVES,
    MEASURES,
    PAIRED,
    word_set,
)
from openunirl.types import Match

_NO_NOUNS = word_set("visible total altogether respectively perhaps always besides sometimes")
_VAGUE_NUMBERS = word_set("several some many few multiple various numerous more other another")


@dataclass(frozen=True, kw_only=True)
class Count:
    """A gold count. Example: Count(number="2", phrase="clocks"); phrase is "" for a bare number."""

    number: str
    phrase: str


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    """A number and what it counts: a class, "" for nothing or a generic noun, or None for something unknown or vague.

    `at` is the number's token, `noun` the counted noun's token or -1; `article` marks a mere "a".
    """

    number: str
    bound: str | None
    at: int
    noun: int
    article: bool = False


def gold_count(parts: Sequence[str]) -> Count | None:
    """The number of a gold answer and what it counts; None without a number.

    Example: gold_count(["there", "are", "two", "dogs"]) -> Count(number="2", phrase="dogs")
    """
    vocabulary, _ = vocabulary_with([])
    tokens = read([word for word in parts if word[0].isalnum()], vocabulary, "counting")
    at = next((i for i, token in enumerate(tokens) if token.kind == NUMBER), None)
    if at is None:
        at = next((i for i, token in enumerate(tokens) if token.is_word("a", "an")), None)
    if at is None:
        return None
    rest = []
    for token in tokens[at + 1 :]:
        if token.value in LOCATIVES | COPULAS | {"there", "here"} and token.kind == WORD:
            break
        rest += token.text.split(" ")
    phrase = gold_phrase(rest)
    number = tokens[at].value if tokens[at].kind == NUMBER else "1"
    return Count(number=number, phrase="" if phrase in GENERIC_NOUNS else phrase)


def match_count(tokens: Sequence[Token], number: str, expected: str) -> Match:
    """Whether every number said is `number` and counts `expected` (a class; "" for any one), a generic noun or nothing.

    Example: tokens of "two dogs" with "2" and "dog" -> Match(same=True, why="2 dog")
    """
    quantities = _quantities(tokens, expected)
    counted = [q for q in quantities if not (q.article and q.bound == expected)]
    if not any(not q.article for q in quantities):
        counted = quantities
    counted = [q for q in counted if not _is_scenery(tokens, q, expected)]
    if not expected:
        named = {q.bound for q in counted if q.bound}
        expected = named.pop() if len(named) == 1 else ""
    values = [q for q in counted if not q.article or q.bound == expected]
    others = [q for q in counted if q.bound and q.bound != expected]
    claimed = _claimed_besides(tokens, expected)
    if others and not claimed and all(preposition_of(tokens, q.noun) == "near" for q in others):
        return Match(same=False, settled=False, why=f"{others[0].bound} is only compared with")
    if others or claimed:
        return Match(same=False, why=f"also counts {others[0].bound if others else claimed}")
    if not values:
        return Match(same=False, why="no number")
    if any(_is_bound(tokens, q) for q in values):
        return Match(same=False, settled=False, why="a bound instead of a number")
    wrong = [q for q in values if q.number != number]
    if wrong:
        if all(tokens[q.at].value == "couple" and q.bound is None for q in wrong):
            return Match(same=False, settled=False, why="a couple of people, and more")
        ones = [q for q in wrong if q.number == "1"]
        if ones == wrong and (len(values) > len(ones) or str(len(ones)) == number):
            return Match(same=False, settled=False, why="arithmetic over ones")
        return Match(same=False, why=f"number {wrong[0].number}, not {number}")
    if any(q.bound is None for q in values):
        return Match(same=False, settled=False, why=f"{number} of something unknown")
    mentioned = {
        token.value
        for i, token in enumerate(tokens)
        if token.kind == OBJECT
        and not preposition_of(tokens, i)
        and not (i + 1 < len(tokens) and tokens[i + 1].is_word("of"))
    }
    if expected and mentioned and expected not in mentioned:
        return Match(same=False, why=f"speaks of {sorted(mentioned)}, not of {expected}")
    return Match(same=True, why=f"{number} {expected}".strip())


def _quantities(tokens: Sequence[Token], expected: str) -> list[_Quantity]:
    quantities = []
    for i, token in enumerate(tokens):
        if token.kind == NUMBER and not _is_pronoun(tokens, i):
            bound, noun = _counted(tokens, i, expected)
            quantities.append(_Quantity(number=token.value, bound=bound, at=i, noun=noun))
        elif token.kind == WORD and token.value in GROUP_NUMBERS:
            quantity = _group(tokens, i, expected)
            if quantity is not None:
                quantities.append(quantity)
        elif token.is_word("a", "an"):
            noun = next((j for j in range(i + 1, len(tokens)) if not _describes(tokens[j])), -1)
            if noun > 0 and tokens[noun].kind == OBJECT:
                quantities.append(_Quantity(number="1", bound=tokens[noun].value, at=i, noun=noun, article=True))
    return quantities


def _group(tokens: Sequence[Token], i: int, expected: str) -> _Quantity | None:
    """A pair, couple, trio ...: a number, unless another one says how many of them or it is one pair of scissors."""
    bound, noun = _counted(tokens, i, expected)
    if i and tokens[i - 1].kind == NUMBER and tokens[i - 1].value != "1":
        return None
    of = i + 1 < len(tokens) and tokens[i + 1].is_word("of")
    if tokens[i].value == "couple" and not of and bound != expected and i + 1 < len(tokens):
        bound = None  # two people
    one = tokens[i].value == "pair" and bound in PAIRED
    return _Quantity(number="1" if one else str(GROUP_NUMBERS[tokens[i].value]), bound=bound, at=i, noun=noun)


def _is_pronoun(tokens: Sequence[Token], i: int) -> bool:
    """The "one" of "the left one" or "one of them" is no number; neither is the "1" of a one before "pair"."""
    after = tokens[i + 1] if i + 1 < len(tokens) else None
    if after is not None and after.kind == WORD and after.value in GROUP_NUMBERS and tokens[i].value == "1":
        return True
    if tokens[i].text != "one":
        return False
    before = tokens[i - 1] if i else None
    if before is not None and (
        before.kind == COLOR or before.is_word("the", "this", "that", "each", "every", "left", "right", "other")
    ):
        return True
    return after is not None and after.is_word("of", "another")


def _describes(token: Token) -> bool:
    plain = (
        token.kind == WORD and (token.value not in FUNCTION_WORDS | GENERIC_NOUNS) and token.value not in GROUP_NUMBERS
    )
    return token.kind == COLOR or plain


def _counted(tokens: Sequence[Token], i: int, expected: str) -> tuple[str | None, int]:
    """(what the number at `i` counts, where): see _Quantity."""
    unknown = -1
    for j in range(i + 1, len(tokens)):
        token = tokens[j]
        if token.kind == OBJECT:
            paired = token.value in PAIRED or not any(t.is_word("pairs") for t in tokens[i:j])
            return (token.value if paired else None), j
        if token.kind == VAGUE:
            vague = not expected or expected in token.value.split(",")
            return (None if vague else token.text), j
        if token.kind == SCENE:
            return token.text, j
        if token.kind in {STOP, NUMBER}:
            break
        if token.kind == COLOR or token.value in MEASURES or token.is_word("of", "the", "these", "those", "pairs"):
            continue
        if token.value in GENERIC_NOUNS:
            return "", j
        if token.value in ARITHMETIC_NOUNS and tokens[i].kind == NUMBER:
            return None, j
        if token.value in FUNCTION_WORDS:
            break
        if token.value.endswith("s") and not token.value.endswith("ss") and token.value not in _NO_NOUNS:
            unknown = j
            if not (j + 1 < len(tokens) and tokens[j + 1].kind == OBJECT):
                break
        elif tokens[i].value == "1" and token.value not in ADJECTIVES | _NO_NOUNS:
            unknown = j
    return (None, unknown) if unknown > 0 else ("", -1)


def _is_scenery(tokens: Sequence[Token], quantity: _Quantity, expected: str) -> bool:
    """Another thing that things are on, in or of: "on a plate", "a bowl of", "a table with ... on it"."""
    if not quantity.bound or quantity.bound == expected or quantity.noun < 0:
        return False
    if preposition_of(tokens, quantity.at) == "in" or preposition_of(tokens, quantity.noun) == "in":
        return True
    rest = tokens[quantity.noun + 1 :]
    if rest and rest[0].is_word("of") and any(t.kind == OBJECT and t.value == expected for t in rest):
        return True
    return (
        bool(rest)
        and rest[0].is_word("with")
        and len(rest) > 2
        and (rest[-2].is_word("on", "in") or (rest[-1].kind == STOP and rest[-3].is_word("on", "in")))
        and (rest[-1].is_word("it") or rest[-2].is_word("it"))
    )


def _claimed_besides(tokens: Sequence[Token], expected: str) -> str:
    """Another thing listed without a number: "two clocks and some books"."""
    for i, token in enumerate(tokens):
        if token.kind != OBJECT or token.value == expected or not expected:
            continue
        before = next(
            (j for j in range(i - 1, -1, -1) if not _describes(tokens[j]) or tokens[j].value in _VAGUE_NUMBERS), -1
        )
        if before < 0:
            continue
        lead = tokens[before]
        vague = lead.kind == WORD and lead.value in _VAGUE_NUMBERS
        listed = lead.is_word("and", "plus") and any(t.kind in {OBJECT, NUMBER} for t in tokens[:before])
        if (vague or listed) and not preposition_of(tokens, i):
            return token.value
    return ""


def _is_bound(tokens: Sequence[Token], quantity: _Quantity) -> bool:
    before = " ".join(t.text for t in tokens[max(0, quantity.at - 3) : quantity.at])
    after = " ".join(
        t.text for t in tokens[quantity.at + 1 : quantity.noun + 3 if quantity.noun > 0 else quantity.at + 3]
    )
    led = any(before == bound or before.endswith(" " + bound) for bound in BOUNDS)
    return led or any(f" {bound}" in f" {after}" for bound in BOUNDS if bound.startswith("or "))
