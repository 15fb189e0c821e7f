"""What `openunirl evaluate --images` says beside a score: what it left out of a folder, and what looks damaged."""

import json
import shutil

import pytest
from PIL import Image

from openunirl.evaluation.no_score import one_color
from openunirl.tasks import shapes
from openunirl.tasks.records import read_jsonl, write_jsonl
from picture_folders import PROMPTS, call, draw, refused, rows


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "pictures")


def test_incomplete_folders(folder, tmp_path, capsys):
    (folder / "00011/samples/0001.png").unlink()
    assert "--partial" in refused(capsys, folder, tmp_path / "out")
    call(folder, tmp_path / "out", "--partial")
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["pictures"] == 23 and summary["partial"] is True and summary["left_out"]["missing_samples"] == 1


def test_what_is_ignored_or_missing_is_counted_and_told(folder, tmp_path, capsys):
    """Each as a summary of its own would pass for the whole folder's."""
    call(folder, tmp_path / "whole")
    assert "not scored" not in (told := capsys.readouterr().out) and "missing" not in told
    for place in folder.iterdir():
        Image.new("RGB", (8, 8)).save(place / "samples" / "0002.gif")
    (folder / "00000/samples/0000.png").rename(folder / "00000/samples/extra.png")
    (folder / "00000/samples/0001.png").rename(folder / "00000/samples/0000.png")
    shutil.rmtree(folder / "00003/samples")
    (folder / "00011").rename(folder / "00011 (copy)")
    call(folder, tmp_path / "out", "--partial")
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())["left_out"]
    assert told == {
        "ignored_files": 11,  # 10 of .gif and extra.png
        "ignored_folders": 1,
        "such_as": ["00011 (copy)", "00000/samples/0002.gif", "00000/samples/extra.png"],
        "missing_prompts": 1,  # that there were 12 nothing tells
        "missing_samples": 1,
    }
    write_jsonl(tmp_path / "p.jsonl", [prompt.metadata() for prompt in shapes.prompts("heldout", PROMPTS, 0)])
    call(folder, tmp_path / "out", "--partial", "--prompt-file", str(tmp_path / "p.jsonl"))
    printed = capsys.readouterr().out
    assert "1 folders and 11 files are not in GenEval's layout, and not scored: 00011 (copy), " in printed
    assert "missing: 2 prompts, and 1 samples of the others" in printed


def test_further_keys_of_metadata_are_ignored_and_told(folder, tmp_path, capsys):
    for index in (1, 4):
        file = folder / f"0000{index}/metadata.jsonl"
        write_jsonl(file, [read_jsonl(file)[0] | {"license": "cc0", "seed": index}])
    call(folder, tmp_path / "out")
    told = "2 metadata files hold further keys, which are ignored: license, seed"
    assert told in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["ignored"] == told
    assert "license" not in rows(tmp_path / "out")[2]["metadata"]
    write_jsonl(file, [read_jsonl(file)[0] | {"exclud": []}])  # no note, but a constraint that would be dropped
    assert "00004/metadata.jsonl:1: unknown key 'exclud'" in refused(capsys, folder, tmp_path / "out")


def test_one_color_for_all_is_a_warning(folder, tmp_path, capsys, monkeypatch):
    """The score stands: the pictures may be of one colour."""
    call(folder, tmp_path / "sound")
    assert one_color(rows(tmp_path / "sound")) is None
    monkeypatch.setattr(
        "openunirl.tasks.shapes_oracle.Oracle.colors", lambda self, image, found, name: ["red"] * len(found)
    )
    capsys.readouterr()
    call(folder, tmp_path / "out")
    (warning,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["warnings"]
    assert "objects are called red, although" in warning and warning in capsys.readouterr().out
    told = rows(tmp_path / "out")
    assert one_color([row for row in told if "red" in row["prompt"]]) is None  # only red ones were asked for
    assert one_color(told[:2]) is None
