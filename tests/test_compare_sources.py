"""What `report` reads: folders of `evaluate --images`, GenEval's own results, and what it says to be unlike."""

import json
import shutil

import pytest
from PIL import Image

from openunirl.cli import main
from openunirl.compare import write_comparison
from openunirl.compare_sources import Side, differences
from openunirl.evaluation.paired import mcnemar
from openunirl.evaluation.run import summarize_rows
from openunirl.tasks.records import write_jsonl
from picture_folders import PROMPTS, call, draw, rows
from report_runs import AFTER, Page, references, report_rows

OFFICIAL = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Two scored folders of the same prompts, one picture each: of `good` all are right, of `bad` the first is."""
    place = tmp_path_factory.mktemp("scored")
    for name in ("good", "bad"):
        folder = draw(place / f"{name}-pictures")
        for second in folder.glob("*/samples/0001.png"):
            second.unlink()
    for index in range(1, PROMPTS):
        grey = Image.new("RGB", (64, 64), (index, index, index))
        grey.save(place / "bad-pictures" / f"{index:05d}" / "samples" / "0000.png")
    for name in ("good", "bad"):
        call(place / f"{name}-pictures", place / name)
    return place


def report(capsys, page, *places):
    """(page, its numbers, what was printed)."""
    capsys.readouterr()
    assert main(["report", *map(str, places), "--output", str(page)]) == 0
    return Page(page), json.loads(page.with_suffix(".json").read_text()), capsys.readouterr().out


def as_genevals_own(scored, name, file, prefix):
    """The results as evaluate_images.py writes them: seven fields, and the filename as the folder was given."""
    told = rows(scored / name)
    write_jsonl(file, [{k: row[k] for k in OFFICIAL} | {"filename": prefix + row["filename"]} for row in told])
    return file


def test_two_folders_of_pictures(scored, tmp_path, capsys):
    page, numbers, printed = report(capsys, tmp_path / "page.html", scored / "bad", scored / "good")
    drawing = numbers["lines"][0]
    moved = drawing["changes"][1]
    assert drawing["name"] == "Drawing" and drawing["levels"][0]["value"] == pytest.approx(1 / PROMPTS, abs=0.1)
    assert moved["prompts"] == PROMPTS and moved["p"] == pytest.approx(mcnemar(PROMPTS - 1, 0), abs=0.01)
    assert moved["low"] <= moved["value"] <= moved["high"] and moved["value"] > 0.8
    assert numbers["notes"] == [] and "good against bad" in printed
    assert {line["group"] for line in numbers["lines"]} == {"", "Drawing"}  # nobody was asked anything
    assert page.images and {attrs["alt"].split(":")[0] for attrs in page.images} == {"bad", "good"}
    (alone,) = report(capsys, tmp_path / "one.html", scored / "good")[1]["sides"]
    assert alone == "good"


def test_pictures_that_are_gone_are_told_once(scored, tmp_path, capsys):
    moved = shutil.copytree(scored / "good", tmp_path / "good")
    settings = json.loads((moved / "settings.json").read_text())
    (moved / "settings.json").write_text(json.dumps(settings | {"images": "/no/such/folder"}))
    page, numbers, _ = report(capsys, tmp_path / "page.html", scored / "bad", moved)
    assert numbers["notes"] == [
        "good: its pictures are not shown: settings.json names their folder as '/no/such/folder'"
    ]
    assert {attrs["alt"].split(":")[0] for attrs in page.images} == {"bad"}


def test_genevals_own_results(scored, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scored / "good-pictures", tmp_path / "outputs")
    (tmp_path / "theirs").mkdir()
    file = as_genevals_own(scored, "good", tmp_path / "theirs" / "results.jsonl", "outputs/")
    for place in (file, file.parent):
        page, numbers, _ = report(capsys, tmp_path / "page.html", scored / "bad", place)
        assert numbers["sides"] == ["bad", "theirs"] and numbers["lines"][0]["changes"][1]["prompts"] == PROMPTS
        assert numbers["notes"] == ["the evaluations differ in label: bad: oracle; theirs: not recorded"]
        assert {attrs["alt"].split(":")[0] for attrs in page.images} == {"bad", "theirs"}
    shutil.rmtree(tmp_path / "outputs")
    notes = report(capsys, tmp_path / "page.html", scored / "bad", file)[1]["notes"]
    assert any("its pictures are not shown: they are neither in outputs nor beside" in note for note in notes)
    with open(file, "a") as opened:
        opened.write('{"tag": 1}\n' + json.dumps(rows(scored / "good")[0] | {"filename": "a.png"}) + "\n")
    notes = report(capsys, tmp_path / "page.html", scored / "bad", file)[1]["notes"]
    assert any("1 damaged line skipped" in note for note in notes) and any(
        "'a.png' is skipped" in note for note in notes
    )


def test_what_is_no_evaluation(scored, tmp_path, capsys):
    unfinished = shutil.copytree(scored / "good", tmp_path / "unfinished")
    (unfinished / "evaluation.json").unlink()
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    for place, words in (
        (unfinished, "ended there without a score"),
        (tmp_path / "other.jsonl", "other.jsonl holds no row of GenEval's results.jsonl: filename, tag"),
    ):
        capsys.readouterr()
        assert main(["report", str(scored / "bad"), str(place), "--output", str(tmp_path / "page.html")]) == 1
        assert words in capsys.readouterr().err
    assert main(["report", str(tmp_path / "no")]) == 2


# --------------------------------------------------------------------------------------------------- what is unlike


def side(name, folder, question="what is it?", digest="ff", **about):
    kept = {"question": question, "digest": digest}
    generated, read = ([row | kept for row in told] for told in (report_rows(AFTER, 0.3, 2), references(2)))
    summary = summarize_rows(generated, read, "oracle", **about)
    return Side(name=name, folder=folder, summary=summary, generated=generated, references=read)


@pytest.mark.parametrize(
    "other, words",
    [
        ({"max_new_tokens": 9}, "differ in max_new_tokens: a: 8; b: 9"),
        (
            {"detector": {"detector_fingerprint": "2"}},
            "differ in the detector's weights: a: {'detector_fingerprint': '1'};",
        ),
        ({"detector": None}, "b: not recorded"),
        ({"question": "how many?"}, "b was asked something else than a about 36 of 36 drawn images; self-reward"),
        ({"question": "how many?"}, "understanding is compared over the 0 to the same question"),
        ({"digest": "00"}, "b holds 36 answers on reference pictures and a 36; understanding is compared over the 0"),
    ],
)
def test_what_is_unlike_is_told(tmp_path, other, words):
    usual = {"max_new_tokens": 8, "detector": {"detector_fingerprint": "1", "images": "x"}}
    first = side("a", tmp_path, **usual)
    assert differences([first, side("b", tmp_path, **usual)]) == []
    assert any(words in line for line in differences([first, side("b", tmp_path, **(usual | other))]))


def test_rows_without_a_partner_get_no_p_value(tmp_path):
    """Questions of another file are no change of understanding."""
    for name, question in (("a", "what is it?"), ("b", "how many?")):
        told = side(name, tmp_path, question)
        (tmp_path / name / "evaluation").mkdir(parents=True)
        write_jsonl(tmp_path / name / "evaluation" / "results.jsonl", told.generated)
        write_jsonl(tmp_path / name / "evaluation" / "references.jsonl", told.references)
        (tmp_path / name / "evaluation.json").write_text(json.dumps(told.summary))
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    lines = {line["name"]: line for line in json.loads((tmp_path / "page.json").read_text())["lines"]}
    assert lines["Drawing"]["changes"][1]["prompts"] == 36
    assert all(lines[name]["changes"][1] is None for name in ("Understanding", "Self-reward", "Imbalance score"))


def test_references_that_cannot_be_told_apart(tmp_path):
    first = side("a", tmp_path)
    twice = Side(name="b", folder=tmp_path, summary=first.summary, generated=[], references=first.references * 2)
    assert "b: 72 answers cannot be told apart, so no change counts them" in differences([first, twice])
