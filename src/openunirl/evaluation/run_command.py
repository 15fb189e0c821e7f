"""`openunirl evaluate MODEL`: both tasks of one checkpoint, on disk and on the terminal.

In: a model, an EvalConfig, a folder. Out: evaluation.json, evaluation/ in GenEval's layout, a table.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from openunirl.config import EvalConfig, ModelConfig
from openunirl.evaluation.files import write_evaluation
from openunirl.evaluation.run import evaluate
from openunirl.models.protocol import load_model
from openunirl.presets import bundled
from openunirl.report import summary_table
from openunirl.tasks.worlds import WORLDS


def evaluate_command(model: ModelConfig, config: EvalConfig, *, world: str, seed: int, output_dir: Path) -> None:
    """Errors: ValueError where `output_dir` holds an evaluation already, or the model or world is unknown."""
    if (output_dir / "evaluation.json").exists():
        raise ValueError(f"{output_dir} holds an evaluation already: choose another --output-dir")
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; known: {', '.join(WORLDS)}")
    adapter = load_model(
        bundled(model.weights) or model.weights,
        family=model.family,
        image_tokenizer=model.image_tokenizer,
        tokenizer=model.tokenizer,
        max_text_len=model.max_text_len,
        attn_implementation=model.attn_implementation,
    )
    place = WORLDS[world]()
    prompts = place.evaluation_prompts(config.split, config.num_prompts, seed)
    references = place.evaluation_prompts(config.split, max(config.num_references, config.num_prompts), seed)
    with Progress() as progress:
        bars: dict[str, int] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done)  # type: ignore[arg-type]

        result = evaluate(adapter, place, prompts, config, seed=seed, reference_prompts=references, report=report)
    result.summary["model"] = model.weights
    path = write_evaluation(output_dir, "evaluation", result, prompts)
    console = Console()
    console.print(summary_table(result.summary, result.summary))
    console.print(f"written: {path}")
