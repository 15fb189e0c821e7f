"""`openunirl evaluate --images DIR`: GenEval's score of pictures that any model drew.

In: a folder in GenEval's layout. Out, in --output-dir: results.jsonl (one line per picture, in GenEval's fields),
evaluation.json (accuracies with 95 % intervals and whose verdict they are), settings.json; a table and
GenEval's own summary on the terminal.
A call that was killed is continued by the same call. Under `accelerate launch` every process takes its share.
torch is not imported before the command line is read.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openunirl.config import META_DETECTOR, OPENAI_CLIP
from openunirl.evaluation.judges import JUDGES, NamedJudge
from openunirl.flags import UsageError, given, parse

if TYPE_CHECKING:
    from openunirl.distributed import Processes
    from openunirl.evaluation.image_folder import Picture

_SETTINGS = "settings"  # .json


@dataclass(frozen=True, kw_only=True)
class ImagesArguments:
    """Scores pictures that any model drew: a folder in GenEval's layout (00000/metadata.jsonl, 00000/samples/0000.png,
    and so on). The same call again scores only what is missing or was drawn again."""

    images: str = ""
    """The folder."""
    output_dir: str | None = None
    """Where results.jsonl and evaluation.json are written. It must be given."""
    detector: Literal["mask2former", "oracle"] = "mask2former"
    """Who judges: mask2former for photographs, as GenEval does; oracle for pictures of the shapes world."""
    detector_weights: str = META_DETECTOR
    """Mask2Former of COCO's 80 things in transformers' layout: folder or hub id."""
    color_weights: str = OPENAI_CLIP
    """CLIP in transformers' layout: folder or hub id."""
    prompt_file: str | None = None
    """GenEval's evaluation_metadata.jsonl: its lines must match the folders, whose own metadata may then be missing."""
    partial: bool = False
    """Score what is there although prompts or samples are missing; how many is told."""
    batch_size: int | None = None
    """Pictures at once; None: 8 on a GPU, 1 on a CPU. Changes memory and speed, not the result."""


def evaluate_images(argv: list[str]) -> bool:
    """The command, where argv names --images; else False. Errors: UsageError; and as score_folder."""
    prog = "openunirl evaluate"
    if "image" in given(argv):
        raise UsageError(f"unknown flag --image; did you mean {prog} --images DIR?")
    if "images" not in given(argv):
        return False
    args = parse(ImagesArguments, argv, ImagesArguments(), prog, "--images DIR")
    if not args.images:
        raise UsageError(f"{prog} wants --images DIR, a folder of pictures in GenEval's layout")
    if not args.output_dir:
        raise UsageError(f"{prog} --images wants --output-dir DIR, where the results are written")
    score_folder(
        Path(args.images),
        output_dir=Path(args.output_dir),
        detector=args.detector,
        detector_weights=args.detector_weights,
        color_weights=args.color_weights,
        prompt_file=Path(args.prompt_file) if args.prompt_file else None,
        partial=args.partial,
        batch_size=args.batch_size,
        command=shlex.join([*prog.split(), *argv]),
    )
    return True


def score_folder(
    images: Path,
    *,
    output_dir: Path,
    detector: str = "mask2former",
    detector_weights: str = META_DETECTOR,
    color_weights: str = OPENAI_CLIP,
    prompt_file: Path | None = None,
    partial: bool = False,
    batch_size: int | None = None,
    command: str = "",
    show: bool = True,
    judge: NamedJudge | None = None,
    origin: str = "given",
) -> dict[str, Any] | None:
    """Scores what `output_dir` lacks of the pictures in `images`; returns the summary (None in all processes but the
    main one). `show` prints the table; `judge` is that of `detector` and its weights, where the caller has it;
    `origin` of the pictures (no_score.ORIGINS) words the errors about them.

    Both folders may have been moved since an earlier call: pictures are known by their name within `images` and their
    content, weights by their fingerprint.

    Errors: ValueError before the networks are loaded, for an `output_dir` of other pictures, for a folder in which
    anything is missing or does not match, and for equal pictures; after scoring, for unreadable pictures, and where
    nothing was detected or nothing is right (results.jsonl then tells why). From the pictures on, the evaluation.json
    of an earlier call is gone whatever the error; its rows are kept.
    """
    from openunirl.disk import is_occupied
    from openunirl.distributed import Processes
    from openunirl.evaluation.files import write_summary
    from openunirl.evaluation.image_folder import all_equal, check_names, read_folder, told_of_further_keys
    from openunirl.evaluation.image_scores import PROTOCOL, check_moved, journal_rows, take_up
    from openunirl.evaluation.left_out import left_out
    from openunirl.evaluation.no_score import ORIGINS
    from openunirl.generate import check_settings
    from openunirl.provenance import about
    from openunirl.tasks.records import read_prompts

    if detector not in JUDGES:
        raise ValueError(f"unknown detector {detector!r}; known: {', '.join(JUDGES)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}, wanted at least 1")
    settings: dict[str, Any] = {"protocol": PROTOCOL, "detector": detector}
    known = output_dir / f"{_SETTINGS}.json"
    if known.exists():
        check_settings(known, settings, made=output_dir, flag="--output-dir")
        check_moved(known, images, lambda: read_folder(images, prompt_file=prompt_file, partial=partial))
    elif is_occupied(output_dir):
        raise ValueError(f"{output_dir} exists and holds no {known.name}: choose another --output-dir")
    processes = Processes()
    if known.exists() and processes.is_main:  # if this call ends in an error, no summary of before must outlive it
        (output_dir / "evaluation.json").unlink(missing_ok=True)
    pictures = read_folder(images, prompt_file=prompt_file, partial=partial)
    named = judge or JUDGES[detector](detector_weights, color_weights)
    check_names(pictures, named.classes, named.colors, detector)
    if all_equal(pictures):
        raise ValueError(
            f"all {len(pictures)} pictures in {images} are equal, so there is no score: {ORIGINS[origin].equal} (look "
            "at one)"
        )
    scorer, fingerprints = named.load(processes.device)
    settings |= fingerprints
    names = {"images": str(images.resolve())}  # for the reader: what these hold is compared, not where they are
    if fingerprints:
        names |= {"detector_weights": detector_weights, "color_weights": color_weights}
    if processes.is_main:
        if known.exists():
            check_settings(known, settings, made=output_dir, flag="--output-dir")
        else:
            write_summary(output_dir, _SETTINGS, settings | names | about(command))
        take_up(output_dir, pictures)
    processes.wait()
    done = journal_rows(output_dir)
    missing = [picture for picture in pictures if picture.name not in done]
    processes.wait()  # all have read the journal before any adds to it
    _score_share(scorer, missing, output_dir, processes, batch_size, len(pictures))
    processes.wait()
    if not processes.is_main:
        return None
    lacking = left_out(images, pictures, len(read_prompts(prompt_file)) if prompt_file is not None else None)
    more: dict[str, Any] = {
        "images": str(images),
        "partial": partial,
        "left_out": asdict(lacking),
        "ignored": told_of_further_keys(pictures) or None,
    }
    more |= {"detector": settings | names, **about(command)}
    return _conclude(output_dir, pictures, named.label, before=len(done), show=show, about=more, origin=origin)


def _score_share(
    judge: Any,
    missing: Sequence[Picture],
    folder: Path,
    processes: Processes,
    batch_size: int | None,
    total: int,
) -> None:
    """This process's share of what is missing; the main one shows progress, of its own share."""
    from rich.console import Console

    from openunirl.evaluation.image_scores import journal, score_into_journal
    from openunirl.generate import progress_bar, share_of

    size = batch_size or (1 if processes.device.type == "cpu" else 8)
    share = missing[processes.rank :: processes.count]
    with progress_bar(Console(stderr=True), disable=not processes.is_main) as progress:
        others = share_of(processes.count)
        before = 0 if others else total - len(missing)
        bar = progress.add_task(f"scoring{others}", total=before + len(share), completed=before)
        score_into_journal(
            judge, share, journal(folder, processes.rank), size, lambda number: progress.advance(bar, number)
        )


def _conclude(
    folder: Path,
    pictures: Sequence[Picture],
    label: str,
    *,
    before: int,
    show: bool,
    about: dict[str, Any],
    origin: str,
) -> dict[str, Any]:
    """results.jsonl, evaluation.json and the table. Errors: ValueError where the rows are no score."""
    from rich.console import Console

    from openunirl.evaluation.files import write_summary
    from openunirl.evaluation.geneval import official_summary
    from openunirl.evaluation.image_scores import (
        journal_rows,
        no_score,
        summarize_pictures,
        unreadable,
        write_results,
    )
    from openunirl.evaluation.left_out import LeftOut
    from openunirl.evaluation.no_score import one_color

    rows = journal_rows(folder)
    lost = [picture.name for picture in pictures if picture.name not in rows]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(pictures)} pictures have no row in {folder / 'journal'} although all were scored, "
            f"the first is {lost[0]}: another call worked on {folder} meanwhile, or the processes do not share a disk; "
            "let one call at a time write there, on a disk that all processes see, and repeat it"
        )
    results = [rows[picture.name] for picture in pictures]
    images = Path(about["images"])
    bad = unreadable(results, images, origin)
    if bad:
        raise ValueError(bad)
    write_results(folder, results)
    why = no_score(results, images, origin)
    if why:
        raise ValueError(why)
    summary = summarize_pictures(results, label, **about, warnings=list(filter(None, [one_color(results)])))
    path = write_summary(folder, "evaluation", summary)
    if not show:
        return summary
    console = Console()
    console.print(_table(summary))
    show_official(console, official_summary(results))
    if summary["distinct_pictures"] < len(results):
        repeated = len(results) - summary["distinct_pictures"]
        console.print(f"{repeated} pictures are exact copies of others: were their seeds the same?")
    lacking = LeftOut(**summary["left_out"])
    for line in filter(None, (lacking.ignored(), lacking.missing(), summary["ignored"], *summary["warnings"])):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{len(results) - before} pictures scored, {before} were scored before; written: {path}", soft_wrap=True
    )
    return summary


def show_official(console: Any, summary: str) -> None:
    """geneval.official_summary on the terminal."""
    console.print("As summary_scores.py prints it:\n")
    console.print(summary, highlight=False, markup=False, soft_wrap=True)


def _table(summary: dict[str, Any]) -> Any:
    """Shares in percent with n and 95 % intervals."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    geneval, covered = summary["geneval"], summary["official_prompts"]
    prompts = f"; {covered['scored']} of GenEval's {covered['of']} prompts" if covered and covered["scored"] else ""
    title = f"{summary['label']}{prompts}, in % (95 % interval)"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "share", "right", "n", "prompts"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    overall = {"accuracy": geneval["overall"], "correct": "", **geneval}
    lines = {"overall (mean of the tasks)": overall, **geneval["tasks"]}
    for name, line in lines.items():
        low, high = line["ci95"]
        share = f"{100 * line['accuracy']:.1f} ({100 * low:.0f}..{100 * high:.0f})"
        table.add_row(name, share, str(line["correct"]), str(line["n"]), str(line["distinct_prompts"]))
    return table
