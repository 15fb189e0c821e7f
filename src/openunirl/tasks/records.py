"""JSONL in and out: any rows, and Prompt records in GenEval's field names.

    file -> read_jsonl  -> rows             rows    -> write_jsonl   -> file
    file -> read_prompts -> list[Prompt]    Prompts -> write_prompts -> file

A Prompt's line holds GenEval's fields (tag, include, exclude when there is one, prompt), then UniRL's question and
answer, then more_questions when there are further ones. Plain GenEval metadata, without questions, is read as well.
Sources: GenEval's evaluation_metadata.jsonl and UniRL's evaluation_metadata_qa.jsonl (both are read as they are, and
written back byte for byte).

Departures from what json and the official tools accept, all because a constraint that nobody checks is a wrong score:
1. Unknown and duplicate keys are errors (a misspelt "exclude" would be dropped without a word).
2. NaN, infinities and lone surrogates are errors, so that what was read can always be written.
3. exclude counts start at 1, and a position's target is an earlier clause: the official scorer crashes on others. No
   include count is above 16, of which it would find no more. A tag that is one of GenEval's but for its spelling is an
   error: "Counting" would get the threshold of the other tasks.
4. A blank line is an error; a missing newline at the end of the file is not (UniRL's plain metadata file lacks it).
"""

from __future__ import annotations

import difflib
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openunirl.disk import naming
from openunirl.tasks.geneval import COLORS, MOST_OBJECTS, RELATIONS, TAGS, with_question
from openunirl.types import Prompt, Question

PROMPT_KEYS = ("tag", "include", "exclude", "prompt", "question", "answer", "more_questions")
INCLUDE_KEYS = ("class", "count", "color", "position")
EXCLUDE_KEYS = ("class", "count")

# ------------------------------------------------------------------------------------------- any rows


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file (UTF-8), in order. Nothing is returned unless every line is sound.

    ValueError "file:line: what is wrong" for bad UTF-8, bad JSON, a line that is no object, a duplicate key, a number
    that is not finite, a lone surrogate, or a blank line; "file: ..." for an empty file. OSError as `open` raises it.
    """
    return [row for _, row in _numbered_rows(path)]


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, ASCII, atomically: readers see the old file or the whole new one, never a part.

    A symbolic link stays one; its target is replaced. ValueError "row 3: ..." for a row that read_jsonl would refuse,
    before anything is written. OSError that names the file; the old one is then left as it was. No rows give
    an empty file, which read_jsonl refuses.
    """
    lines = [_line(number, row) for number, row in enumerate(rows, start=1)]
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with naming(target, instead_of=temporary), open(temporary, "x", encoding="ascii", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _line(number: int, row: Mapping[str, Any]) -> str:
    try:
        line = json.dumps(dict(row), allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"row {number}: cannot be written as JSON ({error}); rows are mappings of JSON values"
        ) from None
    _row(f"row {number}", line.encode("ascii"))  # json writes a few things that _row refuses to read
    return line


def _numbered_rows(path: str | os.PathLike[str]) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) pairs; place is "file:line" for messages."""
    content = Path(path).read_bytes()
    if not content.strip():
        raise ValueError(f"{os.fspath(path)}: the file is empty; it should hold one JSON object a line")
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON strings may contain.
    lines = content.removesuffix(b"\n").split(b"\n")
    places = [f"{os.fspath(path)}:{number}" for number in range(1, len(lines) + 1)]
    return [(place, _row(place, line)) for place, line in zip(places, lines, strict=True)]


def _row(place: str, line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise ValueError(f"{place}: the line is blank; delete it")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from None
    try:
        row = json.loads(text, object_pairs_hook=_object, parse_float=_finite_float, parse_constant=_refuse_constant)
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{place}: a string holds half a surrogate pair, which is no text") from None
    except RecursionError:
        raise ValueError(f"{place}: nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON at column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, found {_shown(row)}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return fields


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {_shown(text)} does not fit a float")
    return number


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


# ------------------------------------------------------------------------------------------- prompts


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """The Prompts of a JSONL file, in order; a line without question and answer gives `questions=()`.

    ValueError "file:line: what is wrong" for whatever read_jsonl refuses and for a line that is no Prompt record.
    Nothing is returned unless every line is sound. OSError as `open` raises it.
    """
    return [_prompt(place, row) for place, row in _numbered_rows(path)]


def read_asked(path: str | os.PathLike[str]) -> list[Prompt]:
    """The same, each with a question: the record's own, or ours.

    ValueError, "file:line: ...", also for a record without a question whose tag or clauses have none of ours.
    """
    asked: list[Prompt] = []
    for place, row in _numbered_rows(path):
        prompt = _prompt(place, row)
        try:
            asked.append(with_question(prompt))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return asked


def read_record(path: str | os.PathLike[str]) -> tuple[Prompt, list[str]]:
    """The Prompt of a file of one line, and the names of what it holds besides (a tool's own notes), which is left out.

    ValueError as read_prompts, and for a key that looks like a misspelt one: what is left out must not be a constraint.
    Example: of {"tag": ..., "include": ..., "prompt": ..., "license": "cc0"}: (Prompt(...), ["license"])
    """
    place, row = _numbered_rows(path)[0]
    further = [key for key in row if not difflib.get_close_matches(key.lower(), PROMPT_KEYS, n=1, cutoff=0.75)]
    return _prompt(place, {key: value for key, value in row.items() if key not in further}), further


def write_prompts(path: str | os.PathLike[str], prompts: Sequence[Prompt]) -> None:
    """Write Prompts so that read_prompts gives them back; atomic, as write_jsonl.

    ValueError, before anything is written, for no prompts at all or "prompt 3: ..." for one read_prompts would refuse.
    """
    if not prompts:
        raise ValueError(f"{os.fspath(path)}: no prompts to write; an empty file could not be read back")
    rows = [prompt_row(prompt) for prompt in prompts]
    for number, row in enumerate(rows, start=1):
        place = f"prompt {number}"
        _prompt(place, _row(place, _line(number, row).encode("ascii")))  # through JSON, which turns tuples into lists
    write_jsonl(path, rows)


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """The JSON object of one Prompt, keys in file order. Example: {"tag": "colors", ..., "answer": "red"}."""
    row = prompt.metadata()
    for first in prompt.questions[:1]:
        row |= _question_row(first)
    if len(prompt.questions) > 1:
        row["more_questions"] = [_question_row(question) for question in prompt.questions[1:]]
    return row


def _question_row(question: Question) -> dict[str, str]:
    return {"question": question.question, "answer": question.answer}


def _prompt(place: str, row: dict[str, Any]) -> Prompt:
    _check_keys(place, row, allowed=PROMPT_KEYS, required=("tag", "include", "prompt"))
    include, exclude = _list(place, row, "include"), _list(place, row, "exclude")
    if not include and not exclude:
        raise ValueError(f'{place}: "include" is empty and there is no "exclude": nothing to look for in the image')
    for index, clause in enumerate(include):
        _check_include(f"{place}: include[{index}]", clause, index)
    for index, clause in enumerate(exclude):
        _check_clause(f"{place}: exclude[{index}]", clause, EXCLUDE_KEYS)
    return Prompt(
        tag=_tag(place, row),
        include=tuple(include),
        exclude=tuple(exclude),
        prompt=_text(place, row, "prompt"),
        questions=_questions(place, row),
    )


def _tag(place: str, row: dict[str, Any]) -> str:
    tag = _text(place, row, "tag")
    like = difflib.get_close_matches(tag.strip().lower().replace(" ", "_"), TAGS, n=1, cutoff=0.85)
    if like and tag not in TAGS:
        raise ValueError(f'{place}: "tag" is {_shown(tag)}; write {like[0]!r}, or a name that is not like it')
    return tag


def _questions(place: str, row: dict[str, Any]) -> tuple[Question, ...]:
    if "question" not in row and "answer" not in row:
        if "more_questions" in row:
            raise ValueError(f'{place}: "more_questions" without a "question" of its own')
        return ()
    first = {key: row[key] for key in ("question", "answer") if key in row}
    places = {place: first}
    places |= {f"{place}: more_questions[{i}]": more for i, more in enumerate(_list(place, row, "more_questions"))}
    for where, pair in places.items():
        _check_keys(where, pair, allowed=("question", "answer"), required=("question", "answer"))
    return tuple(
        Question(question=_text(where, pair, "question"), answer=_text(where, pair, "answer"))
        for where, pair in places.items()
    )


def _check_include(place: str, clause: Any, index: int) -> None:
    _check_clause(place, clause, INCLUDE_KEYS)
    if clause["count"] > MOST_OBJECTS:
        raise ValueError(
            f"{place}: count {_shown(clause['count'])} could never be met: at most {MOST_OBJECTS} objects of a class "
            "are counted in a picture"
        )
    if "color" in clause and clause["color"] not in COLORS:
        raise ValueError(f"{place}: unknown color {_shown(clause['color'])}; use one of {', '.join(COLORS)}")
    if "position" not in clause:
        return
    position = clause["position"]
    if not isinstance(position, list) or len(position) != 2:
        raise ValueError(
            f'{place}: position {_shown(position)} should be like ["left of", 0]: relation and target clause'
        )
    relation, target = position
    if relation not in RELATIONS:
        raise ValueError(f"{place}: unknown relation {_shown(relation)}; use one of {', '.join(RELATIONS)}")
    if type(target) is not int or not 0 <= target < index:
        raise ValueError(
            f"{place}: position target {_shown(target)} should be the index of an earlier include clause, below {index}"
        )


def _check_clause(place: str, clause: Any, allowed: Sequence[str]) -> None:
    _check_keys(place, clause, allowed=allowed, required=("class", "count"))
    _text(place, clause, "class")
    # type() rather than isinstance: true is an int to Python, but no count.
    if type(clause["count"]) is not int or clause["count"] < 1:
        raise ValueError(f"{place}: count {_shown(clause['count'])} should be a whole number from 1 on")


def _check_keys(place: str, fields: Any, *, allowed: Sequence[str], required: Sequence[str]) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: expected a JSON object, found {_shown(fields)}")
    for key in required:
        if key not in fields:
            raise ValueError(f'{place}: "{key}" is missing')
    for key in fields:
        if key not in allowed:
            raise ValueError(f"{place}: unknown key {_shown(key)}; known here: {', '.join(allowed)}")


def _text(place: str, fields: dict[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{place}: "{key}" is {_shown(value)}; it should be a text that is not empty')
    return value


def _list(place: str, fields: dict[str, Any], key: str) -> list[Any]:
    value = fields.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f'{place}: "{key}" is {_shown(value)}; it should be a list')
    return value


def _shown(value: Any) -> str:
    """The value for a message, cut to a readable length."""
    try:
        text = ascii(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 60 else text[:57] + "..."
