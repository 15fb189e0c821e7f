"""Evaluation folders that were moved, with their pictures, references and weights, after they were written."""

import json
import shutil

import pytest

from openunirl.cli import main
from openunirl.models.showo import Showo
from openunirl.tasks.records import read_jsonl, write_jsonl
from photo_checkpoints import name_answers, save_clip, save_mask2former
from picture_folders import Counting, call, draw, no_summary, refused, rows

RECORDS = [
    {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
    for name in ("handbag", "bench")  # the first is what the random detector finds
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name_answers(monkeypatch.setattr)


@pytest.fixture
def judge(monkeypatch):
    def counting(most=10**9):
        judge = Counting(most)
        monkeypatch.setattr("openunirl.tasks.shapes_oracle.Oracle", lambda: judge)
        return judge

    return counting


def test_scores_of_pictures_go_on_elsewhere(tmp_path, judge):
    here, there = tmp_path / "here", tmp_path / "there"
    draw(here / "pictures")
    judge(most=10)
    call(here / "pictures", here / "out", "--batch-size", "4", code=130)
    here.rename(there)
    seen = judge()
    call(there / "pictures", there / "out", "--batch-size", "4")
    assert seen.seen == 24 - 8 and len(rows(there / "out")) == 24
    there.rename(here)
    seen = judge()
    call(here / "pictures", here / "out")
    assert seen.seen == 0 and not no_summary(here / "out")
    shutil.copytree(here, there)  # a copy beside the original
    shutil.copy(there / "pictures/00001/samples/0000.png", there / "pictures/00002/samples/0000.png")
    call(there / "pictures", there / "out")
    assert seen.seen == 1


def test_other_pictures_are_others_wherever_they_lie(tmp_path, capsys, judge):
    call(draw(tmp_path / "pictures"), tmp_path / "out")
    shutil.rmtree(tmp_path / "pictures")
    seen = judge()
    err = refused(capsys, draw(tmp_path / "others", seed=1), tmp_path / "out")
    assert f"with the pictures of {tmp_path / 'pictures'}, and those in {tmp_path / 'others'} are others" in err
    assert seen.seen == 0 and not no_summary(tmp_path / "out")


def test_an_evaluated_model_is_taken_up_and_compared_elsewhere(tmp_path, capsys, monkeypatch):
    """Everything moves: the evaluation, its references and the detector's weights."""
    here, there = tmp_path / "here", tmp_path / "there"
    save_mask2former(here / "mask2former")
    save_clip(here / "clip")
    write_jsonl(here / "prompts.jsonl", RECORDS)

    def evaluate(place, out, *flags, code=0):
        argv = ["evaluate", "tiny-showo", "--world", "geneval", "--output-dir", place / out, "--num-images", 1]
        argv += ["--sampling.num-timesteps", 2, "--detector-weights", place / "mask2former", "--max-new-tokens", 3]
        argv += ["--color-weights", place / "clip", "--prompt-file", place / "prompts.jsonl", *flags]
        assert main([str(each) for each in argv]) == code

    evaluate(here, "base", "--seed", 1)
    evaluate(here, "tuned", "--references", here / "base" / "evaluation")
    was = json.loads((here / "tuned" / "evaluation.json").read_text())
    here.rename(there)

    def never(*_, **__):
        raise AssertionError("it was done before")

    for name in ("sample_images", "sample_answers"):
        monkeypatch.setattr(Showo, name, never)
    monkeypatch.setattr("openunirl.evaluation.detectors.Mask2FormerDetector.detect", never)
    evaluate(there, "tuned", "--references", there / "base" / "evaluation")
    now = json.loads((there / "tuned" / "evaluation.json").read_text())
    assert all(now[name] == was[name] for name in ("geneval", "understanding", "imbalance", "unsettled"))
    assert was["understanding"]["n"] == 1
    evaluate(there, "tuned", "--references", there / "tuned" / "evaluation", code=1)  # the same names, other pictures
    assert "are others, not the same moved here" in capsys.readouterr().err
    evaluate(there, "tuned", "--references", there / "base" / "evaluation")
    page = there / "page.html"
    assert main(["report", str(there / "base"), str(there / "tuned"), "--output", str(page)]) == 0
    assert page.read_text().count("<img") == 4 and "no readable picture" not in page.read_text()
    (tmp_path / "again").mkdir()
    (there / "tuned").rename(tmp_path / "again" / "renamed")  # and one of the two alone
    assert main(["report", str(there / "base"), str(tmp_path / "again" / "renamed"), "--output", str(page)]) == 0
    assert page.read_text().count("<img") == 4 and "renamed" in page.read_text()


def test_rows_name_nothing_outside_their_folder(tmp_path):
    call(draw(tmp_path / "pictures"), tmp_path / "out")
    for row in read_jsonl(tmp_path / "out" / "results.jsonl"):
        assert str(tmp_path) not in json.dumps(row)
