"""Where an answer says things are: tokens -> facts (thing, relation, thing).

    "the dog is right of the cow"  -> {("dog", "right", "cow"), ("cow", "left", "dog")}
    "a cow with a dog above it"    -> {("dog", "above", "cow"), ("cow", "below", "dog")}

Each sentence is rewritten to a line of marks by a list of patterns, then the marks are bound to each other:
    <3>  the thing at token 3     @rel.L  a relation before its operand (L, R, A, B; O for on)     @side.L  a side
    it  a pronoun     &  and, while (with a comma before)     ,  comma     be  is, sits, there     that     with
Source: ours. The relation words are GenEval's four and their everyday forms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from openunirl.tasks.answer_text import OBJECT, STOP, Token, words

INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above", "on": "under"}
Fact = tuple[str, str, str]
"""(A, relation, B): A is left / right / above / below / on B. "on" says contact and no direction."""

_IMAGE = (
    r"(?:the |this |that |an? )?(?:image|picture|photo|photograph|frame|scene|view|screen|shot|composition|painting"
    r"|drawing|background|foreground|viewer)"
)
_PART = r"(?: (?:side|half|part|portion|edge|corner|section|end|area|position|most))*"
_PRE = r"(?:(?:on|to|at|in|towards?|from|near|along|off|over to) )?(?:the |its |their |his |her )?"
_VERTICAL = {"upper": "above", "top": "above", "above": "above", "lower": "below", "bottom": "below", "below": "below"}
_CODES = {"left": "L", "right": "R", "above": "A", "below": "B", "on": "O"}
_WAYS = r"(?:(?P<v>upper|lower|top|bottom)(?: and)? )?(?P<h>left|right)(?:wards?|most)?"
_UPDOWN = r"(?P<v>top|bottom|upper|lower)(?P<h>(?!x)x)?"
_ADVERBS = re.compile(
    r"\b(?:directly|immediately|slightly|just|exactly|immediate|far|very|somewhat|clearly|diagonally|extreme|hand"
    r"|partially|almost|both|own|respective)\b ?"
)
_RIGHT_ADVERB = re.compile(
    r"(?<!the )(?<!its )\bright (?=above|below|beneath|under|over|next|beside|behind|in front|on top|atop|near|by )"
)


def _mark(kind: str):
    def mark(match: re.Match[str]) -> str:
        found = match.groupdict()
        ways = [_VERTICAL[found["v"]]] if found.get("v") else []
        ways += [found["h"]] if found.get("h") else []
        return f" @{kind}.{_coded(ways)} "

    return mark


def _coded(ways: Sequence[str]) -> str:
    """Capitals, which no later pattern takes for a word: the text itself has none."""
    return "".join(_CODES[way] for way in ways)


def _ways(mark: str) -> list[str]:
    return [way for way, code in _CODES.items() if code in mark.partition(".")[2]]


_REWRITES = (
    (re.compile(r"\b(?:from )?left to right\b"), " @order.L "),
    (re.compile(r"\b(?:from )?right to left\b"), " @order.R "),
    (re.compile(r"\b(?:from )?top to bottom\b"), " @order.A "),
    (re.compile(r"\b(?:from )?bottom to top\b"), " @order.B "),
    (re.compile(rf"\b{_PRE}{_WAYS}{_PART} (?:of|in|from) {_IMAGE}\b"), _mark("side")),
    (re.compile(rf"\b{_PRE}{_UPDOWN}{_PART} (?:of|in|from) {_IMAGE}\b"), _mark("side")),
    (
        re.compile(r"\b(?:on|to|at|towards?|by) ((?:[a-z]+ )*)<(\d+)> '(left|right)\b" + _PART),
        lambda m: f" @rel.{_CODES[m[3]]} <{m[2]}> ",
    ),
    (
        re.compile(rf"\b(?:on|to|at|towards?|by) (?:its|his|her|their) {_WAYS}\b{_PART}"),
        lambda m: _mark("rel")(m) + "it ",
    ),
    (re.compile(rf"\b{_PRE}{_WAYS}{_PART} of\b(?! (?:each|one) )"), _mark("rel")),
    (re.compile(r"\b(?P<h>left|right)(?: side)? (?:to|from)(?= (?:the |an? )?(?:[a-z]+ )?<)"), _mark("rel")),
    (
        re.compile(r"\b(?:on (?:the )?)?top(?: side)? of(?= it\b| them\b| the other\b| (?:the |an? )?(?:[a-z]+ )*<)"),
        "TOPOF",
    ),
    (re.compile(r"\b(?:at|in) the TOPOF"), " @rel.O "),
    (re.compile(r"TOPOF"), " @rel.A "),
    (re.compile(r"\bat the (?:bottom|foot) of(?= (?:it|the|an?|<))"), " @rel. "),
    (re.compile(rf"\b{_PRE}{_WAYS}\b{_PART}"), _mark("side")),
    (re.compile(rf"\b(?:on|at|in|to|towards?) (?:the )?{_UPDOWN}\b{_PART}"), _mark("side")),
    (re.compile(rf"\b{_UPDOWN}(?: (?:side|half|part|one|object|item|thing))"), _mark("side")),
    (re.compile(r"\b(?:above|over|atop|higher(?: up)? than)\b"), " @rel.A "),
    (re.compile(r"\b(?:below|under(?:neath)?(?: of)?|beneath|lower(?: down)? than)\b"), " @rel.B "),
    (re.compile(r"\b(?:on|upon|onto)\b"), " @rel.O "),
    (
        re.compile(
            r"\b(?:next to|beside|near(?: to)?|behind|in front of|adjacent to|close to|alongside|by|against|inside|at"
            r"|in|around|from|past|across)\b"
        ),
        " @rel. ",
    ),
    (re.compile(r"(@rel\.\S*  ?(?:the )?)(?:other|former|latter|second one|first one)\b"), r"\1it"),
    (re.compile(r"\b(?:and|while|whereas|but|plus|then|as)\b"), " & "),
    (re.compile(r"\b(?:which|that|who)\b"), " that "),
    (
        re.compile(
            r"\b(?:is|are|was|were|sits?|stands?|lies|lay|rests?|hangs?|floats?|sitting|standing|lying|there|appears?)"
            r"(?= |$)"
        ),
        " be ",
    ),
    (re.compile(r"\b(?:with|has|have|having)\b"), " with "),
    (re.compile(r"\b(?:it|them|him|her|they)\b"), " it "),
)
_MARKS = re.compile(r"<\d+>|@(?:rel|side|order)\.[A-Z]*|&|,|\b(?:it|that|with|be)\b")


def relation_words(text: str) -> set[str]:
    """The directions that a text without things names. Example: relation_words("on top of") -> {"above"}"""
    marks = _marks(" ".join([*words(text), "<0>"])) + _marks(" ".join(words(text)))
    return {way for mark in marks if mark[0] == "@" for way in _ways(mark)} & {"left", "right", "above", "below"}


def split_relation(parts: Sequence[str]) -> tuple[str, str, str] | None:
    """Text before, relation, text after, of a plain sentence; None if it names no relation or several.

    Example: split_relation(words("The cow is left of the laptop")) -> ("the cow is", "left", "the laptop")
    """
    pattern = (
        r"^(.*?)\b((?:on |to |at )?(?:the )?(?:left|right)(?: side)?(?: of)?|(?:on )?(?:the )?top of|[a-z]+)\b(.*)$"
    )
    text = " ".join(word for word in parts if word[0].isalnum())
    for match in re.finditer(r"\b(?:left|right|above|below|over|under|beneath|underneath|atop|top)\b", text):
        start = re.search(r"(?:\b(?:on|to|at) )?(?:\bthe )?$", text[: match.start()])
        whole = re.match(pattern, text[start.start() if start else match.start() :])
        ways = relation_words(whole.group(2)) if whole else set()
        if whole and len(ways) == 1:
            return text[: start.start() if start else match.start()], ways.pop(), whole.group(3)
    return None


def facts_in(tokens: Sequence[Token]) -> tuple[set[Fact], set[tuple[str, str]]]:
    """(facts with their inverses, sides that some thing is on without a partner on the other side).

    Example: see the header; "the dog is on the left" -> (set(), {("dog", "left")})
    """
    facts: set[Fact] = set()
    sides: list[tuple[str, str]] = []
    things: list[str] = []
    sentence: list[int] = []
    for i in [*range(len(tokens)), None]:
        if i is None or (tokens[i].kind == STOP and tokens[i].value in {".", ";", "!", "?"}):
            marks = _marks(_render(tokens, sentence))
            names = {f"<{j}>": tokens[j].value for j in sentence if tokens[j].kind == OBJECT}
            denied = [tokens[j].value for j in sentence if tokens[j].kind == OBJECT and tokens[j].negated]
            reader = _Sentence(marks, names, things, denied)
            facts |= reader.facts
            sides += reader.sides
            things += [tokens[j].value for j in sentence if tokens[j].kind == OBJECT]
            sentence = []
        else:
            sentence.append(i)
    paired = {(a, side, b) for a, side in sides for b, other in sides if a != b and other == INVERSE[side]}
    facts |= paired
    facts |= {(b, INVERSE[way], a) for a, way, b in facts if way in INVERSE}
    lonely = {(a, side) for a, side in sides if not any(fact[:2] == (a, side) for fact in paired)}
    return facts, lonely


def _render(tokens: Sequence[Token], indices: Sequence[int]) -> str:
    parts = []
    for i in indices:
        token = tokens[i]
        if token.kind == OBJECT:
            parts.append(f"<{i}>" if not token.negated else "")
        elif not token.negated:
            parts.append("," if token.value in {"(", ")"} else token.text)
    return " ".join(part for part in parts if part)


def _marks(text: str) -> list[str]:
    text = _ADVERBS.sub("", _RIGHT_ADVERB.sub("", text.replace(":", "is")))
    for pattern, mark in _REWRITES:
        text = re.sub(" +", " ", pattern.sub(mark, text))
    marks = _MARKS.findall(text)
    return [m for k, m in enumerate(marks) if not (m == "," and marks[k + 1 : k + 2] == ["&"])]


class _Sentence:
    """Binds the marks of one sentence. `things`: the classes named before it, `denied`: in a denial; for pronouns."""

    def __init__(self, marks: list[str], names: dict[str, str], things: Sequence[str], denied: Sequence[str]) -> None:
        self.marks = self._merged(marks)
        self.names = names
        self.things = [*denied, *things]
        self.facts: set[Fact] = set()
        self.sides: list[tuple[str, str]] = []
        self.operands: set[int] = set()
        self.subject: int | None = None
        self._read()

    @staticmethod
    def _merged(marks: list[str]) -> list[str]:
        """ "above & to the left of" is one relation with two ways; "on the left & above <1>" likewise."""
        merged: list[str] = []
        for k, mark in enumerate(marks):
            lead = merged[-2:] if merged[-1:] == ["&"] else merged[-1:]
            # "on the left, and to its right is a cow": there the second relation opens a clause of its own
            opens = marks[k + 2 : k + 3] in (["be"], [","]) and marks[k + 3 : k + 4] != [] and marks[k + 3][0] == "<"
            if mark.startswith("@rel.") and lead and lead[0][:5] in {"@rel.", "@side"} and not opens:
                del merged[-len(lead) :]
                mark = "@rel." + _coded(_ways(lead[0]) + _ways(mark))
            merged.append(mark)
        return merged

    def _is_thing(self, k: int) -> bool:
        return 0 <= k < len(self.marks) and self.marks[k][0] == "<"

    def _at(self, k: int) -> str:
        return self.marks[k] if 0 <= k < len(self.marks) else ""

    def _read(self) -> None:
        order = [mark for mark in self.marks if mark.startswith("@order.")]
        named = [self.names[mark] for mark in self.marks if mark[0] == "<"]
        if order:
            self.facts |= {(a, _ways(order[0])[0], b) for n, a in enumerate(named) for b in named[n + 1 :] if a != b}
        for k in range(len(self.marks)):
            if self.marks[k].startswith("@rel."):
                self._relate(k)
        self._place()

    # A relation with an operand

    def _relate(self, k: int) -> None:
        ways = _ways(self.marks[k])
        if not (self._is_thing(k + 1) or self._at(k + 1) == "it"):
            self.marks[k] = "@side." + _coded([way for way in ways if way != "on"])
            return
        operands = [k + 1]
        end = k + 2
        while self._at(end) == "&" and self._is_thing(end + 1) and self._at(end + 2) in {"", ",", "&"}:
            operands.append(end + 1)
            end += 2
        front = self._fronted_subject(k, end)
        self.operands |= set(operands)
        subjects = [front] if front is not None else self._subjects(k)
        for a in subjects:
            for operand in operands:
                pair = self._pair(a, operand)
                if pair:
                    self.facts |= {(pair[0], way, pair[1]) for way in ways}

    def _fronted_subject(self, k: int, end: int) -> int | None:
        """The thing after "rel B" that the relation is about, if the relation comes first."""
        earlier = [j for j in range(k) if self._is_thing(j)]
        after = end
        while self._at(after) in {",", "be"} or (self._at(after) == "with" and k == 0):
            after += 1
        if not self._is_thing(after):
            return None
        if not earlier and self._at(k - 1) != "it" and self._at(k - 2) != "it":
            return after
        opens = self._at(k - 1) in {"&", ",", "with"} or (self._at(k - 1) == "be" and self._at(k - 2) in {"&", ","})
        joint = self.marks[end:after]
        return after if opens and ("be" in joint or (joint == [","] and self._at(k + 1) == "it")) else None

    def _subjects(self, k: int) -> list[int]:
        before = self._at(k - 1)
        if self._at(k - 1) == "it" or (before == "be" and self._at(k - 2) == "it"):
            return [k - 1 if before == "it" else k - 2]
        things = [j for j in range(k) if self._is_thing(j)]
        free = [j for j in things if j not in self.operands]
        if before in {"&", ","} and self.subject is not None and things and things[-1] in self.operands:
            return [self.subject]
        related = "that" in self.marks[max(0, k - 2) : k]
        chosen = (things if related else free or things)[-1:]
        if chosen:
            self.subject = chosen[0]
            if before == "be" and chosen[0] == 2 and self._is_thing(0) and self._at(1) == "&":
                return [0, 2]  # the dog and the cat are left of ...
        return chosen

    def _pair(self, a: int, b: int) -> tuple[str, str] | None:
        """The classes of two marks, a pronoun standing for the latest other thing."""
        classes = [self.names.get(self._at(k)) for k in (a, b)]
        for n, k in enumerate((a, b)):
            if classes[n] is None:
                earlier = [*self.things, *(self.names[self.marks[j]] for j in range(k) if self._is_thing(j))]
                others = [name for name in earlier if name != classes[1 - n]]
                if not others:
                    return None
                classes[n] = others[-1]
        first, second = classes
        return (first, second) if first and second and first != second else None

    # Sides of the picture

    def _place(self) -> None:
        sides = [k for k, mark in enumerate(self.marks) if mark.startswith("@side.") and _ways(mark)]
        things = [k for k in range(len(self.marks)) if self._is_thing(k)]
        free = [k for k in things if k not in self.operands]
        if not sides or not things:
            return
        paired = len(sides) == 2 == len(free) and free[-1] < sides[0] and sides[1] == sides[0] + 2
        if paired and self._at(sides[0] + 1) == "&" == self._at(free[0] + 1):
            for thing, side in zip(free, sides, strict=True):  # the dog and the cow are on the left and right
                self._put(thing, side)
            return
        fronted = sides[0] < things[0]
        for k in sides:
            thing = self._placed(k, fronted)
            if thing is None:
                continue
            host = self._host(thing, k)
            if host is not None and len(sides) == 1:  # a cow with a dog on the left
                self.facts |= {
                    (self.names[self._at(thing)], way, self.names[self._at(host)]) for way in _ways(self.marks[k])
                }
            else:
                self._put(thing, k)

    def _placed(self, k: int, fronted: bool) -> int | None:
        before = max((j for j in range(k) if self._is_thing(j) and j not in self.operands), default=None)
        after = min((j for j in range(k + 1, len(self.marks)) if self._is_thing(j)), default=None)
        if self._at(k - 1) == "be" and before == k - 2:
            return before
        if self._at(k - 1) == "that" or (self._at(k - 2) == "that" and self._at(k - 1) == "be"):
            return before
        if self._is_thing(k - 1) and not fronted:
            return before
        if self._at(k + 1) == "be" or self._is_thing(k + 1) or before is None:
            follows = after is not None and set(self.marks[k + 1 : after]) <= {"be", ",", "with"}
            if follows and not (before is not None and self._at(k + 1) == "," and not fronted):
                return after
        return after if fronted and after is not None else before

    def _host(self, thing: int, side: int) -> int | None:
        named = self._is_thing(thing - 2) and self._at(thing - 1) == "with" and side == thing + 1
        return thing - 2 if named and self._at(thing) != self._at(thing - 2) else None

    def _put(self, thing: int, side: int) -> None:
        self.sides += [(self.names[self._at(thing)], way) for way in _ways(self.marks[side])]
