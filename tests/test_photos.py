"""`openunirl evaluate MODEL --world geneval`: what is written, continued after a stop, asked, matched and refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from openunirl.cli import main
from openunirl.evaluation.geneval import official_summary
from openunirl.evaluation.image_folder import digest
from openunirl.evaluation.llm_judge import ChatModel
from openunirl.models.showo import Showo
from openunirl.presets_real import PUBLISHED
from openunirl.tasks.records import read_jsonl, write_jsonl
from openunirl.tasks.worlds import WORLDS
from photo_checkpoints import name_answers, save_chat, save_clip, save_mask2former

RECORDS = [
    {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
    for name in ("handbag", "bench", "cup")  # the first is what the random detector finds
]
NAMING = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from photo_checkpoints import name_answers
name_answers()
from openunirl.cli import run
run()
"""
"""The command in a process of its own."""
QUESTION = {"question": "What is the main item in this image?", "answer": "handbag"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module", autouse=True)
def named():
    with pytest.MonkeyPatch.context() as patch:
        name_answers(patch.setattr)
        yield


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    place = tmp_path_factory.mktemp("judges")
    save_mask2former(place / "mask2former")
    save_clip(place / "clip")
    write_jsonl(place / "prompts.jsonl", [RECORDS[0] | QUESTION, *RECORDS[1:]])
    return place


def arguments(judges, out, *flags, prompts=None):
    argv = ["evaluate", "tiny-showo", "--world", "geneval", "--output-dir", out, "--num-images", 2]
    argv += ["--sampling.num-timesteps", 2, "--detector-weights", judges / "mask2former", "--batch-size", 4]
    argv += ["--color-weights", judges / "clip", "--prompt-file", prompts or judges / "prompts.jsonl", *flags]
    return [str(each) for each in argv]


def run(judges, out, *flags, code=0, prompts=None):
    assert main(arguments(judges, out, *flags, prompts=prompts)) == code


@pytest.fixture
def call(judges):
    return lambda out, *flags, **more: run(judges, out, *flags, **more)


@pytest.fixture(scope="module")
def base(judges, tmp_path_factory):
    """An evaluation, whose pictures serve others as references."""
    out = tmp_path_factory.mktemp("base") / "out"
    run(judges, out, "--seed", 7)
    return out


@pytest.fixture(scope="module")
def whole(judges, base, tmp_path_factory):
    """An evaluation that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(judges, out, "--references", base / "evaluation")
    return out


def files(out):
    """Everything but the summaries' commands and times."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("settings.json", "generate.json", "evaluation.json")
    }


def numbers(out):
    told = json.loads((out / "evaluation.json").read_text())
    return {name: told[name] for name in ("geneval", "understanding", "imbalance", "self_reward", "unsettled")}


# ------------------------------------------------------------------------------------------------ what is written


def test_both_tasks_and_their_imbalance(call, base, tmp_path, capsys):
    out = tmp_path / "out"
    call(out, "--references", base / "evaluation")
    printed = capsys.readouterr().out
    for words in ("Drawing (GenEval)", "imbalance, in %", "unsettled answers on reference pictures"):
        assert words in printed
    summary = json.loads((out / "evaluation.json").read_text())
    own, read = (read_jsonl(out / "evaluation" / name) for name in ("results.jsonl", "references.jsonl"))
    assert f"As summary_scores.py prints it:\n\n{official_summary(own)}" in printed
    assert len(own) == summary["geneval"]["n"] == 6 and summary["geneval"]["overall"] == pytest.approx(1 / 3)
    assert [row["filename"] for row in read] == ["00000/samples/0000.png", "00000/samples/0001.png"]
    assert {row["question"] for row in read} == {QUESTION["question"]}
    assert own[2]["question"] == "What is the main object in this picture?"  # ours, where the record has none
    assert summary["understanding"]["n"] == 2 and summary["reference_pictures"]["right"] == 2
    match = WORLDS["geneval"]().match
    for row in (*own, *read):
        found = match(row["tag"], row["expected"], row["answer"])
        assert (row["answer_correct"], row["settled"]) == (found.same, found.settled)
    assert summary["imbalance"]["own_images"]["image_wrong_answer_wrong"] == 4
    assert summary["label"].startswith("GenEval protocol, weights ") and summary["answers_judged_by"] == "rules"
    assert summary["unsettled"]["own"]["n"] == 6 and summary["max_new_tokens"] == 8
    assert set(summary["detector"]) == {"detector_fingerprint", "color_fingerprint"}
    for row, place in ((own[0], out), (read[1], base)):
        assert row["digest"] == digest((place / "evaluation" / row["filename"]).read_bytes())


def test_references_of_other_prompts_are_told(call, base, tmp_path, capsys):
    """Of the file's three prompts the first two are drawn, in bfloat16; the references show the third."""
    write_jsonl(tmp_path / "prompts.jsonl", [RECORDS[0] | {"prompt": "a handbag"}, *RECORDS[1:], RECORDS[0] | QUESTION])
    flags = ["--references", base / "evaluation", "--num-prompts", 2, "--dtype", "bfloat16"]
    call(tmp_path / "out", *flags, prompts=tmp_path / "prompts.jsonl")
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["geneval"]["n"] == 4 and summary["dtype"] == "bfloat16"
    read = summary["reference_pictures"]
    assert (read["right"], read["of_evaluated_prompts"], read["left_out"]["ignored_files"]) == (2, 0, 0)
    told = "2 reference pictures are right, and 0 of these show an evaluated prompt; without any, there is no second"
    assert told in capsys.readouterr().out


def test_fewer_prompts_are_balanced_over_the_tasks():
    prompts = WORLDS["geneval"]().evaluation_prompts("heldout", 12, 0)
    assert sorted(p.tag for p in prompts) == sorted(list(dict.fromkeys(p.tag for p in prompts)) * 2)
    assert len(WORLDS["geneval"]().evaluation_prompts("heldout", 10_000, 0)) == 553


# ---------------------------------------------------------------------------------------------------------- again


@pytest.mark.parametrize("stage", ["sample_images", "decode", "detect", "sample_answers", "write_jsonl"])
def test_a_stopped_evaluation_is_continued(call, base, whole, tmp_path, monkeypatch, stage):
    """Stopped at the second call of a stage; then no picture is drawn again, and the result is the same."""
    out, calls = tmp_path / "out", {"n": 0}

    def stopping(of, name):
        original = getattr(of, name)

        def stop(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == 2:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(of, name, stop)

    from openunirl.evaluation import photos
    from openunirl.evaluation.detectors import Mask2FormerDetector

    stopping({"detect": Mask2FormerDetector, "write_jsonl": photos}.get(stage, Showo), stage)
    call(out, "--references", base / "evaluation", code=130)
    assert not (out / "evaluation.json").exists()
    before = {name: time for name, time in times(out).items() if name.endswith(".png")}
    monkeypatch.undo()
    call(out, "--references", base / "evaluation")
    assert files(out) == files(whole) and numbers(out) == numbers(whole)
    assert all(times(out)[name] == time for name, time in before.items())


def times(out):
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_finished_evaluation_repeats_nothing(call, base, whole, monkeypatch):
    was = numbers(whole)

    def never(*_, **__):
        raise AssertionError("it was done before")

    monkeypatch.setattr(Showo, "sample_images", never)
    monkeypatch.setattr(Showo, "sample_answers", never)
    answers = whole / "answers" / "process-0000.jsonl"
    answers.write_bytes(answers.read_bytes() + b'{"image": "0000')  # what a kill may leave
    call(whole, "--references", base / "evaluation")
    assert numbers(whole) == was


def test_several_processes_take_shares(judges, base, whole, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    argv = arguments(judges, tmp_path / "out", "--references", base / "evaluation")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", NAMING, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    (main_out, main_err), (other_out, other_err) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], main_err + other_err
    assert "written: " in main_out and other_out == ""
    told = [read_jsonl(out / "evaluation" / "results.jsonl") for out in (tmp_path / "out", whole)]
    for ours, theirs in zip(*told, strict=True):
        assert all(ours[name] == theirs[name] for name in ("filename", "correct", "answer", "question", "index"))
    assert len(list((tmp_path / "out" / "answers").glob("process-*.jsonl"))) == 2


# ------------------------------------------------------------------------------------------------------- refusals


def test_refusals(call, base, judges, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(*flags, code=1, **more):
        capsys.readouterr()
        call(out, *flags, code=code, **more)
        return capsys.readouterr().err.splitlines()[-1]

    assert "there is no folder" in refused("--references", tmp_path / "no") and not out.exists()
    assert "--num-images is 0" in refused("--num-images", 0)
    assert "asks for 'circle', which the detector" in refused(prompts=circle(tmp_path)) and not out.exists()
    for flags, words in (
        (("--detector-weights", tmp_path / "no"), "no cannot be read as AutoConfig"),
        (("--detector-weights", judges / "clip"), "is of the kind 'clip', not 'mask2former'"),
        (("--color-weights", tmp_path / "no"), "no cannot be read as AutoConfig"),
        (("--llm-judge", tmp_path / "no"), "no cannot be read as AutoConfig"),
        (("--sampling.top-k", 5), "--sampling: top_k=5 must be 0"),
    ):
        assert words in refused(*flags) and not out.exists()  # before hours of drawing
    record = {"tag": "own", "include": [{"class": "handbag", "count": 1}], "prompt": "a handbag"}
    write_jsonl(tmp_path / "own.jsonl", [RECORDS[0], record])
    assert "own.jsonl:2: tag 'own' has no questions" in refused(prompts=tmp_path / "own.jsonl")
    shutil.copytree(base / "evaluation", tmp_path / "references")
    write_jsonl(tmp_path / "references/00001/metadata.jsonl", [record])
    err = refused("--references", tmp_path / "references")
    assert "00001/metadata.jsonl: tag 'own' has no questions" in err and not out.exists()
    call(out)
    assert 'was made with dtype "float32", not "bfloat16"' in refused("--dtype", "bfloat16")
    assert (out / "evaluation.json").exists()  # of another call
    assert "no cannot be read as AutoConfig" in refused("--detector-weights", tmp_path / "no")
    assert not (out / "evaluation.json").exists()  # of this one, which ended in an error
    assert "was made with references false, not true" in refused("--references", base / "evaluation")
    assert "was made with max_new_tokens 8, not 3" in refused("--max-new-tokens", 3)
    assert "was made with seed 0, not 1" in refused("--seed", 1)
    assert "holds no settings.json" in refused("--output-dir", judges)
    assert main(["evaluate", "tiny-showo", "--references", "x"]) == 2
    assert "--references belongs to --world geneval" in capsys.readouterr().err
    assert main(["evaluate", "tiny-showo", "--settings", "showo-51"]) == 2
    assert "did you mean showo-512?" in capsys.readouterr().err


def test_errors_name_the_pictures_that_they_are_of(call, base, whole, tmp_path, capsys):
    """A damaged picture of its own, of the references, and references that are all wrong."""
    out, references = tmp_path / "out", tmp_path / "references"
    shutil.copytree(whole, out)
    shutil.copytree(base / "evaluation", references)

    def refused():
        capsys.readouterr()
        call(out, "--references", references, code=1)
        return capsys.readouterr().err.splitlines()[-1]

    (own := out / "evaluation/00001/samples/0000.png").write_bytes(b"x")
    err = refused()
    assert f"1 of 6 pictures in {out / 'evaluation'} cannot be read" in err and "BytesIO" not in err
    assert "delete them, and the same call draws them again" in err
    own.unlink()
    (references / "00001/samples/0000.png").write_bytes(b"x")
    err = refused()  # the picture of its own is there again
    assert f"1 of 6 pictures in {references} cannot be read" in err and "get them again or remove them" in err
    assert own.read_bytes() == (whole / own.relative_to(out)).read_bytes()
    (references / "00001/samples/0000.png").unlink()
    shutil.rmtree(references / "00000")
    err = refused()
    assert f"0 of 3 pictures in {references} are right" in err and "references that do not show what their" in err
    assert "cannot draw" not in err


def circle(place):
    record = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}
    write_jsonl(place / "circle.jsonl", [record | {"question": "what is it?", "answer": "circle"}])
    return place / "circle.jsonl"


# ------------------------------------------------------------------------------------------- published names


def test_a_published_name_brings_its_parts_and_settings(monkeypatch):
    called = {}

    def note(name):
        return lambda *args, **kwargs: called.update({name: (args, kwargs)})

    monkeypatch.setattr("openunirl.evaluation.photos.evaluate_photos", note("evaluate"))
    monkeypatch.setattr("openunirl.generate.generate", note("generate"))
    monkeypatch.setattr("openunirl.answer.answer", note("answer"))
    known = PUBLISHED["showo-512"]
    assert main(["evaluate", "showo-512", "--num-images", "1"]) == 0
    (model, config), _ = called["evaluate"]
    assert model == known.model and config.sampling == known.sampling
    assert (config.num_prompts, config.num_images, config.max_new_tokens) == (553, 1, 100)
    assert main(["generate", "showo-512", "--prompts", "a", "--output-dir", "x"]) == 0
    assert called["generate"][0][0] == known.model and called["generate"][1]["sampling"] == known.sampling
    assert main(["answer", "own/model", "--settings", "janus-1.3b", "--images", "a.png", "--questions", "b"]) == 0
    (model, _), rest = called["answer"]
    assert (model.weights, model.family, model.roles) == ("own/model", "janus", ("User", "Assistant"))
    assert model.image_tokenizer is None and rest["sampling"].max_new_tokens == 100
    assert main(["generate", "--settings", "showo-512", "--help"]) == 0


# ------------------------------------------------------------------------------------------------- the chat model


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return save_chat(tmp_path_factory.mktemp("chat"))


def test_a_chat_model_judges_and_its_replies_are_kept(call, base, chat, tmp_path, monkeypatch):
    replies = []

    def reply(self, prompts):
        replies.append(list(prompts))
        return ["Same." if "right answer: handbag" in prompt else "I cannot tell" for prompt in prompts]

    monkeypatch.setattr(ChatModel, "replies", reply)
    flags = ["--references", base / "evaluation", "--llm-judge", chat, "--llm-cache", tmp_path / "cache"]
    call(tmp_path / "out", *flags)
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["understanding"]["overall"] == 1.0 and summary["answers_judged_by"] == str(chat)
    assert summary["unsettled"]["own"]["correct"] == 4 and summary["self_reward"] == pytest.approx(1 / 3)
    rows = read_jsonl(tmp_path / "out" / "evaluation" / "results.jsonl")
    assert all(row["rules"] in (True, False) for row in rows)
    asked = [prompt for part in replies for prompt in part]
    assert len(asked) == len(set(asked)) and "The right answer: handbag" in asked[0]
    call(tmp_path / "other", *flags)
    assert len(asked) == sum(len(part) for part in replies), "a question was put twice"


def test_a_judge_that_does_not_judge_is_no_score(call, base, chat, tmp_path, capsys, monkeypatch):
    alone = []
    monkeypatch.setattr("openunirl.evaluation.photos.tell_alone", lambda *told: alone.append(told))
    monkeypatch.setattr(ChatModel, "replies", lambda self, prompts: ["<think> well" for _ in prompts])
    call(tmp_path / "out", "--llm-judge", chat, code=1)
    err = capsys.readouterr().err.splitlines()[-1]
    assert f"6 of 6 replies of the chat model {chat} are no verdict (such as '<think> well')" in err
    assert not (tmp_path / "out" / "evaluation.json").exists() and alone == [(1, "judges the answers")]
    assert (tmp_path / "out" / "scores" / "evaluation.json").exists()
    assert {row["reply"] for row in read_jsonl(tmp_path / "out" / "evaluation" / "results.jsonl")} == {"<think> well"}


def test_answers_that_no_rule_settles_are_no_score(call, base, tmp_path, capsys, monkeypatch):
    """Of the references alone; the answers on its own pictures are sound."""
    from openunirl.evaluation import photos

    real = photos.answer_jobs

    def thing(model, jobs, *args, **more):
        for part in real(model, jobs, *args, **more):
            yield [row | {"answer": "something" if "base" in str(jobs[0].file) else "handbag"} for row in part]

    monkeypatch.setattr(photos, "answer_jobs", thing)
    call(tmp_path / "out", "--references", base / "evaluation", code=1)
    err = capsys.readouterr().err.splitlines()[-1]
    assert "none of the model's 2 answers on reference pictures can be judged" in err and "is 'something'" in err
    assert not (tmp_path / "out" / "evaluation.json").exists()
