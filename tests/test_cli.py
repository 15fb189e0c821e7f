"""The command line: what reaches the handlers, what is refused, with which words and exit codes.

Handlers are replaced by stand-ins that note how they are called; the few subprocess tests check what is imported.
"""

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest

from openunirl.cli import main
from openunirl.config import EvalConfig, ModelConfig, to_dict
from openunirl.config_pretrain import PretrainConfig
from openunirl.presets import PRESETS

PRESET, ESTIMATORS = "tiny-showo-grpo", "trajectory, remask, training_loss, full_mask"
HEAVY = ("torch", "transformers", "accelerate")


@pytest.fixture
def handlers(monkeypatch):
    """Stand-ins for the modules that do the work: name -> how it was called. `fail` is raised where it is set."""
    calls = types.SimpleNamespace(fail=None)

    def stand_in(module, name, result):
        def handler(*args, **kwargs):
            setattr(calls, name, (args, kwargs))
            if calls.fail:
                raise calls.fail
            return result

        fake = types.ModuleType(module)
        setattr(fake, name, handler)
        monkeypatch.setitem(sys.modules, module, fake)

    stand_in("openunirl.train", "train", Path("runs/a"))
    stand_in("openunirl.pretrain", "pretrain", Path("runs/made"))
    stand_in("openunirl.report", "write_report", Path("runs/a/report.html"))
    stand_in("openunirl.evaluation.run_command", "evaluate_command", None)
    return calls


def refused(capsys, argv, code=2):
    """The one sentence on stderr."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("openunirl: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and "│" not in err and "\x1b" not in err
    return err


def written(folder, config, **more):
    """A run's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config) | more))
    return folder / "config.json"


# -------------------------------------------------------------------------------------------------- train


def test_a_preset_as_it_is(handlers):
    assert main(["train", PRESET]) == 0
    (config,), rest = handlers.train
    assert config == PRESETS[PRESET]
    assert rest == {"resume": False, "command": f"openunirl train {PRESET}"}


def test_flags_change_single_fields(handlers):
    flags = "--seed 1 --output-dir runs/a --train.max-steps 50 --rollout.sampling.num-timesteps 4 --loss.beta=0.5 "
    flags += "--reward.sources self my.module:fn --reward.weights 1 -0.5 "
    flags += "--reward.shuffle --loss.no-logprob-guidance --loss.epsilon_high 0.3 --train.report-to wandb trackio"
    assert main(["train", PRESET, *flags.split()]) == 0
    config = handlers.train[0][0]
    base = PRESETS[PRESET]
    assert config == dataclasses.replace(
        base,
        seed=1,
        output_dir="runs/a",
        train=dataclasses.replace(base.train, max_steps=50, report_to=("wandb", "trackio")),
        rollout=dataclasses.replace(base.rollout, sampling=dataclasses.replace(base.rollout.sampling, num_timesteps=4)),
        loss=dataclasses.replace(base.loss, beta=0.5, logprob_guidance=False, epsilon_high=0.3),
        reward=dataclasses.replace(base.reward, sources=("self", "my.module:fn"), weights=(1.0, -0.5), shuffle=True),
    )


def test_the_preset_may_stand_behind_flags(handlers):
    assert main(["train", "--output-dir", "my runs", PRESET]) == 0
    assert handlers.train[0][0] == dataclasses.replace(PRESETS[PRESET], output_dir="my runs")
    assert handlers.train[1]["command"] == f"openunirl train --output-dir 'my runs' {PRESET}"  # fit for a shell


def test_config_file(handlers, tmp_path):
    config = dataclasses.replace(PRESETS[PRESET], seed=9, output_dir="runs/old")
    path = written(tmp_path, config, command="openunirl ...", commit=None, versions={"torch": "2"})
    assert main(["train", "--config", str(path), "--loss.beta", "0.7"]) == 0
    assert handlers.train[0][0] == dataclasses.replace(config, loss=dataclasses.replace(config.loss, beta=0.7))


def test_resume_keeps_the_run_s_own_configuration(handlers, tmp_path):
    config = dataclasses.replace(PRESETS[PRESET], seed=9, output_dir="where/it/was/before")
    written(tmp_path, config, command="c", commit="d", versions={})
    flags = ["--output-dir", str(tmp_path), "--resume", "--train.max-steps", "7"]
    expected = dataclasses.replace(
        config, output_dir=str(tmp_path), train=dataclasses.replace(config.train, max_steps=7)
    )
    for argv in ([PRESET, *flags], flags):
        assert main(["train", *argv]) == 0
        assert handlers.train[0][0] == expected
        assert handlers.train[1]["resume"] is True


def test_resume_in_the_preset_s_own_directory(handlers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = PRESETS[PRESET].output_dir
    written(Path(folder), dataclasses.replace(PRESETS[PRESET], seed=9, output_dir="elsewhere"))
    assert main(["train", PRESET, "--resume"]) == 0
    assert handlers.train[0][0] == dataclasses.replace(PRESETS[PRESET], seed=9, output_dir=folder)


def test_without_resume_a_run_directory_is_not_read(handlers, tmp_path):
    written(tmp_path, dataclasses.replace(PRESETS[PRESET], seed=9))
    assert main(["train", PRESET, "--output-dir", str(tmp_path)]) == 0
    assert handlers.train[0][0].seed == PRESETS[PRESET].seed


# ------------------------------------------------------------------------------------------ other commands


def test_pretrain(handlers, capsys):
    assert main(["pretrain", "tiny-showo", "--steps", "5", "--image-tokenizer", "runs/b", "--seed", "2"]) == 0
    (config, command), _ = handlers.pretrain
    assert command == "openunirl pretrain tiny-showo --steps 5 --image-tokenizer runs/b --seed 2"
    assert config == PretrainConfig(name="tiny-showo", steps=5, image_tokenizer="runs/b", seed=2)
    assert capsys.readouterr().out == "runs/made\n"


def test_evaluate(handlers, tmp_path):
    flags = "--split validation --num-prompts 6 --sampling.guidance-scale 2 --seed 4 --world shapes"
    flags += f" --output-dir {tmp_path} --model.attn-implementation eager"
    assert main(["evaluate", "tiny-showo", *flags.split()]) == 0
    (model, config), rest = handlers.evaluate_command
    assert model == ModelConfig(weights="tiny-showo", attn_implementation="eager")
    base = EvalConfig()
    assert config == dataclasses.replace(
        base, split="validation", num_prompts=6, sampling=dataclasses.replace(base.sampling, guidance_scale=2.0)
    )
    command = f"openunirl evaluate tiny-showo {flags}"
    assert rest == {"world": "shapes", "seed": 4, "output_dir": tmp_path, "dtype": "float32", "command": command}


@pytest.mark.parametrize("weights", ["someone/model", "./made", "/some/where"])
def test_evaluate_takes_paths_and_hub_ids(handlers, weights):
    assert main(["evaluate", weights, "--world", "shapes"]) == 0
    assert handlers.evaluate_command[0][0].weights == weights


def test_report(handlers, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 0
    assert handlers.write_report == ((tmp_path,), {})
    assert capsys.readouterr().out == "runs/a/report.html\n"


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["which command", "train", "report"]),
        (["trian"], ["unknown command 'trian'", "did you mean train?"]),
        (["--verison"], ["unknown flag '--verison'", "did you mean --version?"]),
        (["train"], ["PRESET", PRESET, "--config"]),
        (["train", "tiny-shwo-grpo"], ["unknown preset 'tiny-shwo-grpo'", f"did you mean {PRESET}?"]),
        (["train", "runs/a/config.json"], ["runs/a/config.json is not a preset", "--config runs/a/config.json"]),
        (["train", PRESET, "--config", "x.json"], [PRESET, "--config x.json", "not both"]),
        (["train", PRESET, "again"], ["'again'", "usage: openunirl train PRESET"]),
        (["train", PRESET, "--loss.bta", "0.02"], ["unknown flag --loss.bta;", "did you mean --loss.beta?"]),
        (["train", PRESET, "--loss.bta=0.02"], ["unknown flag --loss.bta;", "did you mean --loss.beta?"]),
        (["train", "--sead", "1", PRESET], ["unknown flag --sead;", "did you mean --seed?"]),
        (["train", PRESET, "--lr", "1"], ["unknown flag --lr;", "did you mean --optim.lr?"]),
        (["train", PRESET, "--max_steps", "1"], ["unknown flag --max_steps;", "--train.max-steps"]),
        (["train", PRESET, "-seed", "1"], ["unknown flag -seed;", "did you mean --seed?"]),
        (["train", PRESET, "--zzz"], ["unknown flag --zzz", "--help"]),
        (
            ["train", PRESET, "--rollout.num-timesteps", "1"],
            ["--rollout.sampling.num-timesteps or --eval.sampling.num-timesteps"],
        ),
        (["train", PRESET, "--seed", "one"], ["--seed wants a whole number, not 'one'"]),
        (["train", PRESET, "--seed=1.5"], ["--seed wants a whole number, not '1.5'"]),
        (["train", "--loss.beta", "much", PRESET], ["--loss.beta wants a number, not 'much'"]),
        (["train", PRESET, "--seed", "1", "--loss.beta"], ["--loss.beta wants a number, and nothing follows"]),
        (["train", PRESET, "--seed", "--resume"], ["--seed wants a whole number, and nothing follows"]),
        (["train", PRESET, "--loss.epsilon-high", "up"], ["--loss.epsilon-high wants a number or None, not 'up'"]),
        (["train", PRESET, "--loss.estimator", "x"], ["--loss.estimator", ESTIMATORS, "'x'"]),
        (["train", PRESET, "--train.report-to", "wandb", "x"], ["--train.report-to", "tensorboard", "'wandb x'"]),
        (["train", PRESET, "--reward.source", "self"], ["unknown flag --reward.source;", "--reward.sources?"]),
        (["train", PRESET, "--reward.weights", "1", "x"], ["--reward.weights", "each a number", "'1 x'"]),
        (["train", PRESET, "--reward.shuffle", "True"], ["--reward.shuffle takes no value", "'True'"]),
        (["train", PRESET, "--reward.shuffle=no"], ["--reward.shuffle takes no value", "'no'"]),
        (["train", PRESET, "--model.weights", "tiny-shwo"], ["'tiny-shwo'", "did you mean tiny-showo?", "owner/name"]),
        (["pretrain"], ["openunirl pretrain wants a NAME"]),
        (["pretrain", "tiny-shoo"], ["'tiny-shoo'", "tiny-showo"]),
        (["pretrain", "tiny-showo", "--step", "1"], ["unknown flag --step;", "did you mean --steps?"]),
        (["evaluate"], ["openunirl evaluate wants a MODEL"]),
        (["evaluate", "tiny-shwo"], ["'tiny-shwo'", "did you mean tiny-showo?", "owner/name"]),
        (
            ["evaluate", "tiny-showo", "--seed", "1", "--split", "x"],
            ["--split wants one of validation, heldout, not 'x'"],
        ),
        (
            ["evaluate", "tiny-showo", "--eval.split", "heldout"],
            ["unknown flag --eval.split;", "did you mean --split?"],
        ),
        (["report"], ["openunirl report wants a RUN"]),
        (["report", "no/such/run"], ["no/such/run", "--output-dir"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else None,
)
def test_bad_command_lines(handlers, capsys, argv, words):
    err = refused(capsys, argv)
    for word in words:
        assert word in err
    assert vars(handlers).keys() == {"fail"}, "a handler ran"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"seed": 1,}', [":1:", "not JSON"]),
        ("", ["not JSON"]),
        ("[1]", ["list"]),
        ('{"model": {"weights": "x"}, "lss": {}}', ["unknown field 'lss'", "loss"]),
        ('{"model": {"weights": "x"}, "loss": {"bta": 1}}', ["config.loss", "unknown field 'bta'", "beta"]),
        ('{"model": {"weights": "x"}, "seed": "1"}', ["config.seed is '1'", "int"]),
        ('{"seed": 1}', ["'model' is missing"]),
        (b"\xff\xfe", ["utf-8"]),
    ],
)
def test_bad_config_files(handlers, capsys, tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    err = refused(capsys, ["train", "--config", str(path)])
    for word in (str(path), *words):
        assert word in err


def test_missing_config_files(handlers, capsys, tmp_path):
    assert str(tmp_path / "no.json") in refused(capsys, ["train", "--config", str(tmp_path / "no.json")])
    assert str(tmp_path / "config.json") in refused(capsys, ["train", "--config", str(tmp_path)])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            ValueError("the run directory runs/a exists:\n  choose another"),
            1,
            "the run directory runs/a exists: choose",
        ),
        (FileNotFoundError(2, "No such file or directory", "runs/a/x.json"), 1, "runs/a/x.json: No such file"),
        (OSError("cannot save runs/a: the disk is full"), 1, "cannot save runs/a: the disk is full"),
        (ValueError(), 1, "ValueError"),
        (KeyboardInterrupt(), 130, "interrupted; start it again with the same command"),
    ],
    ids=lambda value: repr(value) if isinstance(value, BaseException) else "",
)
def test_failures_of_a_run(handlers, capsys, monkeypatch, error, code, words):
    monkeypatch.delenv("OPENUNIRL_TRACEBACK", raising=False)
    handlers.fail = error
    assert words in refused(capsys, ["train", PRESET], code)


def test_an_interrupted_report(handlers, capsys, tmp_path):
    handlers.fail = KeyboardInterrupt()
    assert "--resume" not in refused(capsys, ["report", str(tmp_path)], 130)


def test_a_bug_keeps_its_traceback(handlers):
    handlers.fail = TypeError("a bug")
    with pytest.raises(TypeError):
        main(["train", PRESET])


def test_traceback_on_request(handlers, capsys, monkeypatch):
    monkeypatch.setenv("OPENUNIRL_TRACEBACK", "1")
    handlers.fail = ValueError("too bad")
    assert main(["train", PRESET]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("openunirl: too bad\n")
