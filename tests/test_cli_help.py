"""What the command line prints of itself, how fast, and what a real process answers."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from openunirl import cli
from openunirl.cli import COMMANDS, main
from openunirl.flags import flags, wanted
from openunirl.presets import PRESETS

PRESET = "tiny-showo-grpo"
HEAVY = ("torch", "transformers", "accelerate")


# ----------------------------------------------------------------------------------------------------- help


def leaves(config, prefix=""):
    """(flag, value) of every field, nested ones included."""
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{flag}.")
        else:
            yield flag, value


def test_help_shows_every_field_with_the_preset_s_default(capsys):
    assert main(["train", PRESET, "--help"]) == 0
    text = capsys.readouterr().out
    flat = re.sub(r"[\s│]+", " ", text)
    for flag, value in leaves(PRESETS[PRESET]):
        told = value if not isinstance(value, tuple) else " ".join(value)
        assert re.search(rf" --{re.escape(flag)}[ ,][^(]*(\([^d][^(]*)*\(default: {re.escape(str(told))}\)", flat), flag
    for group in ("rollout.sampling options", "loss options", "eval options"):
        assert group in text
    assert "Weight of the KL (k3 estimator) to the frozen base." in flat


def test_help_without_a_preset_names_the_presets(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert PRESET in text and "--loss.beta" in text and "--resume" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    assert main([command, "--help"]) == 0
    assert f"usage: openunirl {command}" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert re.search(rf"^  {command} {COMMANDS[command].wants} +\S", capsys.readouterr().out, re.MULTILINE)


def test_the_flags_that_are_suggested_exist(capsys):
    default = cli.TrainArguments(run=PRESETS[PRESET])
    main(["train", PRESET, "--help"])
    shown = set(re.findall(r"--([a-z][\w.-]*)", capsys.readouterr().out)) - {"help"}
    assert set(flags(cli.TrainArguments, default)) == shown


def test_every_flag_s_type_has_words():
    for hint in flags(cli.TrainArguments, cli.TrainArguments(run=PRESETS[PRESET])).values():
        assert re.fullmatch(r"[\w ,]+", wanted(hint)), hint


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"openunirl \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# --------------------------------------------------------------------------------------------- subprocesses


def run(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, check=False)


def test_nothing_heavy_is_imported_before_the_command_line_is_read():
    lines = [
        ["--help"],
        ["train", PRESET, "--help"],
        ["train", PRESET, "--loss.bta", "1"],
        ["train", PRESET, "--seed", "x"],
    ]
    code = f"import sys; from openunirl.cli import main; codes = [main(a) for a in {lines!r}]; "
    code += f"print(codes, sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    done = run("-c", code)
    assert done.stderr.endswith("[0, 0, 2, 2] []\n"), done.stderr


def test_help_loads_nothing_heavy():
    code = "import sys; from openunirl.cli import main; main(['--help']); print(*sys.modules)"
    done = run("-c", code)
    assert done.returncode == 0 and "train PRESET" in done.stdout and done.stderr == ""
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "transformers", "accelerate", "tensorboard"}


def test_exit_code_and_sentence_of_the_module():
    done = run("-m", "openunirl.cli", "train", PRESET, "--loss.bta", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "openunirl: unknown flag --loss.bta; did you mean --loss.beta?\n"


def test_the_installed_command():
    command = Path(sys.executable).parent / "openunirl"
    done = subprocess.run([command, "trian"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "did you mean train?" in done.stderr


def test_help_into_a_pipe_that_closes():
    command = f"{sys.executable} -m openunirl.cli train {PRESET} --help | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
