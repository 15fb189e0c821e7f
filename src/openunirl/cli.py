"""The command line: one frozen dataclass and one function per subcommand, and COMMANDS, which names them.

In: argv. Out: an exit code - 0 done, 1 the run failed, 2 the command line was wrong, 130 interrupted - and, for
anything but 0, one sentence on stderr that names the thing and the fix (OPENUNIRL_TRACEBACK=1: the traceback, too).
tyro reads the flags and writes --help; the words of every refusal are ours. Nothing here imports torch, transformers
or accelerate before the command line is read: handlers are imported inside the functions that call them.
To add a command: its arguments, its function, one line in COMMANDS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import os
import shlex
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from openunirl.config import EvalConfig, ModelConfig, PretrainConfig, RunConfig, from_dict
from openunirl.presets import BUNDLED, PRESETS, bundled

HELP = ("-h", "--help")
ABOUT_A_RUN = ("command", "commit", "versions")
"""What a run's config.json holds beside its RunConfig."""
FLAT = tyro.conf.arg(name="")
"""Marks a nested configuration whose flags carry no prefix of their own: --seed, not --run.seed."""

T = TypeVar("T")


class UsageError(Exception):
    """The command line cannot be carried out; the message is the sentence that the user reads."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand. Example: Command(wants="RUN", summary="Write report.html again", run=report)."""

    wants: str
    """Its positional argument, as usage lines show it."""
    summary: str
    """One line for `openunirl --help`."""
    run: Callable[[list[str]], None]
    """Reads the arguments behind the command's name, and does the work."""


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


def train(argv: list[str]) -> None:
    """A run directory, or the continuation of one."""
    prog, wants = "openunirl train", COMMANDS["train"].wants
    # The defaults depend on the preset, which may stand anywhere: a first reading finds it, the second one counts.
    blank = TrainArguments(run=RunConfig(model=ModelConfig(weights=""), output_dir=""))
    asked = parse(TrainArguments, [a for a in argv if a not in HELP], blank, prog, wants)
    if asked.preset is None and asked.config is None and any(a in HELP for a in argv):
        start = RunConfig(model=ModelConfig(weights="the preset's"))
    else:
        start = starting_point(asked)
    default = TrainArguments(preset=asked.preset, run=start)
    args = parse(TrainArguments, argv, default, prog, wants, f"Presets: {', '.join(PRESETS)}")
    check_model(args.run.model.weights)
    from openunirl.train import train as handler

    handler(args.run, resume=args.resume, command=shlex.join(["openunirl", "train", *argv]))


def starting_point(asked: TrainArguments) -> RunConfig:
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
        raise UsageError(f"openunirl train wants a PRESET ({', '.join(PRESETS)}) or --config FILE")
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


def pretrain(argv: list[str]) -> None:
    """A folder with a tiny base model; prints it."""
    default = PretrainConfig(name=tyro.MISSING)
    config = parse(PretrainConfig, argv, default, "openunirl pretrain", COMMANDS["pretrain"].wants)
    if config.name not in BUNDLED:
        raise UsageError(unknown("tiny model", config.name, BUNDLED))
    from openunirl.pretrain import pretrain as handler

    print(handler(config))


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Evaluates a model on both of its tasks. The model: a folder, a hub id, or the name of a bundled model."""

    model: ModelConfig
    world: Literal["shapes"] = "shapes"
    """Where prompts, reference images and the detector come from."""
    seed: int = 0
    """Every draw is keyed by it."""
    output_dir: str = "runs/evaluation"
    """Where the tables and the judged images are written."""
    eval: Annotated[EvalConfig, FLAT]


def evaluate(argv: list[str]) -> None:
    """Tables and judged images in --output-dir."""
    default = EvaluateArguments(model=ModelConfig(weights=tyro.MISSING), eval=EvalConfig())
    args = parse(EvaluateArguments, argv, default, "openunirl evaluate", COMMANDS["evaluate"].wants)
    check_model(args.model.weights)
    from openunirl.evaluation.run_command import evaluate_command

    evaluate_command(args.model, args.eval, world=args.world, seed=args.seed, output_dir=Path(args.output_dir))


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Writes report.html again, from what lies in a run directory."""

    run: str
    """Run directory."""


def report(argv: list[str]) -> None:
    """The run's report.html; prints its path."""
    default = ReportArguments(run=tyro.MISSING)
    args = parse(ReportArguments, argv, default, "openunirl report", COMMANDS["report"].wants)
    if not Path(args.run).is_dir():
        raise UsageError(f"there is no run directory {args.run}: give the --output-dir of a training run")
    from openunirl.report import write_report

    print(write_report(Path(args.run)))


COMMANDS: dict[str, Command] = {
    "train": Command(wants="PRESET", summary="Train a model on its own drawings and answers", run=train),
    "pretrain": Command(wants="NAME", summary="Train a tiny base model from nothing", run=pretrain),
    "evaluate": Command(wants="MODEL", summary="Score a model's drawing and understanding", run=evaluate),
    "report": Command(wants="RUN", summary="Write the report of a run again", run=report),
}


def check_model(weights: str) -> None:
    """Errors: UsageError for what is no bundled name, no local path, and cannot be a hub id."""
    if bundled(weights) is None and "/" not in weights and not Path(weights).exists():
        told = unknown("model", weights, BUNDLED)
        raise UsageError(f"{told}; otherwise give a folder, a file, or a hub id (owner/name)")


# --------------------------------------------------------------------------------------------- reading argv


def parse(kind: type[T], argv: Sequence[str], default: T, prog: str, wants: str, note: str = "") -> T:
    """The dataclass `kind` from argv, by tyro; --help prints and exits. Errors: UsageError."""
    known = flags(kind, default)
    try:
        args, left = _tyro(kind, argv, default, prog, note)
    except SystemExit as stop:
        if not stop.code:
            raise
        told = _bad_value(kind, argv, default, known)
        raise UsageError(told or f"{prog} wants a {wants}: {prog} {wants} [flags]") from None
    if left:
        raise UsageError(_unexpected(left, argv, known, f"{prog} {wants}"))
    return args


def _tyro(kind: type[T], argv: Sequence[str], default: T, prog: str, note: str = "") -> tuple[T, list[str]]:
    """tyro's result and the tokens it knows nothing of; what it says of errors is dropped."""
    markers = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    description = f"{kind.__doc__} {note}".strip()
    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            kind, args=argv, default=default, prog=prog, description=description, config=markers,
            return_unknown_args=True,
        )  # fmt: skip


def flags(kind: type, default: Any, prefix: str = "") -> dict[str, Any]:
    """Every flag without its dashes -> its type; positional fields are left out.

    Example: {"seed": int, "loss.beta": float, "reward.shuffle": bool, "reward.no-shuffle": bool}
    """
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        extras = getattr(hint, "__metadata__", ())
        hint = hint.__origin__ if extras else hint
        value, flag = getattr(default, name), name.replace("_", "-")
        if value is tyro.MISSING or tyro.conf.Positional in extras:
            continue
        if dataclasses.is_dataclass(hint):
            found |= flags(typing.cast(type, hint), value, prefix if FLAT in extras else f"{prefix}{flag}.")
            continue
        found[prefix + flag] = hint
        if hint is bool:
            found[f"{prefix}no-{flag}"] = hint
    return found


def wanted(hint: Any) -> str:
    """A type in words. Example: wanted(float | None) == "a number or None"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(wanted(arg) for arg in args)
    if origin is tuple:
        return f"any number of values, each {wanted(args[0])}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "no value", types.NoneType: "None"}.get(
        hint, str(hint)
    )


def _bad_value(kind: type, argv: Sequence[str], default: Any, known: dict[str, Any]) -> str | None:
    """Which flag tyro refuses: each one is tried alone, behind a stand-in for the positional argument."""
    groups: list[list[str]] = []
    for token in argv:
        if _is_flag(token):
            groups.append(token.split("=", 1))
        elif groups:
            groups[-1].append(token)
    for flag, *values in groups:
        hint = known.get(_name(flag))
        if hint is None:
            continue
        try:
            _tyro(kind, ["stand-in", flag, *values], default, "")
        except SystemExit:
            if not values:
                return f"{flag} wants {wanted(hint)}, and nothing follows it"
            given = " ".join(values) if typing.get_origin(hint) is tuple else values[0]
            return f"{flag} wants {wanted(hint)}, not {given!r}"
    return None


def _unexpected(left: Sequence[str], argv: Sequence[str], known: dict[str, Any], usage: str) -> str:
    """The sentence for tokens that belong to nothing; a flag among them is the likely cause of the rest."""
    flag = next((token for token in left if _is_flag(token)), None)
    if flag is not None:
        name = _name(flag)
        near = nearest(name, known)
        told = f"did you mean {' or '.join(f'--{n}' for n in near)}?" if near else "--help lists all flags"
        return f"unknown flag {flag.partition('=')[0]}; {told}"
    token = str(left[0])
    attached = next((a for a in argv if a.endswith(f"={token}")), None)
    before = _name(attached or argv[len(argv) - 2 - argv[::-1].index(token)])
    if known.get(before) is bool:
        return f"--{before} takes no value, so drop {token!r}; --help shows the flag for the opposite"
    return f"did not expect {token!r}; usage: {usage} [flags]"


def _is_flag(token: str) -> bool:
    return token.startswith("-") and token.lstrip("-")[:1].isalpha() and token.lower() not in ("-inf", "-nan")


def _name(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-").replace("_", "-")


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The valid names most like `name`, best first; those with the same last part count as near (--lr: optim.lr)."""
    known, last = list(known), name.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    same.sort(key=lambda k: -difflib.SequenceMatcher(None, name, k).ratio())
    return (same or difflib.get_close_matches(name, known, n=1))[:most]


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is none of `known`, with the nearest of them."""
    known = list(known)
    near = nearest(name, known)
    told = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown {what} {name!r}; {told}Known: {', '.join(known)}"


# ------------------------------------------------------------------------------------------------------ main


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
        resume = "; the same command with --resume continues from the last checkpoint" if argv[:1] == ["train"] else ""
        return _refuse(f"interrupted{resume}", 130)
    except BrokenPipeError:  # `... --help | head`; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        return _refuse(sentence(error), 1)


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
    names = (f"Presets: {', '.join(PRESETS)}", f"Bundled models: {', '.join(BUNDLED)}")
    return "\n".join(("usage: openunirl COMMAND [flags]", "", *lines, "", about, "", *names))


def sentence(error: Exception) -> str:
    """An error in one line; an OSError names its file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _refuse(told: str, code: int) -> int:
    if os.environ.get("OPENUNIRL_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"openunirl: {told}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
