"""The command line: one frozen dataclass and one function per subcommand, and COMMANDS, which names them.

In: argv. Out: an exit code - 0 done, 1 the run failed, 2 the command line was wrong, 3 a plan does not fit, 130
interrupted - and, for 1, 2 and 130, one sentence on stderr that names the thing and the fix (OPENUNIRL_TRACEBACK=1: the
traceback, too).
flags.py reads argv. Nothing here imports torch, transformers or accelerate before the command line is read: handlers
are imported inside the functions that call them.
To add a command: its arguments and its function (train, plan and pretrain are here, the others in commands.py), and one
line in COMMANDS.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import math
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from openunirl.commands import answer, check_model, convert, evaluate, generate, report
from openunirl.config import ModelConfig, RunConfig, from_dict
from openunirl.config_pretrain import PretrainConfig
from openunirl.disk import FULL
from openunirl.flags import FLAT, HELP, UsageError, parse, unknown
from openunirl.presets import BUNDLED, PRESETS, TINY
from openunirl.presets_real import PUBLISHED
from openunirl.provenance import ABOUT_A_RUN

DOES_NOT_FIT = 3
"""The exit code of a plan that does not fit; 0: it fits."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand. Example: Command(wants="RUN", summary="Write report.html again", run=report)."""

    wants: str
    """Its positional argument, as usage lines show it."""
    summary: str
    """One line for `openunirl --help`."""
    run: Callable[[list[str]], None]
    """Reads the arguments behind the command's name, and does the work."""
    again: Callable[[list[str]], str] = lambda _: ""
    """How a call that ended early is continued, in words that follow "interrupted; "."""


# ----------------------------------------------------------------------------------------------- the commands


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Trains a PRESET, or what --config FILE holds; flags change single fields. Shown defaults are the preset's."""

    preset: tyro.conf.Positional[str | None] = None
    """Name of a preset."""
    config: str | None = None
    """Start from a run's config.json instead of a preset."""
    resume: bool = False
    """Continue the run in --output-dir from its last checkpoint, with that run's own configuration."""
    run: Annotated[RunConfig, FLAT]


T = TypeVar("T", bound=TrainArguments)


def train(argv: list[str]) -> None:
    """A run directory, or the continuation of one."""
    args = read_run(TrainArguments, argv, "train")
    check_model(args.run.model.weights)
    from openunirl.train import train as handler

    handler(args.run, resume=args.resume, command=shlex.join(["openunirl", "train", *argv]))


def _continue_train(argv: list[str]) -> str:
    """The exact command, once there is a run to continue."""
    folder = Path(read_run(TrainArguments, argv, "train").run.output_dir)
    if not (folder / "config.json").exists():
        return "start it again with the same command"
    return f"continue with: {shlex.join([*_program(), 'train', '--output-dir', str(folder), '--resume'])}"


def _program() -> list[str]:
    """How this program was called, so that the same words call it again."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return ["accelerate", "launch", "-m", "openunirl.cli"]
    called = sys.argv[0]
    if Path(called).name != "openunirl":
        return [sys.executable, "-m", "openunirl.cli"]
    found = shutil.which("openunirl")
    return ["openunirl" if found and Path(found).resolve() == Path(called).resolve() else called]


def read_run(kind: type[T], argv: list[str], name: str) -> T:
    """The arguments of a command about a run. Errors: UsageError."""
    prog, wants = f"openunirl {name}", COMMANDS[name].wants
    # The defaults depend on the preset, which may stand anywhere: a first reading finds it, the second one counts.
    blank = kind(run=RunConfig(model=ModelConfig(weights=""), output_dir=""))
    asked = parse(kind, [a for a in argv if a not in HELP], blank, prog, wants)
    if asked.preset is None and asked.config is None and any(a in HELP for a in argv):
        start = RunConfig(model=ModelConfig(weights="the preset's"))
    else:
        start = starting_point(asked, prog)
    default = kind(preset=asked.preset, run=start)
    return parse(kind, argv, default, prog, wants, f"Presets: {', '.join(PRESETS)}")


def starting_point(asked: TrainArguments, prog: str) -> RunConfig:
    """What the flags change: the file, the resumed run's own configuration, or the preset, in this order."""
    if asked.preset is not None and asked.config is not None:
        raise UsageError(f"give the preset {asked.preset} or --config {asked.config}, not both")
    if asked.preset is not None and asked.preset not in PRESETS:
        if asked.preset.endswith(".json"):
            raise UsageError(f"{asked.preset} is not a preset; to start from a file: --config {asked.preset}")
        raise UsageError(unknown("preset", asked.preset, PRESETS))
    if asked.config is not None:
        return read_config(Path(asked.config))
    start = PRESETS[asked.preset] if asked.preset is not None else None
    folder = asked.run.output_dir or (start.output_dir if start else "")
    if asked.resume and folder and (Path(folder) / "config.json").exists():
        return dataclasses.replace(read_config(Path(folder) / "config.json"), output_dir=folder)
    if start is None:
        raise UsageError(f"{prog} wants a PRESET ({', '.join(PRESETS)}) or --config FILE")
    return start


def read_config(path: Path) -> RunConfig:
    """A run's config.json. Errors: UsageError for a file that is missing, not JSON, or not a RunConfig."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object of RunConfig's fields")
        return from_dict(RunConfig, {k: v for k, v in values.items() if k not in ABOUT_A_RUN})
    except FileNotFoundError:
        raise UsageError(f"there is no configuration file {path}: give a run's config.json, or a preset") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder: give the file, --config {path / 'config.json'}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}:{error.colno}: this is not JSON: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be used as a configuration: {sentence(error)}") from None


@dataclass(frozen=True, kw_only=True)
class PlanArguments(TrainArguments):
    """Says whether training a PRESET fits its GPUs, how long a step takes, and what to change; trains nothing and needs
    neither weights nor network. Takes every flag of `train`. Exit code 3: it does not fit."""

    gpus: int = 1
    """GPUs, one process each."""
    memory: str = "24GB"
    """Memory of each GPU."""
    tflops: float | None = None
    """Peak rate of a GPU's matrix products, in 10^12 operations a second; None is an A100's: 312 in bf16, 19.5 in
    float32 (--train.mixed-precision no)."""
    bandwidth: float = 2.0
    """Peak rate of a GPU's memory, in 10^12 bytes a second (A100: 2.0)."""
    utilization: float = 0.4
    """Share of both rates that is reached."""


def plan(argv: list[str]) -> None:
    """A table on stdout."""
    args = read_run(PlanArguments, argv, "plan")
    check_model(args.run.model.weights)
    if args.gpus < 1:
        raise UsageError(f"--gpus is {args.gpus}, wanted at least 1")
    tflops = args.tflops if args.tflops is not None else 19.5 if args.run.train.mixed_precision == "no" else 312.0
    rates = {
        "tflops": (tflops, math.inf),
        "bandwidth": (args.bandwidth, math.inf),
        "utilization": (args.utilization, 1.0),
    }
    for name, (value, largest) in rates.items():
        if not 0 < value <= largest:
            raise UsageError(f"--{name} is {value}, wanted above 0" + (" and at most 1" if largest == 1 else ""))
    from openunirl.plan import Machine, parse_memory
    from openunirl.plan import plan as handler

    try:
        memory = parse_memory(args.memory)
    except ValueError as error:
        raise UsageError(str(error)) from None
    machine = Machine(
        gpus=args.gpus,
        memory=memory,
        tflops=tflops,
        bandwidth=args.bandwidth,
        utilization=args.utilization,
    )
    if not handler(args.run, machine):
        raise SystemExit(DOES_NOT_FIT)


def pretrain(argv: list[str]) -> None:
    """A folder with a tiny base model; prints it."""
    default = PretrainConfig(name=tyro.MISSING)
    config = parse(PretrainConfig, argv, default, "openunirl pretrain", COMMANDS["pretrain"].wants)
    if config.name not in TINY:
        raise UsageError(unknown("tiny model", config.name, TINY))
    from openunirl.pretrain import pretrain as handler

    print(handler(config, shlex.join(["openunirl", "pretrain", *argv])))


COMMANDS: dict[str, Command] = {
    "train": Command(
        wants="PRESET",
        summary="Train a model on its own drawings and answers",
        run=train,
        again=_continue_train,
    ),
    "plan": Command(wants="PRESET", summary="Say whether a run fits its GPUs, and how long a step takes", run=plan),
    "pretrain": Command(wants="NAME", summary="Train a tiny base model from nothing", run=pretrain),
    "evaluate": Command(
        wants="MODEL",
        summary="Score a model, or pictures: --images DIR",
        run=evaluate,
        again=lambda _: "the same command again",
    ),
    "generate": Command(
        wants="MODEL",
        summary="Draw pictures for prompts",
        run=generate,
        again=lambda _: "the same command draws what is missing",
    ),
    "answer": Command(
        wants="MODEL",
        summary="Answer questions about pictures",
        run=answer,
        again=lambda _: "the same command with --output answers what is missing there",
    ),
    "convert": Command(wants="SRC DST", summary="Write a checkpoint in another layout", run=convert),
    "report": Command(wants="RUN", summary="Write a run's report again, or compare runs and evaluations", run=report),
}


# ------------------------------------------------------------------------------------------------------ main


def run() -> None:
    """The entry point: `main`, then the end of the process.

    One of several ends without taking Python apart: gloo's threads may hold a tensor of the last reduction a moment
    longer, and freeing it by then aborts the process (pytorch/pytorch#179291).
    """
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        dispatch(argv)
        return 0
    except SystemExit as stop:  # tyro, after --help
        return stop.code if isinstance(stop.code, int) else 0
    except UsageError as error:
        return _refuse(str(error), 2)
    except KeyboardInterrupt:
        return _refuse("; ".join(filter(None, ("interrupted", _again(argv)))), 130)
    except BrokenPipeError:  # `... --help | head`; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        then = _again(argv) if error.errno in FULL else ""
        return _refuse(f"{sentence(error)}, then {then}" if then else sentence(error), 1)
    except ValueError as error:
        return _refuse(sentence(error), 1)


def _again(argv: list[str]) -> str:
    try:
        return COMMANDS[argv[0]].again(argv[1:]) if argv and argv[0] in COMMANDS else ""
    except UsageError:  # interrupted before the command line was read
        return ""


def dispatch(argv: list[str]) -> None:
    """Errors: UsageError, and whatever the command raises."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in HELP:
        print(overview())
    elif name == "--version":
        print(f"openunirl {version('openunirl')}")
    elif name in COMMANDS:
        COMMANDS[name].run(rest)
    elif not name:
        raise UsageError(f"which command? One of {', '.join(COMMANDS)}; openunirl --help says what they do")
    elif name.startswith("-"):
        raise UsageError(unknown("flag", name, [*HELP, "--version"]) + "; other flags follow a command")
    else:
        raise UsageError(unknown("command", name, COMMANDS))


def overview() -> str:
    """What `openunirl --help` prints."""
    width = max(len(f"{name} {command.wants}") for name, command in COMMANDS.items())
    lines = [f"  {f'{name} {command.wants}':{width}}  {command.summary}" for name, command in COMMANDS.items()]
    about = "openunirl COMMAND --help lists its flags; openunirl --version prints the version."
    names = (
        f"Presets: {', '.join(PRESETS)}",
        f"Models: bundled {', '.join(BUNDLED)}; published {', '.join(PUBLISHED)}",
    )
    return "\n".join(("usage: openunirl COMMAND [flags]", "", *lines, "", about, "", *names))


def sentence(error: Exception) -> str:
    """An error in one line; an OSError names its file, and where it has none, says at least what to do."""
    if isinstance(error, OSError) and error.errno in FULL and error.filename is None and error.strerror:
        return f"a file cannot be written: {error.strerror}; free some space"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _refuse(told: str, code: int) -> int:
    if os.environ.get("OPENUNIRL_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"openunirl: {told}", file=sys.stderr)
    return code


if __name__ == "__main__":
    run()
