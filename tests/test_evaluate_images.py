"""`openunirl evaluate --images DIR`: scores, files, resumption, shares of several processes, and what is no score."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openunirl.cli import main
from openunirl.evaluation.geneval import official_summary, score
from openunirl.evaluation.image_folder import read_folder
from openunirl.evaluation.image_scores import no_score
from openunirl.evaluation.images_command import score_folder
from openunirl.tasks import shapes
from openunirl.tasks.geneval import evaluation_prompts
from openunirl.tasks.records import read_jsonl, write_jsonl
from openunirl.tasks.shapes_oracle import Oracle
from photo_checkpoints import save_clip, save_mask2former
from picture_folders import PROMPTS, Counting, call, draw, no_summary, refused, rows

OFFICIAL_KEYS = ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "pictures")


# -------------------------------------------------------------------------------------------------- what is written


def test_results_are_read_and_written_to_the_byte_and_are_the_official_ones(folder, tmp_path):
    """With GenEval's own keys alone, too, as its tools write them."""
    call(folder, tmp_path / "out")
    file, again = tmp_path / "out" / "results.jsonl", tmp_path / "again.jsonl"
    write_jsonl(again, read_jsonl(file))
    assert again.read_bytes() == file.read_bytes()
    told = rows(tmp_path / "out")
    write_jsonl(again, [{key: row[key] for key in OFFICIAL_KEYS} for row in told])
    assert official_summary(read_jsonl(again)) == official_summary(told)


def test_rows_and_summary(folder, tmp_path, capsys):
    call(folder, tmp_path / "out", "--batch-size", "5")
    told, pictures = rows(tmp_path / "out"), read_folder(folder)
    assert [row["filename"] for row in told] == [picture.name for picture in pictures]
    assert all(list(row)[:7] == OFFICIAL_KEYS for row in told)
    for row, picture in zip(told, pictures, strict=True):
        image = np.array(Image.open(picture.file))
        (found,) = Oracle().detect([image])
        verdict = score(picture.prompt.metadata(), found, lambda name, seen, i=image: Oracle().colors(i, seen, name))
        assert (row["correct"], row["reason"]) == (verdict.correct, verdict.reason)
        assert json.loads(row["metadata"]) == picture.prompt.metadata()
        kept = {name: [[*d.box, d.score] for d in reversed(objects)] for name, objects in found.items()}
        assert json.loads(row["details"]) == kept  # equal scores: the later one first
    assert all(row["correct"] for row in told if row["sample"] == 0)
    right = sum(row["correct"] for row in told)
    assert PROMPTS <= right < 2 * PROMPTS
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["label"] == "oracle" and summary["pictures"] == 24 and summary["distinct_pictures"] == PROMPTS
    geneval = summary["geneval"]
    assert geneval["images"]["correct"] == right and geneval["distinct_prompts"] == len(
        {p.prompt.prompt for p in pictures}
    )
    low, high = geneval["tasks"]["counting"]["ci95"]
    assert 0 <= low <= geneval["tasks"]["counting"]["accuracy"] <= high <= 1
    out = capsys.readouterr().out
    assert f"Total images: {len(told)}" in official_summary(told) and official_summary(told) in out
    assert "24 pictures scored, 0 were scored before" in out and "12 pictures are exact copies" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", "results.jsonl", "settings.json"}


def test_it_agrees_with_the_evaluation_of_the_model_that_drew_them(tmp_path):
    flags = "--num-prompts 12 --num-references 12 --sampling.num-timesteps 8 --sampling.guidance-scale 3"
    assert main(["evaluate", "tiny-showo", *flags.split(), "--output-dir", str(tmp_path / "model")]) == 0
    call(tmp_path / "model" / "evaluation", tmp_path / "out")
    ours, theirs = rows(tmp_path / "out"), read_jsonl(tmp_path / "model" / "evaluation" / "results.jsonl")
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[key] == b[key] for key in (*OFFICIAL_KEYS, "index", "sample"))
    summaries = [json.loads(p.read_text())["geneval"] for p in tmp_path.glob("*/evaluation.json")]
    assert summaries[0] == summaries[1]


def test_the_batch_size_changes_nothing(folder, tmp_path):
    call(folder, tmp_path / "one")
    call(folder, tmp_path / "many", "--batch-size", "64")
    assert rows(tmp_path / "one") == rows(tmp_path / "many")


# -------------------------------------------------------------------------------------------------------- again


@pytest.fixture
def counting(monkeypatch):
    """A function that puts a Counting oracle in the place of the oracle and returns it."""

    def install(most=10**9):
        judge = Counting(most)
        monkeypatch.setattr("openunirl.tasks.shapes_oracle.Oracle", lambda: judge)
        return judge

    return install


def test_an_interrupted_call_is_continued(folder, tmp_path, counting, capsys):
    call(folder, tmp_path / "whole", "--batch-size", "3")
    counting(10)
    call(folder, tmp_path / "out", "--batch-size", "3", code=130)
    assert "the same command again" in capsys.readouterr().err
    journal = tmp_path / "out" / "journal" / "process-0000.jsonl"
    assert len(read_jsonl(journal)) == 9 and not (tmp_path / "out" / "evaluation.json").exists()
    with open(journal, "a") as file:
        file.write('{"filename": "00004/samples/0001.png", "tag": "cou')  # what a kill may leave
    judge = counting()
    call(folder, tmp_path / "out", "--batch-size", "3")
    assert judge.seen == 24 - 9
    assert "15 pictures scored, 9 were scored before" in capsys.readouterr().out
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
    judge = counting()
    call(folder, tmp_path / "out")
    assert judge.seen == 0 and rows(tmp_path / "out") == rows(tmp_path / "whole")


def journal_names(out):
    """The pictures with a whole row in the journal; files may come and go meanwhile."""
    found = []
    for file in (out / "journal").glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            lines = file.read_text().splitlines(keepends=True)
            found += [json.loads(line)["filename"] for line in lines if line.endswith("\n")]
    return found


def test_a_killed_process_loses_and_repeats_nothing(folder, tmp_path):
    """SIGKILL at an arbitrary moment, several times."""
    out, code = tmp_path / "out", "import time, openunirl.tasks.shapes_oracle as o\n"
    code += "slow = o.Oracle._detect_one\no.Oracle._detect_one = lambda s, i: (time.sleep(0.2), slow(s, i))[1]\n"
    code += f"from openunirl.cli import main\nmain(['evaluate', '--images', {str(folder)!r}, '--output-dir', "
    code += f"{str(out)!r}, '--detector', 'oracle'])"
    before = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and len(set(journal_names(out))) < before + 3:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        scored = journal_names(out)
        assert before + 3 <= len(scored) == len(set(scored)) < 24
        before = len(scored)
    call(folder, out)
    call(folder, tmp_path / "whole")
    assert rows(out) == rows(tmp_path / "whole")


def test_a_picture_that_was_drawn_again_is_scored_again(folder, tmp_path, counting):
    call(folder, tmp_path / "out")
    before = rows(tmp_path / "out")
    shutil.copy(folder / "00005/samples/0001.png", folder / "00004/samples/0000.png")
    write_jsonl(folder / "00007/metadata.jsonl", [read_jsonl(folder / "00008/metadata.jsonl")[0]])
    judge = counting()
    call(folder, tmp_path / "out")
    assert judge.seen == 1 + 2
    changed = [a["filename"] for a, b in zip(before, rows(tmp_path / "out"), strict=True) if a != b]
    assert changed == ["00004/samples/0000.png", "00007/samples/0000.png", "00007/samples/0001.png"]


def test_more_pictures_can_be_added_later(folder, tmp_path, counting):
    call(folder, tmp_path / "out")
    for index in range(PROMPTS):
        shutil.copy(folder / f"{index:05d}/samples/0000.png", folder / f"{index:05d}/samples/0002.png")
    judge = counting()
    call(folder, tmp_path / "out")
    assert judge.seen == PROMPTS and len(rows(tmp_path / "out")) == 36


def test_results_of_something_else_are_refused(folder, tmp_path, capsys):
    call(folder, tmp_path / "out")
    draw(tmp_path / "others", seed=1)
    err = refused(capsys, tmp_path / "others", tmp_path / "out")
    assert (
        "was made with the pictures of" in err
        and "choose another --output-dir" in err
        and not no_summary(tmp_path / "out")
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.jsonl").write_text("{}\n")
    assert "holds no settings.json" in refused(capsys, folder, tmp_path / "mine")
    (tmp_path / "out" / "results.jsonl").write_text('{"filename": "a"}\n')
    assert "results.jsonl:1 is no row of this command" in refused(capsys, folder, tmp_path / "out")


def test_several_processes_take_shares(folder, tmp_path):
    call(folder, tmp_path / "whole")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    argv = ["evaluate", "--images", str(folder), "--output-dir", str(tmp_path / "out"), "--detector", "oracle"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "openunirl.cli", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    (main_out, main_err), (other_out, other_err) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], main_err + other_err
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
    assert "24 pictures scored, 0 were scored before" in main_out and other_out == ""
    assert "scoring (process 1 of 2)" in main_err and "12/12" in main_err


# ---------------------------------------------------------------------------------------------- what is no score


def test_equal_pictures(folder, tmp_path, capsys):
    same = (folder / "00000/samples/0000.png").read_bytes()
    for file in folder.glob("*/samples/*.png"):
        file.write_bytes(same)
    err = refused(capsys, folder, tmp_path / "out")
    assert "all 24 pictures" in err and "are equal" in err and no_summary(tmp_path / "out")


def test_nothing_detected(folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for file in folder.glob("*/samples/*.png"):
        Image.fromarray(rng.integers(150, 160, (64, 64, 3), dtype=np.uint8)).save(file)
    err = refused(capsys, folder, tmp_path / "out")
    assert f"no object was detected in any of the 24 pictures in {folder}," in err and "weights are damaged" in err
    assert no_summary(tmp_path / "out") and len(rows(tmp_path / "out")) == 24
    assert "no object was detected" in refused(capsys, folder, tmp_path / "out")  # nor is it one the second time


def test_all_scores_zero(folder, tmp_path, capsys):
    """Metadata moved by one folder, of prompts that share nothing."""
    wanted = [{"class": name, "count": 4} for name in shapes.SHAPES]
    for index in range(PROMPTS):
        write_jsonl(
            folder / f"{index:05d}/metadata.jsonl",
            [{"tag": "counting", "include": [wanted[index % 8] | {"count": 5}], "prompt": f"five {index}"}],
        )
    err = refused(capsys, folder, tmp_path / "out")
    assert (
        f"0 of 24 pictures in {folder} are right although 24 of them show objects" in err
        and "metadata of other pictures" in err
    )
    assert re.search(r'reason is "expected \w+>=5, found \d"', err) and no_summary(tmp_path / "out")


def test_a_summary_of_before_does_not_outlive_what_it_is_of(folder, tmp_path, capsys, monkeypatch):
    out, last = tmp_path / "out", folder / "00003/samples/0001.png"
    shutil.copytree(folder, tmp_path / "whole")

    def no_weights():
        raise ValueError("weights are not there")

    def all_equal():
        same = (folder / "00000/samples/0000.png").read_bytes()
        for file in folder.glob("*/samples/*.png"):
            file.write_bytes(same)

    for damage, words in (
        (last.unlink, "finish drawing"),
        (all_equal, "are equal"),
        (lambda: monkeypatch.setattr("openunirl.tasks.shapes_oracle.Oracle", no_weights), "weights are not there"),
    ):
        call(folder, out)
        assert not no_summary(out)
        damage()
        assert words in refused(capsys, folder, out)
        assert no_summary(out) and len(rows(out)) == 24  # nothing needs to be scored again
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True)
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    last.write_bytes(b"damaged")
    err = refused(capsys, folder, out)
    assert f"1 of 24 pictures in {folder} cannot be read (00003/samples/0001.png: damaged, or no picture" in err
    assert no_summary(out) and not (out / "results.jsonl").exists()


def test_unreadable_pictures_cost_no_other_work(folder, tmp_path, capsys, counting):
    whole = (folder / "00003/samples/0001.png").read_bytes()
    (folder / "00003/samples/0001.png").write_bytes(whole[:200])
    (folder / "00007/samples/0000.png").write_bytes(b"")
    err = refused(capsys, folder, tmp_path / "out", "--batch-size", "4")
    assert "2 of 24 pictures in " in err and "00007/samples/0000.png: the file is empty" in err
    shutil.copy(folder / "00006/samples/0001.png", folder / "00007/samples/0000.png")
    (folder / "00003/samples/0001.png").write_bytes(whole)
    judge = counting()
    call(folder, tmp_path / "out", "--batch-size", "4")
    assert judge.seen == 2 and len(rows(tmp_path / "out")) == 24


def test_metadata_of_another_detector(folder, tmp_path, capsys):
    err = refused(capsys, folder, tmp_path / "out", detector="mask2former")
    assert "which the detector mask2former does not know" in err and not (tmp_path / "out").exists()


def test_command_lines(capsys, folder, tmp_path):
    out = str(tmp_path / "out")
    for argv, words in (
        (["--images"], "--images wants a text, and nothing follows it"),
        (["--images", str(folder)], "wants --output-dir DIR"),
        (["--images", str(folder), "--detector", "yolo"], "one of mask2former, oracle, not 'yolo'"),
        (["tiny-showo", "--images", str(folder), "--output-dir", out], "did not expect 'tiny-showo'"),
        (["--images", str(folder), "--output-dirr", out], "did you mean --output-dir?"),
    ):
        assert main(["evaluate", *argv]) == 2
        assert words in capsys.readouterr().err
    assert "--batch-size is 0" in refused(capsys, folder, tmp_path / "out", "--batch-size", "0")
    assert main(["evaluate", "--images", "x", "--help"]) == 0
    assert "--color-weights" in capsys.readouterr().out


def test_no_rows_would_be_no_score():
    row = {"correct": False, "reason": "a\nb", "details": "{}"}
    assert "no object was detected in any of the 2" in (no_score([row, row], Path()) or "")
    seen = row | {"details": '{"cat": [[0, 0, 1, 1, 0.9]]}'}
    assert "0 of 2 pictures in . are right although 1" in (no_score([row, seen], Path()) or "")
    assert no_score([row, seen, seen | {"correct": True}], Path()) is None


# ---------------------------------------------------------------------------------------------------- photographs


def test_photographs_end_to_end(tmp_path, capsys):
    """Small random checkpoints of the real kinds, GenEval's own records; what they find is made the prompts."""
    detector, color = save_mask2former(tmp_path / "mask2former"), save_clip(tmp_path / "clip")
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    metadata = [prompt.metadata() for prompt in evaluation_prompts()]
    chosen = [next(m for m in metadata if m["tag"] == tag) for tag in ("single_object", "colors")]
    chosen.append(
        {"tag": "colors", "include": [{"class": "clock", "count": 1, "color": "pink"}], "prompt": "a pink clock"}
    )
    chosen.append({"tag": "single_object", "include": [{"class": "handbag", "count": 1}], "prompt": "a handbag"})
    for index, record in enumerate(chosen):
        (folder / f"{index:05d}" / "samples").mkdir(parents=True)
        write_jsonl(folder / f"{index:05d}" / "metadata.jsonl", [record])
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((64, 48 + 16 * (index % 2))).save(folder / f"{index:05d}" / "samples" / "0000.png")
    flags = ["--detector-weights", str(detector), "--color-weights", str(color), "--batch-size", "2"]
    call(folder, tmp_path / "out", *flags, detector="mask2former")
    told = rows(tmp_path / "out")
    assert [row["correct"] for row in told][3] and "handbag" in json.loads(told[3]["details"])
    for row in told:
        for boxes in json.loads(row["details"]).values():
            assert all(len(box) == 5 and box[4] > 0.3 for box in boxes)
            assert [box[4] for box in boxes] == sorted((box[4] for box in boxes), reverse=True)
    assert told[2]["reason"] == "" or told[2]["reason"].startswith("expected pink clock>=1, found 0 pink; and 1 ")
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["label"] == f"GenEval protocol, weights {detector} and {color}"
    assert summary["official_prompts"] == {"scored": 2, "of": 553}
    save_mask2former(detector, seed=1)  # other weights under the same name
    err = refused(capsys, folder, tmp_path / "out", *flags, detector="mask2former")
    assert "was made with detector_fingerprint" in err


def test_from_python(folder, tmp_path):
    summary = score_folder(folder, output_dir=tmp_path / "out", detector="oracle")
    assert summary is not None and summary["geneval"]["overall"] >= 0.5
    with pytest.raises(ValueError, match="unknown detector 'yolo'; known: mask2former, oracle"):
        score_folder(Path(folder), output_dir=tmp_path / "out", detector="yolo")
