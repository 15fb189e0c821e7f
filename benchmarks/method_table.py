"""The method's table: every objective of method_cells.py on both tiny models, over seeds, with equally many images.

    python benchmarks/method_table.py OUT [--models tiny-showo tiny-janus] [--cells grpo sft ...] [--seeds 0 1 2]
                                      [--images 1280] [--eval-images 600] [--references 600] [--results docs/results.md]

MODEL is a bundled name or a folder; by default all bundled models. Trains each cell from the base, evaluates it on
held-out prompts (a seed has prompts, images' seeds and reference pictures of its own, the same for all its cells), and
keeps it in OUT. It can be stopped at any time and started again, in any order, a part at a time; two processes
may share OUT if they share no cell. A run that stops itself (loss not finite, nothing learned) is a result, too: its
words stand in the table. Each time the page and its figure are written anew from all cells that OUT holds; --page-only
trains nothing. Minutes are those of the training steps, without the small evaluations.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from heldout import EVALUATION_SEED, claim, evaluate_folder, metrics_of, trained, training_minutes, write_json
from method_cells import CELLS, IMAGES, cell_config, images_per_step
from method_page import write_page
from openunirl import checkpoint
from openunirl.config import RunConfig, to_dict
from openunirl.evaluation.run import evaluate
from openunirl.generate import fingerprint
from openunirl.models.protocol import load_model
from openunirl.presets import BUNDLED
from openunirl.provenance import commit
from openunirl.tasks.worlds import WORLDS
from openunirl.validate import check

CAP = 3.0
"""Minutes that a cell may train, which --images is chosen for (a cell of fewer images would not compare); the page
names every cell that took longer."""


def model_name(model: str) -> str:
    return model if model in BUNDLED else Path(model).name


def curves(run: Path, config: RunConfig) -> dict[str, Any]:
    """From metrics.jsonl: {"reward": [[images, value]], "probes": [[images, oracle, understanding]], ...}."""
    rows, per_step = metrics_of(run), images_per_step(config)
    steps = [row for row in rows if "images" in row]
    return {
        "images": max((row["images"] for row in steps), default=0),
        "minutes": training_minutes(run),
        "updates": sum("grad_norm" in row for row in rows) * config.loss.num_iterations,  # some steps only collect
        "grad_norm": next((row["grad_norm"] for row in rows if "grad_norm" in row), None),
        "reward": [[row["images"], row["reward"]] for row in steps if "reward" in row],
        "probes": [
            [row["step"] * per_step, row["eval/geneval"], row["eval/understanding"]]
            for row in rows
            if "eval/geneval" in row
        ],
    }


def probe_base(config: RunConfig) -> list[float]:
    """The base on the prompts of the small evaluations: [0, oracle, understanding]."""
    model, world = load_model(config.model), WORLDS[config.world]()
    prompts = world.evaluation_prompts("validation", config.eval.during_prompts, config.seed)
    summary = evaluate(model, world, prompts, config.eval, seed=config.seed).summary
    return [0, summary["geneval"]["overall"], summary["understanding"]["overall"]]


SIZES = ("images", "probes", "probe_prompts", "eval_images", "references")
"""Flags that say what a cell is; the others say which cells a call trains and where they go."""


def whole_command(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command that makes all cells, whichever of them this call makes."""
    given = [(name, getattr(args, name)) for name in SIZES if getattr(args, name) != parser.get_default(name)]
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in given]
    return " ".join(["python benchmarks/method_table.py OUT", *flags])


def run_cell(
    name: str, config: RunConfig, folder: Path, *, sizes: tuple[int, int], base: str, command: str = ""
) -> None:
    """Trains and evaluates one cell into `folder`, unless it is there; `base` is the weights' fingerprint.

    Errors: ValueError for a folder of another recipe, size or base, and for a run that cannot start.
    """
    claim(folder, [to_dict(config), sizes, base])
    done = folder / "cell.json"
    if done.exists():
        return
    config = replace(config, output_dir=str(folder / "run"))
    told: dict[str, Any] = {"cell": name, "seed": config.seed, "commit": commit(), "command": command}
    weights: Path | str = config.model.weights
    if not CELLS[name].trains:
        told |= {
            "images": 0,
            "minutes": 0.0,
            "updates": 0,
            "grad_norm": None,
            "reward": [],
            "probes": [probe_base(config)],
        }
    else:
        run = Path(config.output_dir)
        try:
            trained(config)
        except ValueError as error:
            if not str(error).startswith("step "):  # it could not start: no result
                raise
            write_json(done, told | curves(run, config) | {"stopped": str(error)})
            return
        told |= curves(run, config)
        weights = checkpoint.latest(run)
    scored = evaluate_folder(weights, config.eval, *sizes, folder / "evaluation.json", EVALUATION_SEED + config.seed)
    write_json(done, told | scored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(BUNDLED))
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--probes", type=int, default=4, help="small evaluations on the way")
    parser.add_argument("--probe-prompts", type=int, default=96)
    parser.add_argument("--eval-images", type=int, default=600)
    parser.add_argument("--references", type=int, default=600)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent.parent / "docs" / "results.md")
    parser.add_argument("--page-only", action="store_true")
    args = parser.parse_args()
    jobs, command = [], whole_command(parser, args)
    for model in args.models:
        base = "" if args.page_only else fingerprint(load_model(model))
        for seed in args.seeds:
            for name in args.cells:
                config = cell_config(
                    name,
                    model,
                    images=args.images,
                    seed=seed,
                    probes=args.probes,
                    probe_prompts=args.probe_prompts,
                )
                folder = args.out / model_name(model) / f"{name}-{seed}"
                check(config)
                jobs.append((name, config, folder, base))
    for number, (name, config, folder, base) in enumerate([] if args.page_only else jobs, start=1):
        print(f"[{number}/{len(jobs)}] {folder}", file=sys.stderr, flush=True)
        run_cell(name, config, folder, sizes=(args.eval_images, args.references), base=base, command=command)
    write_page(args.out, args.results, cap=CAP)
    print(args.results)


if __name__ == "__main__":
    main()
