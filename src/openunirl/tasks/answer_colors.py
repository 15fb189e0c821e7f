"""Which colours an answer gives to which things.

    "a red pizza and the cup is green" -> {"pizza": {"red"}, "cup": {"green"}}

Source: ours. A colour belongs to the noun after it ("a red pizza"), else to the thing before it ("the cup is green").
"""

from __future__ import annotations

from collections.abc import Sequence

from openunirl.tasks.answer_text import COLOR, OBJECT, SCENE, STOP, VAGUE, Token, preposition_of
from openunirl.tasks.answer_words import COPULAS, DETERMINERS, GENERIC_NOUNS, LOCATIVES, OTHER_PREPOSITIONS

Bindings = dict[str, set[str]]
"""Class -> its colours. The class "" stands for parts and scenery, whose colours are nobody's own."""

_THING, _COLOR, _BE, _AND, _COMMA, _DET, _PREP, _FOR, _THAT, _WITH, _GENERIC, _HUE = range(12)
_Item = tuple[int, str, bool]
"""(mark, value, whether a preposition makes it scenery)."""


def bindings_in(tokens: Sequence[Token]) -> Bindings:
    """The colours of each thing that has one. Example: see the header; a denied colour is not there."""
    bindings: Bindings = {}
    last: list[str] = []
    sentence: list[_Item] = []
    respectively = False
    for i, token in enumerate([*tokens, Token(kind=STOP, value=".", text=".")]):
        if token.kind == STOP and token.value in {".", ";", "!", "?"}:
            last = _bind(sentence, last, respectively, bindings)
            sentence, respectively = [], False
        elif not token.negated:
            respectively |= token.is_word("respectively")
            item = _item(tokens, i)
            if item is not None:
                sentence.append(item)
    return bindings


def _item(tokens: Sequence[Token], i: int) -> _Item | None:
    token = tokens[i]
    if token.kind in {OBJECT, SCENE}:
        return _THING, token.value if token.kind == OBJECT else "", preposition_of(tokens, i) in {"in", "near"}
    if token.kind == COLOR:
        return _COLOR, token.value, False
    if token.kind == STOP:
        return (_BE if token.value == ":" else _COMMA), "", False
    if token.kind == VAGUE or token.value in GENERIC_NOUNS - {"them"}:
        return _GENERIC, "", False
    if token.is_word("color", "colour", "hue", "shade", "tone"):
        follows = tokens[i + 1].kind if i + 1 < len(tokens) else STOP
        return None if follows == OBJECT else (_HUE, "", False)
    marks = (
        (_BE, COPULAS - {"has", "have", "contains", "shows"}),
        (_AND, {"and", "while", "whereas", "but"}),
        (_DET, DETERMINERS - {"that", "its", "their", "these", "those"}),
        (_FOR, {"for"}),
        (_THAT, {"that", "which"}),
        (_WITH, {"with", "has", "have"}),
        (_PREP, LOCATIVES | OTHER_PREPOSITIONS),
    )
    for mark, choices in marks:
        if token.value in choices:
            return mark, "", False
    return None


def _bind(items: list[_Item], last: list[str], respectively: bool, bindings: Bindings) -> list[str]:
    """Bind one sentence's colours; returns the things that "it" or "they" in the next one stand for."""
    things = list(dict.fromkeys(value for mark, value, _ in items if mark == _THING and value))
    colors = [value for mark, value, _ in items if mark == _COLOR]
    if respectively and len(colors) == len(things or last):
        for thing, color in zip(things or last, colors, strict=True):
            bindings.setdefault(thing, set()).add(color)
        return things or last
    k = 0
    while k < len(items):
        if items[k][0] != _COLOR:
            k += 1
            continue
        end = k + 1
        while _mark(items, end) == _COLOR or (_mark(items, end) in {_AND, _COMMA} and _next_color(items, end)):
            end = end + 1 if _mark(items, end) == _COLOR else _next_color(items, end)
        _bind_group(items, k, end, last, bindings)
        k = end
    return things or last


def _mark(items: Sequence[_Item], k: int) -> int | None:
    return items[k][0] if 0 <= k < len(items) else None


def _next_color(items: Sequence[_Item], k: int) -> int:
    """The end of ", and COLOR" from `k` if that colour goes on listing (no thing right after it); 0 otherwise."""
    while _mark(items, k) in {_AND, _COMMA}:
        k += 1
    return k + 1 if _mark(items, k) == _COLOR else 0


def _bind_group(items: list[_Item], start: int, end: int, last: list[str], bindings: Bindings) -> None:
    colors = [value for mark, value, _ in items[start:end] if mark == _COLOR]
    lead, after = _mark(items, start - 1), _mark(items, end)
    predicate = lead == _BE and _mark(items, start - 2) == _THING
    listed = any(mark in {_AND, _COMMA} for mark, _, _ in items[start:end])
    if after == _THING and (predicate or (lead == _THING and listed)):
        # "the cup is green, red pizza": the last colour opens the next noun phrase
        _give(bindings, [items[end][1]], colors[-1:] if listed else [])
        colors = colors[:-1] if listed else colors
    elif after == _THING:
        return _give(bindings, [items[end][1]], colors)
    if after == _FOR:
        following = [value for mark, value, _ in items[end:] if mark == _THING]
        ahead = following if len(colors) > 1 and len(following) == len(colors) else following[:1]
        return _share(bindings, ahead, colors)
    ahead = end + 1 if after == _GENERIC else end
    if _mark(items, ahead) == _BE and lead in {None, _COMMA, _AND, _DET}:
        subject = ahead + 1
        while _mark(items, subject) in {_DET, _GENERIC, _HUE}:
            subject += 1
        if _mark(items, subject) == _THING:
            return _give(bindings, [items[subject][1]], colors)
    if after != _HUE and (lead == _WITH or (lead == _DET and _mark(items, start - 2) == _WITH)):
        return _give(bindings, [""], colors)  # "with a white handle": the colour of a part
    _share(bindings, _subjects(items, start) or last[-1:], colors)


def _subjects(items: Sequence[_Item], start: int) -> list[str]:
    """The things before `start` that a colour there is said of."""
    things = [k for k in range(start) if items[k][0] == _THING]
    if not things:
        return []
    lead = [items[k][0] for k in range(things[-1] + 1, start)]
    if _BE in lead and _THAT not in lead:
        things = [k for k in things if not items[k][2]] or things
    chosen = [things[-1]]
    for k in reversed(things[:-1]):
        between = [mark for mark, _, _ in items[k + 1 : chosen[0]] if mark not in {_DET, _COMMA}]
        if between != [_AND] or _BE not in lead or _THAT in lead:
            break
        chosen.insert(0, k)
    return [items[k][1] for k in chosen]


def _share(bindings: Bindings, things: Sequence[str], colors: Sequence[str]) -> None:
    """Colours in the things' order if there are as many ("the cup and pizza are green and red"), else all to each."""
    if len(things) == len(colors) > 1:
        for thing, color in zip(things, colors, strict=True):
            _give(bindings, [thing], [color])
    else:
        _give(bindings, things, colors)


def _give(bindings: Bindings, things: Sequence[str], colors: Sequence[str]) -> None:
    for thing in things:
        if colors:
            bindings.setdefault(thing, set()).update(colors)
