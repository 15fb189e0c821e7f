"""The commands that use a model as it is: evaluate, generate, answer, convert, report. For cli.COMMANDS.

In: the arguments behind a command's name. Out: what the handler writes. A MODEL is a folder, a file, a hub id, a
bundled name, or a published name (presets_real.PUBLISHED), which brings its parts and its authors' settings. torch is
not imported before the command line is read.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from openunirl.config import META_DETECTOR, OPENAI_CLIP, EvalConfig, ModelConfig
from openunirl.evaluation.images_command import evaluate_images
from openunirl.evaluation.of_model import check_model_folder, known_evaluation, published_name
from openunirl.flags import FLAT, HELP, UsageError, given, parse, unknown
from openunirl.notices import warn
from openunirl.presets import BUNDLED, bundled
from openunirl.presets_real import PUBLISHED, KnownModel
from openunirl.run_directory import is_evaluation
from openunirl.types import AnswerSampling, ImageSampling

T = TypeVar("T")

# ----------------------------------------------------------------------------------------------- which model


def check_model(weights: str) -> None:
    """Errors: UsageError for what is no bundled name, no local path, and cannot be a hub id; and for a folder of a run
    or of pictures."""
    check_model_folder(weights)
    if bundled(weights) is not None or "/" in weights or Path(weights).exists():
        return
    if weights in PUBLISHED:
        raise UsageError(f"{weights} is a name for MODEL; here give {PUBLISHED[weights].model.weights}, or a folder")
    told = unknown("model", weights, [*BUNDLED, *PUBLISHED])
    raise UsageError(f"{told}; otherwise give a folder, a file, or a hub id (owner/name)")


def read_arguments(
    kind: type[T],
    default: T,
    argv: list[str],
    prog: str,
    fill: Any,
    found: Callable[[str], dict[str, Any]] | None = None,
) -> T:
    """The arguments; where MODEL or --settings is a published name, or MODEL its hub id, its settings are defaults.

    fill: KnownModel -> the fields of `kind` that it sets; found: any other MODEL -> the fields that it sets.
    Errors: UsageError; and as `found`.
    """
    known, own, weights = _published(kind, default, argv, prog)
    if known is None and found is not None and weights:
        default = dataclasses.replace(default, **found(weights))  # type: ignore[type-var]
    if known is not None:
        parts = known.model if own else ModelConfig(
            weights="", family=known.model.family, max_text_len=known.model.max_text_len, roles=known.model.roles
        )  # fmt: skip
        model = dataclasses.replace(parts, weights=tyro.MISSING)
        default = dataclasses.replace(default, model=model, **fill(known))  # type: ignore[type-var]
    args: Any = parse(kind, argv, default, prog, "MODEL")
    if known is not None and weights in PUBLISHED and own:
        args = dataclasses.replace(args, model=dataclasses.replace(args.model, weights=known.model.weights))
    check_model(args.model.weights)
    return args


def _published(kind: type, default: Any, argv: list[str], prog: str) -> tuple[KnownModel | None, bool, str]:
    """The published model that the command line is about, whether it is MODEL itself, and MODEL."""
    asked = [token for token in argv if token not in HELP]
    try:
        args = parse(kind, asked, default, prog, "MODEL")
    except UsageError:
        if len(asked) < len(argv):
            return None, False, ""  # --help is all that counts
        raise
    weights: str = args.model.weights
    model = published_name(weights) or weights
    name = args.settings or model
    if args.settings and name not in PUBLISHED:
        raise UsageError(unknown("published model", name, PUBLISHED))
    own = name == model and not Path(weights).exists()
    return PUBLISHED.get(name) if args.settings or own else None, own, weights


Fill = Callable[[KnownModel | EvalConfig], dict[str, Any]]


def read_settings(kind: type[T], default: T, argv: list[str], prog: str, fill: Fill, names: Sequence[str]) -> T:
    """As `read_arguments`, for the settings called `names` on the command line; where nothing tells what they are for
    MODEL, and none is given, it says so on stderr."""
    told: list[str] = []

    def found(weights: str) -> dict[str, Any]:
        known = known_evaluation(weights)
        if known is None and not given(argv) & set(names):
            flags, verb = " and ".join(f"--{name}" for name in names), "have" if len(names) > 1 else "has"
            told.append(
                f"{weights} does not tell which settings it is meant to have, and {flags} {verb} the default; "
                f"--settings NAME takes those of the published model that it comes from ({', '.join(PUBLISHED)})"
            )
        return {} if known is None else fill(known.eval)

    args = read_arguments(kind, default, argv, prog, fill, found)
    for sentence in told:
        warn(sentence)
    return args


# ----------------------------------------------------------------------------------------------- the commands


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Evaluates a model (a folder, hub id or name) on both of its tasks. For pictures: --images DIR --help."""

    model: ModelConfig
    settings: str = ""
    """A published model (showo-512, ...) whose settings are the defaults; not needed where it is MODEL itself."""
    world: Literal["shapes", "geneval"] | None = None
    """shapes: drawn prompts, references and an oracle; geneval: GenEval's prompts and photographs, Mask2Former and
    CLIP, and further flags as follow. None: that of MODEL, where it is a published one, a tiny one or the checkpoint of
    a run, whose settings are then the defaults, too."""
    prompt_file: str = ""
    """geneval: evaluate on these records instead (all of them, unless --num-prompts is given), such as UniRL's
    evaluation_metadata_qa.jsonl, whose questions are then asked; records without a question get ours."""
    references: str = ""
    """geneval: folder of reference pictures in GenEval's layout, of any source; those that the detector calls right
    are asked about. Without it, understanding is not measured."""
    detector_weights: str = META_DETECTOR
    """geneval: Mask2Former of COCO's 80 things: folder or hub id."""
    color_weights: str = OPENAI_CLIP
    """geneval: CLIP: folder or hub id."""
    llm_judge: str = ""
    """geneval: a chat model of transformers (folder or hub id) that judges the answers instead of the rules."""
    llm_cache: str = ""
    """geneval: folder of the chat model's replies, which evaluations may share; the default is in --output-dir."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The network's weights; bfloat16 takes half the memory, and its scores are not quite those of float32. The image
    tokenizer, the detector and CLIP stay in float32."""
    seed: int = 0
    """Every draw is keyed by it."""
    output_dir: str = "runs/evaluation"
    """Where the tables and the judged images are written."""
    eval: Annotated[EvalConfig, FLAT]


def evaluate(argv: list[str]) -> None:
    """Tables and judged images in --output-dir; with --images, the score of pictures that are there."""
    if evaluate_images(argv):
        return
    prog, default = "openunirl evaluate", EvaluateArguments(model=ModelConfig(weights=tyro.MISSING), eval=EvalConfig())

    def found(weights: str) -> dict[str, Any]:
        known = known_evaluation(weights)
        return {} if known is None else {"world": known.world, "eval": known.eval}

    args = read_arguments(
        EvaluateArguments, default, argv, prog, lambda known: {"world": "geneval", "eval": known.evaluation}, found
    )
    _check_world(args, given(argv))
    if args.world == "geneval":
        from openunirl.evaluation.photos import evaluate_photos

        evaluate_photos(
            args.model,
            args.eval,
            prompt_file=Path(args.prompt_file) if args.prompt_file else None,
            references=Path(args.references) if args.references else None,
            detector_weights=args.detector_weights,
            color_weights=args.color_weights,
            llm_judge=args.llm_judge,
            llm_cache=Path(args.llm_cache) if args.llm_cache else None,
            seed=args.seed,
            output_dir=Path(args.output_dir),
            num_prompts=args.eval.num_prompts if "num-prompts" in given(argv) else None,
            dtype=args.dtype,
            command=shlex.join([*prog.split(), *argv]),
        )
        return
    from openunirl.evaluation.run_command import evaluate_command

    evaluate_command(
        args.model,
        args.eval,
        world="shapes",
        seed=args.seed,
        output_dir=Path(args.output_dir),
        dtype=args.dtype,
        command=shlex.join([*prog.split(), *argv]),
    )


_OF_PHOTOGRAPHS = ("prompt-file", "references", "detector-weights", "color-weights", "llm-judge", "llm-cache")
_OF_SHAPES = ("split", "num-references")
_SETTINGS = ("sampling.guidance-scale", "sampling.num-timesteps", "max-new-tokens")


def _check_world(args: EvaluateArguments, flags: set[str]) -> None:
    """Errors: UsageError where MODEL is none, where nothing tells its world or settings, and for a flag of the other
    world."""
    weights, names = args.model.weights, ", ".join(PUBLISHED)
    if args.world is None:
        raise UsageError(
            f"{weights} does not tell how it is to be evaluated: give --settings NAME of the published model that it "
            f"is or comes from ({names}), or --world shapes for a model of the bundled world of shapes"
        )
    lacking = [flag for flag in _SETTINGS if flag not in flags]
    if args.world == "geneval" and not args.settings and lacking and known_evaluation(weights) is None:
        raise UsageError(
            f"{weights} does not tell how it draws and answers, and with other settings than its authors' it scores "
            f"low: give --settings NAME ({names}), or each of {', '.join(f'--{flag}' for flag in _SETTINGS)}"
        )
    others, home = (_OF_SHAPES, "shapes") if args.world == "geneval" else (_OF_PHOTOGRAPHS, "geneval")
    for flag in others:
        if flag in flags:
            raise UsageError(f"--{flag} belongs to --world {home}, and {weights} is evaluated in {args.world}")
    if "during-prompts" in flags:
        raise UsageError("--during-prompts is of a training run; here the prompts are --num-prompts")


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Draws pictures for prompts, into a folder in GenEval's layout. The same call again draws only what is missing."""

    model: ModelConfig
    settings: str = ""
    """A published model (showo-512, ...) whose settings are the defaults; not needed where it is MODEL itself."""
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
    args = read_settings(
        GenerateArguments,
        default,
        argv,
        prog,
        lambda known: {"sampling": known.sampling, "batch_size": known.batch_size},
        ("sampling.guidance-scale", "sampling.num-timesteps"),
    )
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
    settings: str = ""
    """A published model (showo-512, ...) whose settings are the defaults; not needed where it is MODEL itself."""
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
    args = read_settings(
        AnswerArguments,
        default,
        argv,
        prog,
        lambda known: {"max_new_tokens": known.max_new_tokens, "batch_size": known.batch_size},
        ("max-new-tokens",),
    )
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
    args = parse(ConvertArguments, argv, default, prog, "SRC DST")
    if args.layout is None:
        raise UsageError(f"{prog} wants --layout official or --layout hf")
    source = PUBLISHED[args.source].model.weights if args.source in PUBLISHED else args.source
    check_model(source)
    from openunirl.models.convert import convert as handler

    folder = handler(source, Path(args.destination), args.layout, base_model=args.base_model, tokenizer=args.tokenizer)
    print(folder)


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Writes a training run's report.html again; of several runs or evaluations, or with --output: one page that
    compares them with the first, with intervals and p-values."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories, folders that `evaluate` wrote, or results.jsonl of GenEval's own evaluate_images.py."""
    output: str = ""
    """File of the comparison; default: comparison.html."""


def report(argv: list[str]) -> None:
    """The page; prints its path."""
    args = parse(ReportArguments, argv, ReportArguments(), "openunirl report", "RUN")
    if not args.runs:
        raise UsageError("openunirl report wants a RUN: openunirl report RUN [RUN ...] [flags]")
    for run in args.runs:
        if not Path(run).exists():
            raise UsageError(f"there is no run directory {run}: give the --output-dir of a training run or evaluation")
    if len(args.runs) == 1 and not args.output and not is_evaluation(Path(args.runs[0])):
        from openunirl.report import write_report

        print(write_report(Path(args.runs[0])))
        return
    from openunirl.compare import write_comparison

    print(write_comparison([Path(run) for run in args.runs], Path(args.output or "comparison.html")))
