"""What benchmarks that train share: a preset or its variant is trained once, its last checkpoint scored on held-out
prompts once, and both can be stopped and started again.

In: a RunConfig and a folder. Out: the trained run's directory; a cell, {"summary", "correct", "understood"}: the
evaluation's summary and its 0/1 outcomes in the order of the prompts, so that two cells of one seed can be paired.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from openunirl import checkpoint
from openunirl.config import EvalConfig, ModelConfig, RunConfig
from openunirl.evaluation.run import evaluate
from openunirl.models.protocol import load_model
from openunirl.tasks.worlds import WORLDS
from openunirl.train import train

EVALUATION_SEED = 1000


def evaluate_folder(
    weights: Path | str, config: EvalConfig, images: int, references: int, out: Path, seed: int = EVALUATION_SEED
) -> dict[str, Any]:
    """Rows and summary of one model, cached in `out`."""
    if out.exists():
        return json.loads(out.read_text(encoding="utf-8"))
    model, world = load_model(ModelConfig(weights=str(weights), attn_implementation="eager")), WORLDS["shapes"]()
    prompts = world.evaluation_prompts("heldout", images, seed)
    asked = world.evaluation_prompts("heldout", references, seed)
    result = evaluate(model, world, prompts, config, seed=seed, reference_prompts=asked)
    cell = {
        "summary": result.summary,
        "correct": [row["correct"] for row in result.generated],
        "understood": [row["answer_correct"] for row in result.references],
    }
    write_json(out, cell)
    return cell


def trained(config: RunConfig) -> Path:
    """The run's directory, trained to its last step: from nothing, or from where it was stopped."""
    run = Path(config.output_dir)
    whole = checkpoint.saved(run)
    if not whole or checkpoint.read_step(whole[-1]) < config.train.max_steps:
        train(config, resume=(run / "config.json").exists(), command=" ".join(sys.argv))
    return run


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; none where nothing was logged."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def training_minutes(run: Path) -> float:
    """Of all steps, however often the run was stopped."""
    return sum(row.get("seconds", 0.0) for row in metrics_of(run)) / 60


def write_json(path: Path, value: Any) -> None:
    """Atomically: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(partial, path)


def claim(folder: Path, told: Any) -> None:
    """Writes down what the folder's results are of. Errors: ValueError where they are of something else."""
    path, told = folder / "recipe.json", json.loads(json.dumps(told))
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != told:
        raise ValueError(f"{folder} holds results of another recipe, size or base: choose another folder, or remove it")
    write_json(path, told)
