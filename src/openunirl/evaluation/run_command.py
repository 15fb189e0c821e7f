"""`openunirl evaluate MODEL`: both tasks of one checkpoint, on disk and on the terminal.

In: a model, an EvalConfig, a folder. Out: evaluation.json, evaluation/ in GenEval's layout, a table.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from openunirl.config import EvalConfig, ModelConfig
from openunirl.disk import is_occupied
from openunirl.evaluation.files import write_evaluation
from openunirl.evaluation.run import evaluate
from openunirl.models.protocol import load_model
from openunirl.report_numbers import imbalance_table, summary_table
from openunirl.tasks.worlds import WORLDS


def evaluate_command(model: ModelConfig, config: EvalConfig, *, world: str, seed: int, output_dir: Path) -> None:
    """Errors: ValueError where `output_dir` holds anything already, or the model or world is unknown."""
    if is_occupied(output_dir):
        raise ValueError(f"{output_dir} exists and is not empty: choose another --output-dir")
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; known: {', '.join(WORLDS)}")
    adapter, place = load_model(model), WORLDS[world]()
    prompts = place.evaluation_prompts(config.split, config.num_prompts, seed)
    references = place.evaluation_prompts(config.split, max(config.num_references, config.num_prompts), seed)
    about = {"model": model.weights, "split": config.split}
    with Progress() as progress:
        bars: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done)

        result = evaluate(
            adapter, place, prompts, config, seed=seed, reference_prompts=references, report=report, about=about
        )
    path = write_evaluation(output_dir, "evaluation", result, prompts)
    console = Console()
    console.print(summary_table(result.summary))
    console.print(imbalance_table(result.summary))
    console.print(f"written: {path}", soft_wrap=True)
