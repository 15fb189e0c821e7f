"""`openunirl evaluate MODEL` in a world of drawn pictures: both tasks of one checkpoint, on disk and on the terminal.

In: a model, an EvalConfig, a folder. Out: evaluation.json, evaluation/ in GenEval's layout, a table. The same call
again continues after a kill, and repeats nothing that is on disk (kept.py). Under `accelerate launch` the first process
does all of it: the world is small.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from openunirl.config import EvalConfig, ModelConfig
from openunirl.distributed import Processes
from openunirl.evaluation.files import write_rows, write_summary
from openunirl.evaluation.kept import Kept
from openunirl.evaluation.no_score import no_answers, no_drawing, nothing_right
from openunirl.evaluation.output_folder import OutputFolder
from openunirl.evaluation.run import Evaluation, evaluate
from openunirl.generate import check_numbers, check_sampling, drawing_settings, tell_alone
from openunirl.models.protocol import load_model
from openunirl.report_numbers import imbalance_table, summary_table, unsettled_lines
from openunirl.tasks.records import prompt_row
from openunirl.tasks.worlds import WORLDS
from openunirl.validate_model import check_sampling_of


def evaluate_command(
    model: ModelConfig,
    config: EvalConfig,
    *,
    world: str,
    seed: int,
    output_dir: Path,
    dtype: str = "float32",
    command: str = "",
) -> None:
    """Does what `output_dir` lacks. dtype: of the model's network.

    Errors: ValueError where a number is out of range, the model or world is unknown, or `output_dir` is of something
    else or of other settings; and, with the pictures and rows written and no evaluation.json, where these are no score.
    """
    numbers = {"num-images": config.num_images, "batch-size": config.batch_size, "num-prompts": config.num_prompts}
    check_numbers(at_least_one=numbers | {"max-new-tokens": config.max_new_tokens}, seed=seed)
    check_sampling(config.sampling)
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; known: {', '.join(WORLDS)}")
    place = WORLDS[world]()
    prompts = place.evaluation_prompts(config.split, config.num_prompts, seed)
    references = place.evaluation_prompts(config.split, max(config.num_references, config.num_prompts), seed)
    folder = OutputFolder(
        path=output_dir,
        settings={
            "world": world,
            "split": config.split,
            "num_references": len(references),
            "max_new_tokens": config.max_new_tokens,
            "dtype": dtype,
        },
        drawing=drawing_settings(
            model, [prompt_row(prompt) for prompt in prompts], seed=seed, sampling=config.sampling
        ),
    )
    folder.check()
    processes = Processes()
    if not processes.is_main:
        return
    tell_alone(processes.count, "draws, reads and judges: the world is small")
    adapter = load_model(model).to(processes.device, getattr(torch, dtype))
    check_sampling_of(adapter, config.sampling)
    folder.open(adapter, command=command)
    about = {"model": model.weights, "split": config.split, "dtype": dtype}
    with Progress() as progress:
        bars: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done)

        result = evaluate(
            adapter,
            place,
            prompts,
            config,
            seed=seed,
            reference_prompts=references,
            report=report,
            about=about,
            kept=Kept(output_dir),
        )
    write_rows(folder.pictures, result)
    if why := no_score(result):
        raise ValueError(f"{why}. The pictures and rows are in {folder.pictures}, and there is no score")
    path = write_summary(output_dir, "evaluation", result.summary)
    console = Console()
    console.print(summary_table(result.summary))
    console.print(imbalance_table(result.summary))
    for line in unsettled_lines(result.summary):
        console.print(line, highlight=False)
    console.print(f"written: {path}", soft_wrap=True)


def no_score(result: Evaluation) -> str | None:
    """Why it is none, and the likely cause; else None."""
    rows, shown = result.generated, sum(bool(row["objects"]) for row in result.generated)
    return (
        no_drawing(rows, result.pictures, "the model")
        or nothing_right(
            rows, shown, "a model of another world (--settings, --world), damaged weights, or one that cannot draw yet"
        )
        or no_answers(rows, result.references)
    )
