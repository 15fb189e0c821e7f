"""`openunirl generate`: the folder, resumption, what is refused; with the bundled tiny model, as a user calls it."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openunirl.cli import main
from openunirl.config import EvalConfig
from openunirl.evaluation.run import draw_and_judge
from openunirl.generate import check_settings, fingerprint, read_records
from openunirl.models.protocol import load_model
from openunirl.tasks import shapes
from openunirl.tasks.records import prompt_row, write_jsonl
from openunirl.tasks.worlds import WORLDS
from openunirl.types import ImageSampling

PROMPTS = ("a photo of a red circle", "a photo of a blue square", "a photo of two green triangles")
QUICK = ["--sampling.num-timesteps", "3", "--sampling.guidance-scale", "1.5"]
HEAVY = ("torch", "transformers", "accelerate")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def call(folder, *flags, prompts=PROMPTS, model="tiny-showo", code=0):
    asked = ["--prompts", *prompts] if prompts else []
    assert main(["generate", str(model), *asked, "--output-dir", str(folder), *QUICK, *flags]) == code


def refused(capsys, folder, *flags, code=1, **more):
    capsys.readouterr()
    call(folder, *flags, code=code, **more)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("openunirl: ") and err.count("\n") == 1, err
    return err


def state(folder):
    """path -> (bytes, time of the last change) of every file."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def pixels(folder):
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(Path(folder).glob("*/samples/*.png"))])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three prompts, two pictures each, in batches of 4."""
    folder = tmp_path_factory.mktemp("generate") / "made"
    call(folder, "--num-images", "2", "--batch-size", "4")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


# ---------------------------------------------------------------------------------------------- what is written


def test_layout(made):
    names = {"generate.json"}
    for i in range(3):
        names |= {f"{i:05d}/metadata.jsonl", f"{i:05d}/samples/0000.png", f"{i:05d}/samples/0001.png"}
    assert state(made).keys() == names
    for i, prompt in enumerate(PROMPTS):
        assert (made / f"{i:05d}" / "metadata.jsonl").read_text() == json.dumps({"prompt": prompt}) + "\n"
    assert pixels(made).shape == (6, 64, 64, 3)
    assert len({picture.tobytes() for picture in pixels(made)}) == 6  # other samples, other draws
    settings = json.loads((made / "generate.json").read_text())
    assert settings["model"]["weights"] == "tiny-showo" and settings["seed"] == 0
    assert settings["sampling"]["num_timesteps"] == 3 and settings["prompts"] == [{"prompt": p} for p in PROMPTS]
    assert settings["command"].startswith("openunirl generate tiny-showo --prompts 'a photo of a red circle'")


def test_it_draws_what_evaluation_draws(tmp_path):
    prompts = WORLDS["shapes"]().evaluation_prompts("heldout", 6, 0)[:3]
    config = EvalConfig(num_images=2, sampling=ImageSampling(num_timesteps=3, guidance_scale=1.5), batch_size=6)
    _, pictures = draw_and_judge(load_model("tiny-showo"), WORLDS["shapes"](), prompts, config, seed=5, ask_too=False)
    call(tmp_path / "g", "--num-images", "2", "--seed", "5", prompts=[p.prompt for p in prompts])
    assert np.array_equal(pixels(tmp_path / "g"), pictures)


def test_pixels_do_not_depend_on_the_batch(made, tmp_path, capsys):
    call(tmp_path / "one", "--num-images", "2", "--batch-size", "1")
    assert np.abs(pixels(tmp_path / "one") - pixels(made)).max() <= 1
    assert capsys.readouterr().out == f"{tmp_path / 'one'}\n"  # progress is on stderr


def test_the_seed_matters(made, tmp_path):
    call(tmp_path / "other", "--num-images", "2", "--seed", "1")
    assert (np.abs(pixels(tmp_path / "other") - pixels(made)).max((1, 2, 3)) > 30).all()


# --------------------------------------------------------------------------------------------------- again


def test_a_second_call_fills_in_what_is_missing_and_touches_nothing_else(copy, capsys):
    before = state(copy)
    gone = ["00000/samples/0001.png", "00001/metadata.jsonl", "00002/samples/0000.png"]
    for name in gone:
        (copy / name).unlink()
    (copy / "00000/samples/.0001.png.partial").write_bytes(b"half")  # what a killed call leaves
    call(copy, "--num-images", "2", "--batch-size", "4")
    assert "2 pictures drawn, 4 were there before" in capsys.readouterr().err
    after = state(copy)
    assert after.keys() == before.keys()
    assert {name: after[name] for name in after if name not in gone} == {
        name: before[name] for name in before if name not in gone
    }
    assert after["00001/metadata.jsonl"][0] == before["00001/metadata.jsonl"][0]
    for name in (gone[0], gone[2]):
        was = np.asarray(Image.open(io.BytesIO(before[name][0]))).astype(int)
        assert np.abs(np.asarray(Image.open(copy / name)) - was).max() <= 1


def test_a_picture_that_is_there_is_never_written_again(copy):
    (copy / "00001/samples/0000.png").write_bytes(b"mine")
    before = state(copy)
    call(copy, "--num-images", "2")
    assert state(copy) == before


def test_more_pictures_can_be_asked_for_later(copy):
    before = state(copy)
    call(copy, "--num-images", "3")
    after = state(copy)
    assert set(after) - set(before) == {f"{i:05d}/samples/0002.png" for i in range(3)}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "1"], ["seed 0, not 1"]),
        (["--sampling.guidance-scale", "2"], ["sampling.guidance_scale 1.5, not 2.0"]),
        (["--sampling.num-timesteps", "4", "--seed", "2"], ["sampling.num_timesteps 3, not 4", "seed 0, not 2"]),
        (["--model.max-text-len", "20"], ["model.max_text_len null, not 20"]),
    ],
    ids=str,
)
def test_other_settings_are_refused(copy, capsys, flags, words):
    before = state(copy)
    err = refused(capsys, copy, *flags)
    for word in (f"{copy} was made with", *words, "choose another --output-dir"):
        assert word in err
    assert state(copy) == before


def test_other_prompts_are_refused(copy, capsys):
    before = state(copy)
    err = refused(capsys, copy, prompts=(PROMPTS[0], "a photo of a red square", PROMPTS[2]))
    assert 'prompts 1 {"prompt": "a photo of a blue square"}, not {"prompt": "a photo of a red square"}' in err
    assert "number of prompts 3, not 2" in refused(capsys, copy, prompts=PROMPTS[:2])
    assert state(copy) == before


def test_another_model_is_refused_and_the_same_one_elsewhere_is_not(copy, capsys, tmp_path):
    model = load_model("tiny-showo")
    model.save(tmp_path / "same")
    call(copy, "--num-images", "2", model=tmp_path / "same")  # a copy with the same weights
    with torch.no_grad():
        next(model.net.parameters()).mul_(1.001)
    model.save(tmp_path / "tuned")
    err = refused(capsys, copy, "--num-images", "3", model=tmp_path / "tuned")
    assert f"made with the model tiny-showo, not {tmp_path / 'tuned'}: choose" in err
    assert not (copy / "00000/samples/0002.png").exists()


def test_weights_that_changed_in_place_are_noticed(tmp_path, capsys):
    model = load_model("tiny-showo")
    model.save(tmp_path / "model")
    call(tmp_path / "out", "--num-images", "1", prompts=PROMPTS[:1], model=tmp_path / "model")
    with torch.no_grad():
        list(model.net.parameters())[-1].add_(0.01)
    model.save(tmp_path / "model")
    err = refused(capsys, tmp_path / "out", prompts=PROMPTS[:1], model=tmp_path / "model")
    assert f"other weights than {tmp_path / 'model'} has now" in err


def test_fingerprints_are_of_the_weights():
    first, second = load_model("tiny-showo"), load_model("tiny-showo")
    assert fingerprint(first) == fingerprint(second) and len(fingerprint(first)) == 16
    with torch.no_grad():
        next(second.image_tokenizer.parameters()).add_(1e-3)
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_a_damaged_settings_file(tmp_path, content):
    file = tmp_path / "generate.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"generate\.json is damaged.*--output-dir"):
        check_settings(file, {"seed": 1}, made=tmp_path, flag="--output-dir")


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert f"{tmp_path} exists and holds no generate.json" in refused(capsys, tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


# ---------------------------------------------------------------------------------------------- prompt files


def test_a_kill_before_the_settings_are_there_locks_nothing(tmp_path):
    (tmp_path / "generate.json.partial").write_text('{"model"')
    call(tmp_path, prompts=PROMPTS[:1])
    assert (tmp_path / "generate.json").exists() and (tmp_path / "00000/samples/0000.png").exists()


def test_geneval_records_are_kept_whole(tmp_path, capsys):
    prompts = shapes.prompts("heldout", 6, 0)
    write_jsonl(tmp_path / "prompts.jsonl", [prompt_row(p) for p in prompts])
    call(tmp_path / "out", "--prompt-file", str(tmp_path / "prompts.jsonl"), "--num-images", "1", prompts=())
    for i, prompt in enumerate(prompts):
        assert json.loads((tmp_path / f"out/{i:05d}/metadata.jsonl").read_text()) == prompt_row(prompt)
    capsys.readouterr()


def test_plain_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa photo of a red circle\r\n a photo of a blue square ".encode())
    assert read_records(tmp_path / "a.txt") == [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1]}]
    (tmp_path / "b.jsonl").write_text('{"id": 7, "prompt": "x", "tag": null}\n{"prompt": "y"}')
    assert read_records(tmp_path / "b.jsonl") == [{"id": 7, "prompt": "x", "tag": None}, {"prompt": "y"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "a\n\nb\n", ["p.txt:2: the line is blank"]),
        ("p.txt", "a\n\udcff\n", ["p.txt:2: not UTF-8 at byte 1"]),
        ("p.txt", " \n", ["p.txt: the file is empty"]),
        ("p.jsonl", "", ["p.jsonl: the file is empty"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }\n', ["p.jsonl:2: not valid JSON at column 12"]),
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "a"}\n', ['p.jsonl:2: "prompt" is missing']),
        ("p.jsonl", '{"prompt": ""}', ["p.jsonl:1: \"prompt\" is ''"]),
        ("p.jsonl", '{"prompt": ["a"]}', ["p.jsonl:1:", "['a']"]),
        ("p.jsonl", '{"tag": "colors", "include": [], "prompt": "a"}', ['p.jsonl:1: "include" is empty']),
        ("p.csv", "a", ["p.csv: a prompt file is FILE.jsonl"]),
    ],
)
def test_bad_prompt_files(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    err = refused(capsys, tmp_path / "out", "--prompt-file", str(tmp_path / name), prompts=())
    for word in words:
        assert word in err
    assert not (tmp_path / "out").exists()


def test_a_missing_prompt_file(tmp_path, capsys):
    err = refused(capsys, tmp_path / "out", "--prompt-file", str(tmp_path / "no.txt"), prompts=())
    assert f"{tmp_path / 'no.txt'}: No such file" in err


def test_a_sampling_that_the_model_cannot_follow_leaves_no_folder(tmp_path, capsys):
    told = refused(capsys, tmp_path / "out", "--sampling.top-k", "5")
    assert "--sampling: top_k=5 must be 0 and top_p=1.0 must be 1" in told and not (tmp_path / "out").exists()
    call(tmp_path / "out", "--num-images", "1", prompts=PROMPTS[:1])  # the corrected call


def test_a_prompt_that_is_too_long_stops_before_anything_is_drawn(tmp_path, capsys):
    long = "a photo of " + "red " * 30 + "circle"
    err = refused(capsys, tmp_path / "out", prompts=(PROMPTS[0], long))
    assert "'a photo of red red" in err and "only 17 fit" in err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-images", "0"], ["--num-images is 0, wanted at least 1"]),
        (["--batch-size", "0"], ["--batch-size is 0"]),
        (["--seed", str(2**63)], ["--seed is 9223372036854775808", "64 bits"]),
        (["--sampling.num-timesteps", "0"], ["num-timesteps >= 1"]),
        (["--sampling.temperature", "0"], ["temperature > 0"]),
        (["--sampling.temperature", "nan"], ["--sampling.temperature is nan"]),
        (["--sampling.guidance-scale", "inf"], ["--sampling.guidance-scale is inf"]),
    ],
    ids=str,
)
def test_numbers_out_of_range(tmp_path, capsys, flags, words):
    err = refused(capsys, tmp_path / "out", *flags)
    for word in words:
        assert word in err
    assert "prompts, number 2" in refused(capsys, tmp_path / "out", prompts=("a", " "))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["openunirl generate wants a MODEL"]),
        (["tiny-shwo", "--prompts", "a"], ["'tiny-shwo'", "did you mean tiny-showo?"]),
        (["tiny-showo", "--output-dir", "x"], ["--prompts", "--prompt-file FILE, and there is neither"]),
        (["tiny-showo", "--prompts", "a", "--prompt-file", "b.txt"], ["--prompt-file FILE, not both"]),
        (["tiny-showo", "--prompts", "a"], ["openunirl generate wants --output-dir DIR"]),
        (["tiny-showo", "--promt", "a"], ["unknown flag --promt; did you mean --prompts?"]),
        (["tiny-showo", "--guidance-scale", "2"], ["did you mean --sampling.guidance-scale?"]),
        (["tiny-showo", "--prompts", "a", "--seed", "x"], ["--seed wants a whole number, not 'x'"]),
    ],
    ids=str,
)
def test_bad_command_lines(capsys, argv, words):
    assert main(["generate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    for word in words:
        assert word in err


def test_nothing_heavy_is_imported_before_the_command_line_is_read():
    lines = [[name, *rest] for name in ("generate", "answer") for rest in (["--help"], ["tiny-showo"], ["x", "--zzz"])]
    code = f"import sys; from openunirl.cli import main; codes = [main(a) for a in {lines!r}]; "
    code += f"print(codes, sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.endswith("[0, 2, 2, 0, 2, 2] []\n"), done.stderr


def test_an_interrupted_call_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("openunirl.generate.load_model", interrupt)
    assert "interrupted; the same command draws what is missing" in refused(capsys, tmp_path / "out", code=130)
