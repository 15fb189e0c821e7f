"""The demo's recipe over several seeds, beside its controls, on held-out prompts.

    python benchmarks/demo_seeds.py OUT [--preset tiny-showo-sft] [--seeds 0 1 2] [--arms recipe shuffled]
                                    [--images 1200] [--references 2000] [--grid]

For each arm and seed: train the preset, evaluate the last checkpoint on the same held-out prompts, images' seeds and
reference pictures as the base. Finished cells are kept in OUT, so the script can be stopped and started again. Prints
one table: generation, the same over the two task types whose contents training never asks for, understanding,
imbalance, self-reward and collusion gap, with the difference to the base (paired bootstrap over prompts), the minutes
of the training steps without the small evaluations, and the mean over seeds with its 95 % interval (Student's t); below
it the numbers of distinct prompts. `--grid` also finds each model's own best sampler on validation prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from heldout import EVALUATION_SEED, evaluate_folder, trained, training_minutes
from method_page import told
from openunirl import checkpoint
from openunirl.config import EvalConfig, ModelConfig, to_dict
from openunirl.evaluation.intervals import paired_difference
from openunirl.models.protocol import load_model
from openunirl.presets import PRESETS
from openunirl.provenance import commit
from openunirl.types import ImageSampling
from sampler_grid import grid

COLUMNS = (
    "arm", "seed", "generation", "difference to base (95 %)", "new contents", "understanding", "difference (95 %)",
    "imbalance", "self-reward", "gap", "minutes",
)  # fmt: skip
NEW_CONTENTS = ("position", "color_attr")  # the task types whose splits are disjoint in content (tasks/shapes.py)


def own_best(weights: Path | str, config: EvalConfig, images: int, references: int, out: Path) -> dict:
    """The model under the best sampler of the grid, chosen on 300 validation prompts."""
    if out.exists():
        return json.loads(out.read_text())
    best = grid(
        load_model(ModelConfig(weights=str(weights), attn_implementation="eager")), "validation", 300, EVALUATION_SEED
    )[0][3]
    part = out.with_suffix(".cell.json")
    cell = evaluate_folder(weights, replace(config, sampling=best), images, references, part)
    row = {"sampling": asdict(best), "summary": cell["summary"]}
    out.write_text(json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="tiny-showo-sft", choices=sorted(PRESETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=["recipe", "shuffled"], choices=("recipe", "shuffled"))
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--references", type=int, default=2000)
    parser.add_argument("--grid", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    preset, sizes = PRESETS[args.preset], (args.images, args.references)
    recipe, wanted = args.out / "recipe.json", json.dumps([to_dict(preset), sizes], sort_keys=True)
    if recipe.exists() and recipe.read_text() != wanted:
        raise SystemExit(f"{args.out} holds cells of another recipe or size: choose another folder")
    recipe.write_text(wanted)
    base_folder = preset.model.weights
    base = evaluate_folder(base_folder, preset.eval, *sizes, args.out / "base.json")
    lines = [row("base", 0, base, None, 0.0)]
    for arm in args.arms:
        seeds = []
        for seed in args.seeds:
            run = args.out / f"{arm}-{seed}"
            config = replace(
                preset,
                seed=seed,
                output_dir=str(run),
                reward=replace(preset.reward, shuffle=arm == "shuffled"),
                eval=replace(preset.eval, num_prompts=0),
            )
            trained(config)
            cell = evaluate_folder(checkpoint.latest(run), preset.eval, *sizes, args.out / f"{arm}-{seed}.json")
            lines.append(row(arm, seed, cell, base, training_minutes(run)))
            seeds.append(numbers(cell, base, training_minutes(run)))
        lines.append(mean_row(arm, seeds))
    if args.grid:
        models = {"base": base_folder} | {
            f"recipe-{s}": checkpoint.latest(args.out / f"recipe-{s}") for s in args.seeds
        }
        for name, folder in models.items():
            best = own_best(folder, preset.eval, *sizes, args.out / f"{name}.best.json")
            s = ImageSampling(**best["sampling"])
            setting = f"T={s.num_timesteps} w={s.guidance_scale} t={s.temperature}"
            lines.append(f"| {name}, own best sampler ({setting}) | | {best['summary']['geneval']['overall']:.3f} |")
    print(
        f"\n`{' '.join(sys.argv)}`, commit {commit()}, held-out: {args.images} images, {args.references} references\n"
    )
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    print("\n".join(lines))
    for name, part in (("images", "geneval"), ("references", "understanding")):
        counts = [f"{tag} {task['distinct_prompts']}" for tag, task in base["summary"][part]["tasks"].items()]
        print(f"\ndistinct prompts, {name}: {', '.join(counts)}")


def numbers(cell: dict, base: dict | None, minutes: float) -> list[tuple[float, str]]:
    """Every number of a line, and how it is written."""
    summary, tasks = cell["summary"], cell["summary"]["geneval"]["tasks"]
    new = [tasks[tag]["accuracy"] for tag in NEW_CONTENTS]
    found = [(summary["geneval"]["overall"], ".3f"), difference(cell, base, "correct")]
    found += [(sum(new) / len(new), ".3f"), (summary["understanding"]["overall"], ".3f")]
    found += [difference(cell, base, "understood"), (summary["imbalance"]["score"], ".3f")]
    found += [(summary["self_reward"], ".3f"), (summary["collusion_gap"], "+.3f"), (minutes, ".1f")]
    return [(value, format(value, how) if how[-1] == "f" else how) for value, how in found]


def row(arm: str, seed: int, cell: dict, base: dict | None, minutes: float) -> str:
    return "| " + " | ".join([arm, str(seed), *(text for _, text in numbers(cell, base, minutes))]) + " |"


def mean_row(arm: str, lines: Sequence[Sequence[tuple[float, str]]]) -> str:
    """The mean over seeds of every number, and half of its 95 % interval."""
    cells = [told([value for value, _ in column]) for column in zip(*lines, strict=True)]
    return "| " + " | ".join([f"{arm}, mean", "", *cells]) + " |"


def difference(cell: dict, base: dict | None, field: str) -> tuple[float, str]:
    if base is None:
        return 0.0, " "
    mean, low, high = paired_difference(
        np.array(cell[field], float), np.array(base[field], float), rng=np.random.default_rng(0)
    )
    return mean, f"{mean:+.3f} ({low:+.3f} .. {high:+.3f})"


if __name__ == "__main__":
    main()
