"""`openunirl evaluate MODEL` in the world of shapes, stopped and called again: nothing is lost, nothing done twice.
(Of photographs: test_photos.py.)"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from openunirl.cli import main
from openunirl.models.showo import Showo
from openunirl.tasks.records import read_jsonl
from openunirl.tasks.shapes_oracle import Oracle

FLAGS = ["--num-prompts", "6", "--num-images", "2", "--num-references", "12", "--sampling.num-timesteps", "3"]
SLOW = """
import sys, time
from openunirl.models.showo import Showo
real = Showo.decode
Showo.decode = lambda self, images: (time.sleep(0.3), real(self, images))[1]
from openunirl.cli import main
main(sys.argv[1:])
"""


def arguments(out, *flags):
    return ["evaluate", "tiny-showo", *FLAGS, "--batch-size", "4", "--output-dir", str(out), *flags]


def call(out, *flags, code=0):
    assert main(arguments(out, *flags)) == code


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluation that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    call(out)
    return out


def files(out):
    """Everything but what holds a command and versions."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("settings.json", "generate.json")
    }


def rows(out, stage):
    """(prompt, sample) of each line in the journal of a stage."""
    lines = read_jsonl(out / "journal" / stage / "process-0000.jsonl")
    return [(row["index"], row["sample"]) for row in lines]


@pytest.fixture
def counted(monkeypatch):
    """How many pictures are drawn, and how many questions answered, from here on."""
    done = {"drawn": 0, "answered": 0}
    sample, answer = Showo.sample_images, Showo.sample_answers

    def drawing(self, prompts, *args):
        done["drawn"] += len(prompts)
        return sample(self, prompts, *args)

    def answering(self, images, questions, *args):
        done["answered"] += len(questions)
        return answer(self, images, questions, *args)

    monkeypatch.setattr(Showo, "sample_images", drawing)
    monkeypatch.setattr(Showo, "sample_answers", answering)
    return done


@pytest.mark.parametrize(
    ("of", "name", "at", "drawn"),
    [
        (Showo, "sample_images", 2, 4),
        (Oracle, "detect", 3, 8),
        (Showo, "sample_answers", 5, 12),  # of the references
        ("openunirl.evaluation.run_command", "write_summary", 1, 12),
    ],
)
def test_it_goes_on_where_it_was_stopped(whole, tmp_path, monkeypatch, counted, of, name, at, drawn):
    """`drawn`: the pictures whose rows are on disk before the call at which it is stopped."""
    out, calls = tmp_path / "out", {"n": 0}
    of = sys.modules[of] if isinstance(of, str) else of
    with monkeypatch.context() as patch:
        original = getattr(of, name)

        def stop(*args, **more):
            calls["n"] += 1
            if calls["n"] == at:
                raise KeyboardInterrupt
            return original(*args, **more)

        patch.setattr(of, name, stop)
        call(out, code=130)
    assert not (out / "evaluation.json").exists()
    assert len(rows(out, "drawing")) == drawn
    pictures = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    answered = len(list((out / "journal").glob("reading/*"))) and len(rows(out, "reading"))
    counted |= {"drawn": 0, "answered": 0}
    call(out)
    assert files(out) == files(whole)
    assert counted == {"drawn": 12 - drawn, "answered": 24 - drawn - answered}
    kept = {path for path in pictures if (int(path.parts[-3]), int(path.stem)) in rows(out, "drawing")[:drawn]}
    assert len(kept) == drawn and all(path.stat().st_mtime_ns == pictures[path] for path in kept)
    assert sorted(rows(out, "drawing")) == [(i, k) for i in range(6) for k in range(2)]


def test_a_killed_one_goes_on(whole, tmp_path, counted):
    """SIGKILL at an arbitrary moment after the first rows."""
    out = tmp_path / "out"
    journal = out / "journal" / "drawing" / "process-0000.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = journal.read_text().splitlines(keepends=True)
    before = sum(line.endswith("\n") for line in lines)
    assert 0 < before < 12
    with open(journal, "a") as file:
        file.write('{"tag": "sing')  # the half-written line that a kill may leave
    call(out)
    assert counted["drawn"] == 12 - before
    assert files(out) == files(whole)


def test_a_finished_one_repeats_nothing(whole, counted):
    was = files(whole)
    call(whole)
    assert files(whole) == was and not any(counted.values())


def test_a_picture_that_is_gone_or_another_is_drawn_again(whole, tmp_path, counted):
    out = shutil.copytree(whole, tmp_path / "out")
    places = [out / "evaluation" / f"0000{i}" / "samples" / "0001.png" for i in range(3)]
    places[0].unlink()
    places[1].write_bytes(places[1].read_bytes()[:60])
    Image.fromarray(255 - np.asarray(Image.open(places[2]))).save(places[2])
    call(out)
    assert counted == {"drawn": 3, "answered": 3}
    for place in places:
        other = whole / place.relative_to(out)
        difference = np.asarray(Image.open(place)).astype(int) - np.asarray(Image.open(other))
        assert np.abs(difference).max() <= 1  # in another batch pixels may round differently
    told, same = (json.loads((each / "evaluation.json").read_text()) for each in (out, whole))
    assert told == same


def test_more_samples_can_be_added(whole, tmp_path, counted):
    out = tmp_path / "out"
    call(out, "--num-images", "1")
    call(out)
    assert counted == {"drawn": 12, "answered": 24}
    told, same = (json.loads((each / "evaluation.json").read_text()) for each in (out, whole))
    assert told == same


def test_other_settings_and_other_rows_are_refused(whole, tmp_path, capsys):
    for flags, words in (
        (["--seed", "1"], "seed 0, not 1"),
        (["--max-new-tokens", "3"], "max_new_tokens"),
        (["--split", "validation"], 'split "heldout", not "validation"'),
        (["--num-references", "13"], "num_references 12, not 13"),
        (["--sampling.num-timesteps", "5"], "sampling.num_timesteps 3, not 5"),
        (["--dtype", "bfloat16"], 'dtype "float32", not "bfloat16"'),
    ):
        capsys.readouterr()
        call(whole, *flags, code=1)
        assert words in capsys.readouterr().err.splitlines()[-1], flags
    out = tmp_path / "out"
    (out / "journal" / "drawing").mkdir(parents=True)
    for name in ("settings.json", "evaluation/generate.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes((whole / name).read_bytes())
    (out / "journal" / "drawing" / "process-0000.jsonl").write_text('{"index": 0, "sample": 0}\n')
    capsys.readouterr()
    call(out, code=1)
    assert "process-0000.jsonl:1 is no row of this command: delete it" in capsys.readouterr().err
