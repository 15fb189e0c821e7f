"""Reading an answer: text -> tokens, in which names of things, colours and numbers are found.

    text         -> words(text)                  -> ["a", "dog", "is", "not", "red", "."]
    words        -> read(words, vocabulary, tag) -> [Token(kind="word", ...), Token(kind="object", ...), ...]
    gold phrases -> vocabulary_with(phrases)     -> the known vocabulary, and whatever the gold answer names besides

Source: ours; the tables are answer_words.py's.
Departures: none in this file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from openunirl.tasks.answer_words import (
    ADJECTIVES,
    ALIASES,
    BOUNDARY_COLORS,
    CLAUSE_WORDS,
    COLOR_ALIASES,
    COMMON_OBJECTS,
    COPULAS,
    DETERMINERS,
    FUNCTION_WORDS,
    GENERIC_NOUNS,
    HYPERNYMS,
    LOCATIVES,
    MEASURES,
    NUMBERS,
    OTHER_ALIASES,
    OTHER_PREPOSITIONS,
    SCENERY,
    SHADES,
    TENS,
    plurals,
    singulars,
    word_set,
)
from openunirl.tasks.geneval import OTHER_OBJECTS

OBJECT, VAGUE, SCENE, COLOR, NUMBER, WORD, STOP = "object", "vague", "scene", "color", "number", "word", "stop"
"""Kinds of tokens. VAGUE is a hypernym ("bag"), SCENE is scenery ("grass"), STOP is punctuation."""

Vocabulary = Mapping[tuple[str, ...], tuple[str, str]]
"""A phrase's words -> (kind, value)."""

_NEGATIONS = frozenset({"not", "no", "without", "never", "nor", "neither", "lacks", "lacking", "unlike"})
_NEGATION_ENDS = frozenset({"but", "it", "there", "they", "these", "however"})
_COLOR_TAGS = frozenset({"colors", "color_attr"})
_AFTER_NOUNS = word_set("respectively left right next close adjacent higher lower visible only not covers occupies")
_COLOR_NOUNS = word_set("color colour colored coloured hue shade tone tint")


@dataclass(frozen=True, kw_only=True)
class Token:
    """A word, a phrase with a meaning, or a punctuation mark.

    `value` is the class, colour, number or word itself; `negated` tokens are denied ("not a dog") and only serve as
    antecedents of pronouns.
    Example: Token(kind="object", value="cell phone", text="smartphone")
    """

    kind: str
    value: str
    text: str
    negated: bool = False

    def is_word(self, *choices: str) -> bool:
        """Whether this is one of these plain words."""
        return self.kind == WORD and self.value in choices


def words(text: str) -> list[str]:
    """Normalised words and punctuation marks: NFKC, no case, n't -> not, 's dropped, hyphen and slash -> space.

    A possessive before a side keeps its mark ("the cow's left" -> "cow", "'left"): it says whose side that is.
    Example: words("It isn't RED.") -> ["it", "is", "not", "red", "."]
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).strip()
    text = re.sub("[‘’`´]", "'", text)
    text = text.replace("cannot", "can not").replace("t.v.", "tv").replace("&", " and ")
    text = re.sub(r"n't\b|(?<=\b(?:is|do))nt\b|(?<=\b(?:are|was))nt\b|(?<=\bdoes)nt\b", " not", text)
    text = re.sub(r"'re\b", " are", text)
    text = re.sub(r"\b(it|that|there|he|she|this|here)'s\b", r"\1 is", text)
    text = re.sub(r"(?<=\w)(?:'s|(?<=s)')\s+(?:own |immediate |far )*(left|right)\b", r" '\1", text)
    text = re.sub(r"'(?:s|ll|ve|d|m)\b", "", text)
    text = re.sub(r"\b\d{1,2}:\d\d\b", " ", text)  # a time of day is no number of things
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"(?<=\d)\+", " or more", text)
    return [
        "." if word == "\n" else word for word in re.findall(r"\d+\.\d+|'(?:left|right)\b|[^\W_]+|[.,;:!?()\n]", text)
    ]


# ----------------------------------------------------------------------------------------- vocabulary


def _split(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def _entries(kind: str, value: str, names: Iterable[str]) -> dict[tuple[str, ...], tuple[str, str]]:
    forms = {form for name in names for form in (name, *plurals(name))}
    return {tuple(form.split(" ")): (kind, value) for form in forms}


@lru_cache(maxsize=1)
def _known() -> Vocabulary:
    vocabulary: dict[tuple[str, ...], tuple[str, str]] = {(word,): (SCENE, word) for word in SCENERY}
    for names in HYPERNYMS:
        for name in _split(names):
            vocabulary |= _entries(VAGUE, HYPERNYMS[names], [name])
    for name in _split(COMMON_OBJECTS):
        vocabulary |= _entries(OBJECT, name, [name])
    for name in OTHER_OBJECTS:
        vocabulary |= _entries(OBJECT, name, [name, *_split(OTHER_ALIASES.get(name, ""))])
    for name, aliases in ALIASES.items():
        vocabulary |= _entries(OBJECT, name, [name, *_split(aliases)])
    for color in BOUNDARY_COLORS:
        vocabulary.setdefault(tuple(color.split(" ")), (COLOR, color))
    for color, names in COLOR_ALIASES.items():
        vocabulary |= {tuple(name.split(" ")): (COLOR, color) for name in _split(names)}
    vocabulary |= {(word,): (NUMBER, str(number)) for word, number in NUMBERS.items()}
    vocabulary[("half", "a", "dozen")] = (NUMBER, "6")
    return vocabulary


def vocabulary_with(phrases: Iterable[str]) -> tuple[Vocabulary, list[str]]:
    """The vocabulary that knows every gold phrase as a thing, and the class that each phrase names.

    A phrase that is no known thing becomes a class of its own, with regular plurals; leading adjectives and colours
    are dropped from known things only. Example: vocabulary_with(["quokka"])[1] -> ["quokka"]; ["sofa"] -> ["couch"]
    """
    vocabulary = dict(_known())
    classes = []
    for phrase in phrases:
        parts = tuple(phrase.split(" "))
        while parts not in vocabulary and len(parts) > 1 and parts[0] in ADJECTIVES:
            parts = parts[1:]
        if parts == ("orange",):
            kind, value = OBJECT, "orange"
        else:
            kind, value = vocabulary.get(parts, (WORD, phrase))
        if kind != OBJECT:
            value = phrase
            for form, entry in _entries(OBJECT, value, [phrase, *singulars(phrase)]).items():
                if vocabulary.get(form, (WORD,))[0] != OBJECT:
                    vocabulary[form] = entry
        classes.append(value)
    return vocabulary, classes


# ---------------------------------------------------------------------------------------------- read


def read(parts: Sequence[str], vocabulary: Vocabulary, tag: str, named: Iterable[str] = ()) -> list[Token]:
    """Tokens of normalised words: longest phrases first, compounds reduced to their head, denied ones marked.

    `tag` decides whether "orange" is rather the fruit or the colour. `named` are the gold answer's classes, which never
    stand for another thing. Example: see the header.
    """
    longest = max(map(len, vocabulary))
    tokens: list[Token] = []
    i = 0
    while i < len(parts):
        for size in range(min(longest, len(parts) - i), 0, -1):
            phrase = tuple(parts[i : i + size])
            if phrase in vocabulary:
                kind, value = vocabulary[phrase]
                tokens.append(Token(kind=kind, value=value, text=" ".join(phrase)))
                i += size
                break
        else:
            tokens.append(_plain(parts[i]))
            i += 1
    tokens = _numbers_merged(tokens)
    tokens = _oranges_resolved(tokens, tag)
    tokens = _anaphors_resolved(tokens, set(named))
    tokens = _compounds_reduced(tokens)
    return _denials_marked(tokens)


def _plain(word: str) -> Token:
    if word in {".", ",", ";", ":", "!", "?", "(", ")"}:
        return Token(kind=STOP, value=word, text=word)
    if re.fullmatch(r"\d+(\.\d+)?", word):
        whole, _, fraction = word.partition(".")
        # int() refuses very long digit strings, so numbers stay text: no leading zeros, ASCII digits, no ".0"
        digits = "".join(str(unicodedata.decimal(digit)) for digit in whole).lstrip("0") or "0"
        return Token(kind=NUMBER, value=digits + (f".{fraction}" if fraction.strip("0") else ""), text=word)
    return Token(kind=WORD, value=word, text=word)


def _numbers_merged(tokens: list[Token]) -> list[Token]:
    """twenty two -> 22, two dozen -> 24, a dozen -> 12."""
    merged: list[Token] = []
    for token in tokens:
        before = merged[-1] if merged else None
        if token.kind == NUMBER and before is not None and before.kind == NUMBER and before.value.isdecimal():
            small = before.value.isascii() and len(before.value) < 4
            if before.text in TENS and token.text in NUMBERS and 0 < NUMBERS[token.text] < 10:
                merged[-1] = replace(before, value=str(int(before.value) + NUMBERS[token.text]), text="number")
                continue
            if small and token.text in {"dozen", "hundred"}:
                merged[-1] = replace(before, value=str(int(before.value) * NUMBERS[token.text]), text="number")
                continue
        merged.append(token)
    return merged


def _oranges_resolved(tokens: list[Token], tag: str) -> list[Token]:
    """ "orange" is the fruit or the colour, by what stands around it; only the plural names itself."""
    resolved = list(tokens)
    for i, token in enumerate(tokens):
        if token.text == "orange":
            kind = OBJECT if _is_fruit(resolved, i, tag) else COLOR
            resolved[i] = replace(token, kind=kind, value="orange")
    return resolved


def _is_fruit(tokens: Sequence[Token], i: int, tag: str) -> bool:
    after = tokens[i + 1] if i + 1 < len(tokens) else None
    if after is not None:
        if after.kind in {OBJECT, VAGUE, SCENE, COLOR, NUMBER}:
            return False
        if after.is_word("and", "or") and i + 2 < len(tokens):
            beyond = tokens[i + 2]
            follows = tokens[i + 3] if i + 3 < len(tokens) else None
            if beyond.kind == COLOR and beyond.text != "orange" and not (i and tokens[i - 1].kind == COLOR):
                # "an orange and white cat", but "the orange and purple broccoli" lists two things
                return tag not in _COLOR_TAGS and follows is not None and follows.kind == STOP
        elif after.kind == WORD and after.value not in FUNCTION_WORDS | _AFTER_NOUNS and not _verb_like(after):
            return False
    before = tokens[i - 1] if i else None
    if before is None or before.kind == STOP:
        listed = any(t.kind == OBJECT for t in tokens[:i]) and (i < 2 or tokens[i - 2].kind != COLOR)
        return tag not in _COLOR_TAGS or (listed and before is not None and before.value == ",")
    if before.kind == COLOR:
        start = i - 1
        while start and (tokens[start - 1].kind == COLOR or tokens[start - 1].is_word(*SHADES)):
            start -= 1
        lead = tokens[start - 1] if start else None
        if lead is not None and (lead.is_word(*COPULAS, "and") or lead.kind == STOP):
            return tag != "colors" and not lead.is_word(*COPULAS)
        return tag != "colors" or (lead is not None and lead.kind in {WORD, NUMBER})
    if before.kind == NUMBER or before.is_word(*DETERMINERS):
        return True
    if before.is_word("and", "or") and i >= 2:
        return tokens[i - 2].kind == OBJECT or (tag not in _COLOR_TAGS and tokens[i - 2].kind != COLOR)
    if before.kind == WORD and (before.value in SHADES or before.value in COPULAS | _COLOR_NOUNS):
        return tag in {"single_object", "counting"} and before.value not in _COLOR_NOUNS
    return tag not in _COLOR_TAGS


def _verb_like(token: Token) -> bool:
    return token.value.endswith(("ing", "ed")) and token.value not in _COLOR_NOUNS


def _anaphors_resolved(tokens: list[Token], fixed: set[str]) -> list[Token]:
    """After "a teddy bear", "the bear" is that one; after "a wine glass", "the glass"."""
    resolved = list(tokens)
    for i, token in enumerate(tokens):
        if token.kind in {OBJECT, VAGUE} and i and tokens[i - 1].is_word("the"):
            earlier = [t for t in resolved[:i] if t.kind == OBJECT]
            named = [t for t in earlier if t.text.endswith(" " + token.text) and t.value != token.value]
            if named and token.value not in fixed | {t.value for t in earlier}:
                resolved[i] = replace(token, kind=OBJECT, value=named[-1].value)
    return resolved


def _compounds_reduced(tokens: list[Token]) -> list[Token]:
    """Of two nouns in a row the last one is meant ("flower vase"), unless it only says what kind ("suitcase bag")."""
    reduced = list(tokens)
    nouns = {OBJECT, VAGUE, SCENE}
    for i in range(len(tokens) - 1):
        first, second = reduced[i], reduced[i + 1]
        if first.kind not in nouns or second.kind not in nouns:
            continue
        drop = i + 1 if first.kind == OBJECT and second.kind == VAGUE else i
        reduced[drop] = Token(kind=WORD, value=reduced[drop].text, text=reduced[drop].text)
    return reduced


def _denials_marked(tokens: list[Token]) -> list[Token]:
    """What follows a negation is denied up to punctuation, "but", "it" or "there"; "not only" denies nothing."""
    marked = []
    denied = False
    for i, token in enumerate(tokens):
        after = tokens[i + 1] if i + 1 < len(tokens) else None
        if token.kind == STOP or token.is_word(*_NEGATION_ENDS):
            denied = False
        elif token.is_word(*_NEGATIONS):
            denied = not (after is not None and after.is_word("only", "just", "merely", "simply", "doubt"))
        elif token.is_word("rather", "instead") and after is not None and after.is_word("than", "of"):
            denied = True
        marked.append(replace(token, negated=denied))
    return marked


# ------------------------------------------------------------------------------------------ phrases


def preposition_of(tokens: Sequence[Token], i: int) -> str:
    """How the noun at `i` is attached: "in" (on, at, ...), "of" (content of a thing before), "near" (any other), or "".

    Example: the plate of "a fork on a white plate" -> "in"
    """
    for j in range(i - 1, max(-1, i - 7), -1):
        token = tokens[j]
        if token.kind in {STOP, OBJECT, VAGUE, SCENE}:
            return ""
        if token.kind != WORD:
            continue
        if token.value in LOCATIVES:
            return "in"
        if token.value in OTHER_PREPOSITIONS:
            return "near"
        if token.value == "of":
            lead = [t.value for t in tokens[max(0, j - 3) : j]]
            if lead[-1:] and (tokens[j - 1].kind == OBJECT or lead[-1] in MEASURES):
                return "of"
            if lead[-1:] == ["top"]:
                return "in"
            if lead[-1:] == ["front"] or lead[-1:] == ["left"] or lead[-1:] == ["right"]:
                return "near"
            continue
        if token.value == "to" or (token.value in CLAUSE_WORDS | COPULAS and token.value not in {"both"}):
            return "near" if token.value == "to" else ""
    return ""


def objects_in(tokens: Sequence[Token]) -> list[int]:
    """Where things are named that the answer does not deny."""
    return [i for i, token in enumerate(tokens) if token.kind == OBJECT and not token.negated]


def gold_phrase(parts: Sequence[str]) -> str:
    """A gold answer's noun phrase, without determiners, copulas and "there" around it; "" if none is left."""
    kept = [word for word in parts if word[0].isalnum()]
    drop = DETERMINERS | COPULAS | {"there", "it", "and", "of", "both", "photo", "in"}
    while kept and (kept[0] in drop or (kept[0] in GENERIC_NOUNS | {"color", "colour"})):
        kept = kept[1:]
    while kept and kept[-1] in drop:
        kept = kept[:-1]
    return " ".join(kept)
