"""The journal of `openunirl evaluate --images` and what it takes for a row: what a kill or another call leaves."""

import json
import math

import pytest

from openunirl.evaluation.image_folder import read_folder
from openunirl.evaluation.image_scores import PROTOCOL, score_pictures, summarize_pictures, take_up, write_results
from openunirl.tasks.geneval import evaluation_prompts
from openunirl.tasks.records import write_jsonl
from openunirl.tasks.shapes_oracle import Oracle
from openunirl.types import Detection
from picture_folders import call, draw, no_summary, refused, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn") / "pictures")


def test_strays_in_the_journal_are_cleared_away(folder, tmp_path):
    """What SIGKILL leaves between opening and renaming, and what a file browser adds."""
    pictures, journal = read_folder(folder)[:4], tmp_path / "journal"
    journal.mkdir()
    (journal / ".0123456789abcdef.tmp").write_text('{"filename": "00000/samp')
    (journal / ".DS_Store").write_bytes(b"\0")
    take_up(tmp_path, pictures)
    assert sorted(path.name for path in journal.iterdir()) == [".DS_Store", "kept.jsonl"]
    scored = [row for part in score_pictures(Oracle(), pictures, 2) for row in part]
    for _ in range(2):
        write_results(tmp_path, scored)
        assert rows(tmp_path) == scored and not journal.exists()


def test_rows_that_another_call_took_away_are_one_error(folder, tmp_path, capsys, monkeypatch):
    class Disturbed(Oracle):
        def detect(self, images):
            (tmp_path / "journal" / "process-0000.jsonl").unlink(missing_ok=True)  # as another call's take_up does
            return super().detect(images)

    monkeypatch.setattr("openunirl.tasks.shapes_oracle.Oracle", Disturbed)
    err = refused(capsys, folder, tmp_path, "--batch-size", "12")
    assert "12 of 24 pictures have no row" in err and "the first is 00000/samples/0000.png" in err
    assert "another call" in err and "disk" in err and no_summary(tmp_path)


@pytest.mark.parametrize("damage", [{"index": None}, {"index": "0"}, {"index": True}, {"sample": -1}, {"sample": 1.0}])
def test_rows_without_their_place_are_not_ours(folder, tmp_path, capsys, damage):
    call(folder, tmp_path)
    told = rows(tmp_path)
    changed = told[3] | damage
    if damage == {"index": None}:
        del changed["index"]
    write_jsonl(tmp_path / "results.jsonl", [*told[:3], changed, *told[4:]])
    assert "results.jsonl:4 is no row of this command" in refused(capsys, folder, tmp_path)
    write_jsonl(tmp_path / "results.jsonl", [*told[:3], told[3] | {"index": 7}, *told[4:]])  # another picture's
    call(folder, tmp_path)
    assert rows(tmp_path) == told


def test_a_kill_before_the_settings_are_there_locks_nothing(folder, tmp_path):
    (tmp_path / "settings.json.partial").write_text('{"images"')
    call(folder, tmp_path)
    assert not no_summary(tmp_path) and not (tmp_path / "settings.json.partial").exists()


def test_verdicts_of_another_protocol_are_not_taken_up(folder, tmp_path, capsys, monkeypatch):
    call(folder, tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["protocol"] == PROTOCOL
    monkeypatch.setattr("openunirl.evaluation.image_scores.PROTOCOL", PROTOCOL + 1)
    words = f"was made with protocol {PROTOCOL}, not {PROTOCOL + 1}: choose another --output-dir"
    assert words in refused(capsys, folder, tmp_path)


@pytest.mark.parametrize("box, score", [((0.0, 0.0, 4.0, 4.0), math.nan), ((0.0, 0.0, math.inf, 4.0), 0.9)])
def test_a_detection_that_is_not_finite_names_the_picture(folder, box, score):
    class Broken(Oracle):
        def detect(self, images):
            return [*super().detect(images[:-1]), {"circle": [Detection(box=box, score=score)]}]

    with pytest.raises(ValueError, match=r"00001/samples/0000\.png: .*not finite.*weights are probably damaged"):
        list(score_pictures(Broken(), read_folder(folder)[:3], 3))


def row(metadata, name):
    return {
        "filename": name, "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": True, "digest": name,
        "metadata": json.dumps(metadata),
    }  # fmt: skip


def test_official_prompts_are_known_whatever_the_order_of_their_fields():
    metadata = [dict(reversed(prompt.metadata().items())) for prompt in evaluation_prompts()[:3]]
    metadata.append(metadata[0] | {"prompt": "something else"})
    summary = summarize_pictures([row(each, str(i)) for i, each in enumerate(metadata)], "oracle")
    assert summary["official_prompts"] == {"scored": 3, "of": 553}


def test_another_numpy_leaves_official_prompts_unsaid(folder, tmp_path, monkeypatch, capsys):
    def other_stream():
        raise RuntimeError("numpy draws other evaluation prompts")

    monkeypatch.setattr("openunirl.evaluation.image_scores.evaluation_prompts", other_stream)
    call(folder, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["official_prompts"] is None
    assert "GenEval's" not in capsys.readouterr().out
