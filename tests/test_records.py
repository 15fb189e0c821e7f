"""Reading and writing JSONL: what comes back, what is refused, and with which words."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openunirl.tasks.geneval import evaluation_prompts, training_prompts
from openunirl.tasks.records import prompt_row, read_jsonl, read_prompts, write_jsonl, write_prompts
from openunirl.types import Prompt, Question

GOOD = {
    "tag": "position",
    "include": [{"class": "cow", "count": 1}, {"class": "cup", "count": 2, "color": "red", "position": ["above", 0]}],
    "exclude": [{"class": "dog", "count": 1}],
    "prompt": "x",
    "question": "where?",
    "answer": "The cup is above the cow",
    "more_questions": [{"question": "and?", "answer": "so"}],
}


def with_line(path, line):
    """A file whose second line is the one in question."""
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    return path


# ------------------------------------------------------------------------------------------- what is read


def test_prompts_come_back(tmp_path):
    prompts = evaluation_prompts() + training_prompts(60, seed=1)
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts(tmp_path / "p.jsonl") == prompts


def test_all_fields(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [GOOD])
    (prompt,) = read_prompts(tmp_path / "p.jsonl")
    assert prompt == Prompt(
        tag="position",
        include=tuple(GOOD["include"]),
        exclude=tuple(GOOD["exclude"]),
        prompt="x",
        questions=(
            Question(question="where?", answer="The cup is above the cow"),
            Question(question="and?", answer="so"),
        ),
    )
    assert prompt_row(prompt) == GOOD
    assert list(prompt_row(prompt)) == list(GOOD)


def test_more_questions_are_written_only_when_there_are_more(tmp_path):
    first = Question(question="q", answer="a")
    for questions, keys in [((), []), ((first,), ["question", "answer"])]:
        prompt = Prompt(tag="colors", include=({"class": "cup", "count": 1},), prompt="x", questions=questions)
        assert list(prompt_row(prompt)) == ["tag", "include", "prompt", *keys]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_line_ends(tmp_path, end):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a": 1}\r\n{"a": "\xe2\x80\xa8 is no line end"}' + end)
    assert read_jsonl(path) == [{"a": 1}, {"a": "\u2028 is no line end"}]


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b'{"tag": ', "not valid JSON at column 9"),
        (b"", "blank"),
        (b"  \t", "blank"),
        (b"[1]", "expected a JSON object"),
        (b'"text"', "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"tag": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"tag": "a", "tag": "b"}', "'tag' occurs twice"),
        (b'{"x": {"y": 1, "y": 1}}', "'y' occurs twice"),
        (b'{"x": NaN}', "NaN"),
        (b'{"x": -Infinity}', "-Infinity"),
        (b'{"x": 1e999}', "1e999"),
        (b'{"x": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"x": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "nested"),
        (b'{"x":' * 100_000, "nested"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"{} {}", "Extra data"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_bad_lines(tmp_path, line, wrong):
    path = with_line(tmp_path / "p.jsonl", line)
    for read in (read_jsonl, read_prompts):
        with pytest.raises(ValueError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}:2: ")
        assert wrong in str(caught.value)


def changed(**fields):
    """GOOD with some fields changed; None removes one."""
    return {key: value for key, value in (GOOD | fields).items() if value is not None}


def included(**fields):
    """GOOD with its second include clause changed."""
    clause = {key: value for key, value in (GOOD["include"][1] | fields).items() if value is not None}
    return changed(include=[GOOD["include"][0], clause])


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (changed(tag=None), '"tag" is missing'),
        (changed(prompt=None), '"prompt" is missing'),
        (changed(include=None), '"include" is missing'),
        (changed(tag=3), '"tag" is 3'),
        (changed(tag=" "), "\"tag\" is ' '"),
        (changed(tag="Counting"), "\"tag\" is 'Counting'; write 'counting'"),
        (changed(tag="two objects"), "write 'two_object'"),
        (included(count=17), "include[1]: count 17 could never be met: at most 16 objects"),
        (included(count=10**400), "could never be met"),
        (changed(prompt=["x"]), '"prompt" is'),
        (changed(include={}), '"include" is {}'),
        (changed(include=[], exclude=[]), "nothing to look for"),
        (changed(include=["cow"]), "include[0]: expected a JSON object"),
        (changed(exclude="dog"), '"exclude" is'),
        (changed(exclude=[{"class": "dog"}]), 'exclude[0]: "count" is missing'),
        (changed(exclude=[{"class": "dog", "count": 0}]), "exclude[0]: count 0"),
        (changed(exclude=[{"class": "dog", "count": 1, "color": "red"}]), "exclude[0]: unknown key 'color'"),
        (changed(excludes=[]), "unknown key 'excludes'"),
        (changed(answer=None), '"answer" is missing'),
        (changed(question=None), '"question" is missing'),
        (changed(question=None, answer=None), '"more_questions" without'),
        (changed(question=""), '"question" is'),
        (changed(answer=1), '"answer" is 1'),
        (changed(more_questions={}), '"more_questions" is'),
        (changed(more_questions=[{"question": "q"}]), 'more_questions[0]: "answer" is missing'),
        (changed(more_questions=["q"]), "more_questions[0]: expected a JSON object"),
        (
            changed(more_questions=[{"question": "q", "answer": "a", "tag": "t"}]),
            "more_questions[0]: unknown key 'tag'",
        ),
        (included(**{"class": None}), 'include[1]: "class" is missing'),
        (included(**{"class": 5}), 'include[1]: "class" is 5'),
        (included(count=0), "include[1]: count 0"),
        (included(count=-1), "include[1]: count -1"),
        (included(count=True), "include[1]: count True"),
        (included(count=1.0), "include[1]: count 1.0"),
        (included(count="1"), "include[1]: count '1'"),
        (included(colour="red"), "include[1]: unknown key 'colour'"),
        (included(color="mauve"), "include[1]: unknown color 'mauve'"),
        (included(color=["red"]), "include[1]: unknown color"),
        (included(position="above"), "include[1]: position 'above'"),
        (included(position=["above"]), "include[1]: position ['above']"),
        (included(position=["above", 0, 0]), "include[1]: position"),
        (included(position=["beside", 0]), "include[1]: unknown relation 'beside'"),
        (included(position=[{}, 0]), "include[1]: unknown relation {}"),
        (included(position=["above", 1]), "include[1]: position target 1"),
        (included(position=["above", -1]), "include[1]: position target -1"),
        (included(position=["above", False]), "include[1]: position target False"),
        (included(position=["above", "0"]), "include[1]: position target '0'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_prompts(tmp_path, row, wrong):
    path = with_line(tmp_path / "p.jsonl", json.dumps(row).encode())
    assert read_jsonl(path) == [GOOD, row]
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert wrong in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\n"])
def test_an_empty_file_says_so(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    for read in (read_jsonl, read_prompts):
        with pytest.raises(ValueError, match=r"p\.jsonl: the file is empty"):
            read(tmp_path / "p.jsonl")


def test_missing_files_and_folders_are_os_errors(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(OSError):
            read_prompts(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["above", "red", "cow"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "class", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@given(place=st.sampled_from(list(places(GOOD))), value=json_values)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_wrong_value_anywhere_is_a_value_error_or_a_round_trip(tmp_path, place, value):
    row = json.loads(json.dumps(GOOD))
    if not place:
        row = value
    else:
        inner = row
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
    path = tmp_path / "fuzz.jsonl"
    path.write_text(json.dumps(row) + "\n")
    try:
        prompts = read_prompts(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}:1: ") or not path.read_bytes().strip()
    else:
        write_prompts(path, prompts)
        assert read_prompts(path) == prompts


@given(content=st.binary(max_size=80), at=st.integers(0, 200))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_are_a_value_error(tmp_path, content, at):
    path = tmp_path / "fuzz.jsonl"
    sound = json.dumps(GOOD).encode()
    for damaged in (content, sound[:at] + content + sound[at:], sound[:at] + content):
        path.write_bytes(damaged)
        try:
            assert all(isinstance(prompt, Prompt) for prompt in read_prompts(path))
        except ValueError as error:
            assert str(error).startswith(str(path))


# ------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    "row",
    [{"x": float("nan")}, {"x": object()}, {"x": "\ud800"}, 5, {"x": 10**5000}],
    ids=lambda row: type(row).__name__,
)
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, row):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [{"old": 1}])
    with pytest.raises(ValueError, match="row 2: "):
        write_jsonl(path, [{"new": 1}, row])
    assert read_jsonl(path) == [{"old": 1}]
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [{"old": 1}])

    def no_space(*_):
        raise OSError("no space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, no_space)
            with pytest.raises(OSError, match="no space"):
                write_jsonl(path, [{"new": 1}])
        assert read_jsonl(path) == [{"old": 1}]
        assert os.listdir(tmp_path) == ["p.jsonl"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "to.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to("to.jsonl")
    write_jsonl(tmp_path / "link.jsonl", [{"new": 1}])
    assert (tmp_path / "link.jsonl").is_symlink()
    assert read_jsonl(tmp_path / "to.jsonl") == [{"new": 1}]


def test_bad_prompts_are_not_written(tmp_path):
    good = Prompt(tag="colors", include=({"class": "cup", "count": 1},), prompt="x", questions=())
    bad = Prompt(tag="colors", include=({"class": "cup", "count": 0},), prompt="x", questions=())
    with pytest.raises(ValueError, match=r"prompt 2: include\[0\]: count 0"):
        write_prompts(tmp_path / "p.jsonl", [good, bad])
    with pytest.raises(ValueError, match="no prompts"):
        write_prompts(tmp_path / "p.jsonl", [])
    assert os.listdir(tmp_path) == []
