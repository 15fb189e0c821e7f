"""The command line: one frozen dataclass and one function per subcommand, and COMMANDS, which names them.

In: argv. Out: an exit code - 0 done, 1 the run failed, 2 the command line was wrong, 130 interrupted - and, for
anything but 0, one sentence on stderr that names the thing and the fix (OPENUNIRL_TRACEBACK=1: the traceback, too).
flags.py reads argv. Nothing here imports torch, transformers or accelerate before the command line is read: handlers
are imported inside the functions that call them.
To add a command: its arguments, its function, one line in COMMANDS.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tyro

from openunirl.config import EvalConfig, ModelConfig, PretrainConfig, RunConfig, from_dict
from openunirl.evaluation.images_command import evaluate_images
from openunirl.flags import FLAT, UsageError, parse, unknown
from openunirl.presets import BUNDLED, PRESETS, TINY, bundled
from openunirl.types import AnswerSampling, ImageSampling

HELP = ("-h", "--help")
ABOUT_A_RUN = ("command", "commit", "versions")
"""What a run's config.json holds beside its RunConfig."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand. Example: Command(wants="RUN", summary="Write report.html again", run=report)."""

    wants: str
    """Its positional argument, as usage lines show it."""
    summary: str
    """One line for `openunirl --help`."""
    run: Callable[[list[str]], None]
    """Reads the arguments behind the command's name, and does the work."""
    again: str = ""
    """How an interrupted call is continued, in words."""


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
    if config.name not in TINY:
        raise UsageError(unknown("tiny model", config.name, TINY))
    from openunirl.pretrain import pretrain as handler

    print(handler(config))


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Evaluates a model (a folder, hub id or bundled name) on both of its tasks. For pictures: --images DIR --help."""

    model: ModelConfig
    world: Literal["shapes"] = "shapes"
    """Where prompts, reference images and the detector come from."""
    seed: int = 0
    """Every draw is keyed by it."""
    output_dir: str = "runs/evaluation"
    """Where the tables and the judged images are written."""
    eval: Annotated[EvalConfig, FLAT]


def evaluate(argv: list[str]) -> None:
    """Tables and judged images in --output-dir; with --images, the score of pictures that are there."""
    if evaluate_images(argv):
        return
    default = EvaluateArguments(model=ModelConfig(weights=tyro.MISSING), eval=EvalConfig())
    args = parse(EvaluateArguments, argv, default, "openunirl evaluate", COMMANDS["evaluate"].wants)
    check_model(args.model.weights)
    from openunirl.evaluation.run_command import evaluate_command

    evaluate_command(args.model, args.eval, world=args.world, seed=args.seed, output_dir=Path(args.output_dir))


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Draws pictures for prompts, into a folder in GenEval's layout. The same call again draws only what is missing."""

    model: ModelConfig
    prompts: tuple[str, ...] = ()
    """Prompts, each a text."""
    prompt_file: str | None = None
    """Prompts from a file instead: FILE.jsonl (objects with "prompt", such as GenEval's), or FILE.txt, one a line."""
    output_dir: str | None = None
    """Where the pictures are written: 00000/samples/0000.png, 00000/metadata.jsonl, and so on. It must be given."""
    num_images: int = 4
    """Pictures per prompt (GenEval: 4)."""
    seed: int = 0
    """Every draw is keyed by it, the prompt's number and the picture's number."""
    batch_size: int = 16
    """Pictures drawn at once; changes memory and speed, not the result."""
    sampling: ImageSampling = field(default_factory=ImageSampling)


def generate(argv: list[str]) -> None:
    """Pictures in --output-dir; prints the folder."""
    prog, default = "openunirl generate", GenerateArguments(model=ModelConfig(weights=tyro.MISSING))
    args = parse(GenerateArguments, argv, default, prog, COMMANDS["generate"].wants)
    check_model(args.model.weights)
    if bool(args.prompts) == (args.prompt_file is not None):
        told = "not both" if args.prompts else "and there is neither"
        raise UsageError(f'{prog} wants --prompts "..." or --prompt-file FILE, {told}')
    if not args.output_dir:
        raise UsageError(f"{prog} wants --output-dir DIR, where the pictures are written")
    from openunirl.generate import generate as handler

    folder = handler(
        args.model,
        args.prompts if args.prompt_file is None else Path(args.prompt_file),
        output_dir=Path(args.output_dir),
        num_images=args.num_images,
        seed=args.seed,
        batch_size=args.batch_size,
        sampling=args.sampling,
        command=shlex.join(["openunirl", "generate", *argv]),
    )
    print(folder)


@dataclass(frozen=True, kw_only=True)
class AnswerArguments:
    """Answers questions about pictures: JSON lines {"image", "question", "answer"} in --output or on the terminal."""

    model: ModelConfig
    images: tuple[str, ...] = ()
    """Pictures, and folders of pictures: flat ones, or in GenEval's layout as `generate` and `evaluate` write it."""
    questions: tuple[str, ...] = ()
    """Questions, each asked on every picture; without them, each GenEval-layout prompt's own is asked."""
    question_file: str | None = None
    """Pairs from FILE.jsonl instead: objects with "image" (its path relative to the file) and "question"."""
    output: str | None = None
    """File for the rows. The same call again adds only what is missing."""
    temperature: float = AnswerSampling.temperature
    """0 takes the most likely token each time; above 0, answers are drawn."""
    max_new_tokens: int = AnswerSampling.max_new_tokens
    """Longest answer in tokens."""
    seed: int = 0
    """Every draw is keyed by it and the row's number."""
    batch_size: int = 16
    """Questions at once."""


def answer(argv: list[str]) -> None:
    """Rows in --output or on stdout."""
    prog, default = "openunirl answer", AnswerArguments(model=ModelConfig(weights=tyro.MISSING))
    args = parse(AnswerArguments, argv, default, prog, COMMANDS["answer"].wants)
    check_model(args.model.weights)
    if bool(args.images) == (args.question_file is not None):
        told = "not both" if args.images else "and there is neither"
        raise UsageError(f"{prog} wants --images FILE... (or a folder) or --question-file FILE, {told}")
    if args.questions and args.question_file is not None:
        raise UsageError(f"{prog}: --question-file {args.question_file} holds the questions; drop --questions")
    from openunirl.answer import answer as handler

    handler(
        args.model,
        args.images if args.question_file is None else Path(args.question_file),
        questions=args.questions,
        output=Path(args.output) if args.output else None,
        sampling=AnswerSampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature),
        seed=args.seed,
        batch_size=args.batch_size,
        command=shlex.join(["openunirl", "answer", *argv]),
    )


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """Writes a checkpoint in another layout, as safetensors, weights bit for bit: from its authors' names to
    transformers' (hf), or back (official)."""

    source: str
    """Folder, file, hub id or bundled model."""
    destination: str
    """Folder to write; it must not exist, or be empty."""
    layout: Literal["official", "hf"] | None = None
    """The layout wanted. It must be given."""
    base_model: str | None = None
    """Hub id that the model card names; None: the source's own."""
    tokenizer: str | None = None
    """Folder or hub id of the text tokenizer, for a source that comes without one."""


def convert(argv: list[str]) -> None:
    """A folder with the converted checkpoint; prints it."""
    prog, default = "openunirl convert", ConvertArguments(source=tyro.MISSING, destination=tyro.MISSING)
    args = parse(ConvertArguments, argv, default, prog, COMMANDS["convert"].wants)
    if args.layout is None:
        raise UsageError(f"{prog} wants --layout official or --layout hf")
    check_model(args.source)
    from openunirl.models.convert import convert as handler

    folder = handler(
        args.source, Path(args.destination), args.layout, base_model=args.base_model, tokenizer=args.tokenizer
    )
    print(folder)


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
    "train": Command(
        wants="PRESET",
        summary="Train a model on its own drawings and answers",
        run=train,
        again="the same command with --resume continues from the last checkpoint",
    ),
    "pretrain": Command(wants="NAME", summary="Train a tiny base model from nothing", run=pretrain),
    "evaluate": Command(
        wants="MODEL", summary="Score a model, or pictures: --images DIR", run=evaluate, again="--images: repeat it"
    ),
    "generate": Command(
        wants="MODEL",
        summary="Draw pictures for prompts",
        run=generate,
        again="the same command draws what is missing",
    ),
    "answer": Command(
        wants="MODEL",
        summary="Answer questions about pictures",
        run=answer,
        again="the same command with --output answers what is missing there",
    ),
    "convert": Command(wants="SRC DST", summary="Write a checkpoint in another layout", run=convert),
    "report": Command(wants="RUN", summary="Write the report of a run again", run=report),
}


def check_model(weights: str) -> None:
    """Errors: UsageError for what is no bundled name, no local path, and cannot be a hub id."""
    if bundled(weights) is None and "/" not in weights and not Path(weights).exists():
        told = unknown("model", weights, BUNDLED)
        raise UsageError(f"{told}; otherwise give a folder, a file, or a hub id (owner/name)")


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
        again = COMMANDS[argv[0]].again if argv and argv[0] in COMMANDS else ""
        return _refuse(f"interrupted; {again}" if again else "interrupted", 130)
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
