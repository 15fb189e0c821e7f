"""Does a model's answer mean the gold answer? Rules instead of a judge model.

    ("colors", "red", "The car is dark red.")  -> match -> Match(same=True, why="color red")
    ("single_object", "handbag", "A bag.")     -> match -> Match(same=False, settled=False, why="only vague words ...")

The gold answer is UniRL's official wording or our own: a name with or without an article, "There are two dogs", "2",
"The bus is red", "The cow is to the left of the laptop". A thing it names that the tables lack becomes known by it.

Source: UniRL (arXiv 2505.23380) asks Qwen2.5-7B-Instruct "same / not same"; the rules, the tables and the verdicts of
tests/golden/answer_cases.jsonl are ours.
Departures from UniRL's judge:
1. Deterministic: no model, no sampling. What only world knowledge could tell is settled=False and counts as not same.
2. An empty answer never matches; an answer that repeats the gold answer's words always does.
Departures from our own written policy, where a reader would not follow its letter:
3. "On the table there is a laptop" is about the laptop, though the table is mentioned first.
4. In counting, numbers of things in a locative phrase are ignored ("three oranges on one plate"), and distributive ones
   ("two clocks, one big and one small") are unsettled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from openunirl.tasks.answer_colors import bindings_in
from openunirl.tasks.answer_counts import Count, gold_count, match_count
from openunirl.tasks.answer_positions import INVERSE, facts_in, relation_words, split_relation
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
    objects_in,
    preposition_of,
    read,
    vocabulary_with,
    words,
)
from openunirl.tasks.answer_words import (
    ADJECTIVES,
    BOUNDARY_COLORS,
    COMPARISONS,
    COPULAS,
    FUNCTION_WORDS,
    GENERIC_NOUNS,
    HEDGES,
    INDIRECT,
    LOCATIVES,
)
from openunirl.types import Match


def match(tag: str, expected: str, answer: str) -> Match:
    """Whether `answer` means the gold answer `expected` of a question of type `tag`.

    settled=False: no rule can tell (a hypernym, a boundary colour, a bound, ...); it counts as not same. A gold answer
    that cannot be read is unsettled too, and `why` says so. Any text is accepted as an answer.
    ValueError if the tag is none of MATCHERS. Source: see the header.
    Example: match("two_object", "a dog and a cat", "A kitten beside a dog.").same -> True
    """
    if tag not in MATCHERS:
        raise ValueError(f"tag {tag!r} has no answer matcher; use one of {', '.join(MATCHERS)}")
    gold, parts = words(expected), words(answer)
    if not _letters(parts):
        return _no("empty answer")
    if _letters(gold) == _letters(parts):
        return _yes("verbatim")
    return MATCHERS[tag](gold, parts)


def _letters(parts: Sequence[str]) -> list[str]:
    return [word for word in parts if word[0].isalnum() or word[0] == "'"]


def _yes(why: str) -> Match:
    return Match(same=True, why=why)


def _no(why: str) -> Match:
    return Match(same=False, why=why)


def _open(why: str) -> Match:
    return Match(same=False, settled=False, why=why)


# -------------------------------------------------------------------------------- single_object, two_object


def _match_single_object(gold: list[str], parts: list[str]) -> Match:
    copulas = [i for i, word in enumerate(gold) if word in COPULAS]
    phrase = gold_phrase(gold[copulas[-1] + 1 :] if copulas else gold)
    if not phrase:
        return _open("gold answer names nothing")
    vocabulary, (expected,) = vocabulary_with([phrase])
    tokens = [token for token in read(parts, vocabulary, "single_object") if not token.negated]
    found = objects_in(tokens)
    first = _main_object(tokens, found)
    vague = [i for i, token in enumerate(tokens) if token.kind == VAGUE and not _is_category(tokens, i)]
    if first is None:
        if any(expected in tokens[i].value.split(",") for i in vague):
            return _open(f"{tokens[vague[0]].text} may mean {expected}")
        return _open("no known object") if _unknown_noun(tokens) else _no("no object")
    unknown = _unknown_head(tokens, first)
    if unknown:
        return _open(f"unknown object {unknown}")
    if vague and vague[0] < first:
        return _open("vague word first") if expected in tokens[vague[0]].value.split(",") else _no("other object first")
    if tokens[first].value != expected:
        holder = next((i for i in found if tokens[i].value == expected), None)
        if holder is not None and any(token.is_word("in", "inside") for token in tokens[first + 1 : holder]):
            return _open(f"{tokens[first].text} in a {expected}: content or container")
        return _no(f"main object {tokens[first].value}, not {expected}")
    rivals = [i for i in found if i > first and any(t.is_word("or") for t in tokens[first:i])]
    if rivals and tokens[rivals[0]].value != expected and not any(t.kind == STOP for t in tokens[first : rivals[0]]):
        return _open("an alternative is offered")
    return _yes(f"main object {expected}")


def _main_object(tokens: Sequence[Token], found: Sequence[int]) -> int | None:
    """The first thing, or the one after "on the table there is" (departure 3)."""
    if len(found) > 1 and preposition_of(tokens, found[0]) == "in":
        between = tokens[found[0] + 1 : found[1]]
        opening = tokens[: found[0]]
        fronted = all(t.kind != WORD or t.value not in COPULAS for t in opening)
        fronted = fronted and bool(opening) and opening[0].is_word(*LOCATIVES)
        if fronted and any(t.is_word(*COPULAS, "there") for t in between):
            return found[1]
    return found[0] if found else None


def _is_category(tokens: Sequence[Token], i: int) -> bool:
    """Whether a vague word only says of what kind the answer is: "The animal in this image is a dog"."""
    rest = tokens[i + 1 :]
    copula = next((k for k, t in enumerate(rest) if t.is_word("is", "are", "appears", "seems", "looks")), None)
    if copula is None:
        return bool(rest) and rest[0].value == ":"
    return any(t.kind == OBJECT for t in rest[copula:]) and not any(
        t.kind in {OBJECT, STOP} or t.is_word("and", "with") for t in rest[:copula]
    )


def _unknown_head(tokens: Sequence[Token], first: int) -> str:
    """The noun of an indefinite noun phrase before the first known thing, if no table knows it."""
    heads = (_unknown_after(tokens, i) for i in range(first) if tokens[i].is_word("a", "an"))
    return next(filter(None, heads), "")


def _unknown_after(tokens: Sequence[Token], article: int) -> str:
    """The noun that follows an article if no table knows it, else ""."""
    phrase = []
    for token in tokens[article + 1 :]:
        if token.kind in {STOP, NUMBER, OBJECT, VAGUE, SCENE} or token.value in FUNCTION_WORDS:
            break
        phrase.append(token)
    end = article + 1 + len(phrase)
    known = end < len(tokens) and (tokens[end].kind in {OBJECT, VAGUE, SCENE, NUMBER} or tokens[end].is_word("of"))
    nouns = [t.value for t in phrase if t.kind == WORD and t.value not in ADJECTIVES]
    generic = any(word in GENERIC_NOUNS or word.endswith(("shot", "up", "view")) for word in nouns)
    return nouns[-1] if nouns and not known and not generic else ""


def _unknown_noun(tokens: Sequence[Token]) -> bool:
    known = FUNCTION_WORDS | GENERIC_NOUNS | {"main", "not", "no", "know", "do"}
    return any(token.kind == WORD and token.value.isalpha() and token.value not in known for token in tokens)


def _match_two_object(gold: list[str], parts: list[str]) -> Match:
    copulas = [i for i, word in enumerate(gold) if word in COPULAS]
    body = gold[copulas[-1] + 1 :] if copulas else gold
    phrases = [phrase for phrase in map(gold_phrase, _listed(body)) if phrase]
    if len(phrases) < 2:
        return _open("gold answer does not name two objects")
    vocabulary, classes = vocabulary_with(phrases)
    tokens = [token for token in read(parts, vocabulary, "two_object", classes) if not token.negated]
    found = {tokens[i].value for i in objects_in(tokens)}
    missing = [name for name in classes if name not in found]
    if missing:
        vague = {name for t in tokens if t.kind == VAGUE for name in t.value.split(",")}
        return _open(f"a vague word may mean {missing}") if set(missing) <= vague else _no(f"missing {missing}")
    if any(token.is_word("or") for token in tokens):
        return _open("an alternative is offered")
    return _third_objects(tokens, classes) or _yes(f"both {classes}")


def _listed(parts: Sequence[str]) -> list[list[str]]:
    listed: list[list[str]] = [[]]
    for word in parts:
        if word in {"and", ","}:
            listed.append([])
        else:
            listed[-1].append(word)
    return listed


def _third_objects(tokens: Sequence[Token], classes: Sequence[str]) -> Match | None:
    """A verdict if things besides `classes` are claimed; on, in, at, inside, atop or against something they are not."""
    doubtful = ""
    for i, token in enumerate(tokens):
        listed = i and token.is_word("a", "an") and (tokens[i - 1].is_word("and") or tokens[i - 1].value == ",")
        if listed and _unknown_after(tokens, i):
            return _open(f"unknown object {_unknown_after(tokens, i)}")
        if token.kind not in {OBJECT, VAGUE} or token.value in classes:
            continue
        if token.kind == VAGUE and (set(classes) & set(token.value.split(",")) or _is_category(tokens, i)):
            continue
        attached = preposition_of(tokens, i)
        if attached == "near":
            doubtful = token.text
        elif not attached:
            return _no(f"also claims {token.text}")
    return _open(f"{doubtful} is only compared with") if doubtful else None


# ------------------------------------------------------------------------------------------- counting


def _match_counting(gold: list[str], parts: list[str]) -> Match:
    count: Count | None = gold_count(gold)
    if count is None:
        return _open("gold answer has no number")
    vocabulary, classes = vocabulary_with([count.phrase] if count.phrase else [])
    tokens = [token for token in read(parts, vocabulary, "counting", classes) if not token.negated]
    return match_count(tokens, count.number, classes[0] if classes else "")


# ------------------------------------------------------------------------------------ colors, color_attr


def _gold_colors(gold: list[str]) -> list[tuple[str, str]] | None:
    """(noun phrase or "", colour) for each part of a gold answer; None if a part has no colour.

    Example: ["the", "bus", "is", "red", "and", "a", "green", "cup"] -> [("bus", "red"), ("cup", "green")]
    """
    vocabulary, _ = vocabulary_with([])
    found = []
    for part in _listed(gold):
        tokens = read([w for w in part if w[0].isalnum()], vocabulary, "colors")
        copulas = [i for i, token in enumerate(tokens) if token.is_word("is", "are")]
        colors = [
            i
            for i, t in enumerate(tokens)
            if (t.kind == COLOR or t.text == "orange") and (not copulas or i > copulas[-1])
        ]
        if not colors:
            return None
        if copulas:
            color, noun = tokens[colors[-1]], tokens[: copulas[-1]]
        else:
            color, noun = tokens[colors[0]], tokens[colors[0] + 1 :]
        found.append((gold_phrase([w for t in noun for w in t.text.split(" ")]), color.value))
    return found


def _match_colors(gold: list[str], parts: list[str]) -> Match:
    pairs = _gold_colors(gold)
    if not pairs or len(pairs) != 1:
        return _open("gold answer does not name one color")
    phrase, color = pairs[0]
    if phrase:
        return _match_bindings([(phrase, color)], parts)
    vocabulary, _ = vocabulary_with([])
    tokens = [token for token in read(parts, vocabulary, "colors") if not token.negated]
    return _compare_colors({token.value for token in tokens if token.kind == COLOR}, color, tokens)


def _compare_colors(found: set[str], color: str, tokens: Sequence[Token]) -> Match:
    said = {token.value for token in tokens if token.kind == WORD}
    others = found - {color}
    if found == {color}:
        return _yes(f"color {color}")
    if not found:
        return _open("color only by comparison or material") if said & COMPARISONS else _no("no color")
    if all(color in BOUNDARY_COLORS.get(other, "").split(",") for other in others):
        return _open(f"{sorted(others)} may be called {color}")
    scenery = any(token.kind == SCENE for token in tokens)
    if color in found and (said & HEDGES or scenery):
        return _open(f"{sorted(found)}, of which {color} may be the main one")
    return _no(f"{sorted(found)}, not {color}")


def _match_color_attr(gold: list[str], parts: list[str]) -> Match:
    pairs = _gold_colors(gold)
    if not pairs or len(pairs) < 2 or not all(phrase for phrase, _ in pairs):
        return _open("gold answer does not name two objects with a color each")
    return _match_bindings(pairs, parts)


def _match_bindings(pairs: Sequence[tuple[str, str]], parts: list[str]) -> Match:
    vocabulary, classes = vocabulary_with([phrase for phrase, _ in pairs])
    tokens = read(parts, vocabulary, "color_attr", classes)
    bindings = bindings_in(tokens)
    tokens = [token for token in tokens if not token.negated]
    verdict = None
    for name, (_, color) in zip(classes, pairs, strict=True):
        if name not in {token.value for token in tokens if token.kind == OBJECT}:
            vague = any(name in t.value.split(",") for t in tokens if t.kind == VAGUE)
            if not vague:
                return _no(f"{name} is missing")
            verdict = _open(f"a vague word may mean {name}")
            continue
        found = bindings.get(name, set())
        if found != {color}:
            compared = _compare_colors(found, color, [t for t in tokens if t.kind != SCENE])
            if not found and color in bindings.get("", set()):
                compared = _open(f"only a part is {color}")
            if compared.settled:
                return _no(f"{name}: {compared.why}")
            verdict = _open(f"{name}: {compared.why}")
    third = _third_objects(tokens, classes)
    if third is not None and third.settled:
        return third
    return verdict or third or _yes(f"colors of {classes}")


# ------------------------------------------------------------------------------------------- position


def _match_position(gold: list[str], parts: list[str]) -> Match:
    split = split_relation(gold)
    if split is None:
        return _open("gold answer names no relation")
    before, way, after = split
    phrases = [gold_phrase(before.split()), gold_phrase(after.split())]
    if not all(phrases):  # a bare relation, to a question that names the things
        found = relation_words(" ".join(parts))
        return (
            _yes(f"relation {way}") if way in found and INVERSE[way] not in found else _no(f"relations {sorted(found)}")
        )
    vocabulary, (a, b) = vocabulary_with(phrases)
    tokens = read(parts, vocabulary, "position", [a, b])
    facts, lonely = facts_in(tokens)
    if (a, way, b) in facts:
        return _no("contradicts itself") if (a, INVERSE[way], b) in facts else _yes(f"{a} {way} {b}")
    if (a, INVERSE[way], b) in facts:
        return _no(f"{a} {INVERSE[way]} {b}")
    touching = {"above": (a, "on", b), "below": (b, "on", a)}
    if touching.get(way) in facts:
        return _open("contact implies above or not")
    if lonely & {(a, way), (b, INVERSE[way])} and not lonely & {(a, INVERSE[way]), (b, way)}:
        return _open("only one side is given")
    if {a, b} <= {token.value for token in tokens if token.kind == OBJECT} and INDIRECT & set(parts):
        return _open("a relation without a relation word")
    return _no(f"does not say that {a} is {way} {b}")


MATCHERS: dict[str, Callable[[list[str], list[str]], Match]] = {
    "single_object": _match_single_object,
    "two_object": _match_two_object,
    "counting": _match_counting,
    "colors": _match_colors,
    "position": _match_position,
    "color_attr": _match_color_attr,
}
"""Tag -> (words of the gold answer, words of the model's answer) -> Match."""
