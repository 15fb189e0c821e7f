"""How far the oracle can be trusted: rendered reference scenes, and a tokenizer's reconstructions of them.

    python benchmarks/oracle.py [--scenes 2000] [--seed 0] [--model DIR]

Out: a table, one line a task type, of the share of right verdicts (all should be right: the scenes satisfy their
prompts), the share of damaged scenes whose items are counted exactly, and the oracle's time per picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from openunirl.evaluation.geneval import score
from openunirl.evaluation.intervals import wilson
from openunirl.provenance import commit
from openunirl.tasks.shapes import TAGS, Prompt, prompts, render_batch, sample_scene
from openunirl.tasks.shapes_examples import random_example
from openunirl.tasks.shapes_oracle import Oracle

Redraw = Callable[[np.ndarray], np.ndarray]  # uint8 [B, H, W, 3] -> the same


def reconstruct_with(folder: str) -> Redraw:
    """A tokenizer's encode and decode, in batches."""
    from openunirl.evaluation.run import to_pixels, to_uint8
    from openunirl.models.protocol import load_model

    model = load_model(folder)

    def redraw(pictures: np.ndarray) -> np.ndarray:
        parts = [pictures[start : start + 100] for start in range(0, len(pictures), 100)]
        return np.concatenate([to_uint8(model.decode(model.encode(to_pixels(part)))) for part in parts])

    return redraw


def verdicts(asked: Sequence[Prompt], pictures: np.ndarray) -> tuple[list[bool], float]:
    """Whether each picture satisfies its prompt; milliseconds per picture."""
    oracle, start = Oracle(), time.perf_counter()
    right = []
    for prompt, picture, found in zip(asked, pictures, oracle.detect(list(pictures)), strict=True):

        def colors(name, objects, picture=picture):
            return oracle.colors(picture, objects, name)

        right.append(score(prompt.metadata(), found, colors).correct)
    return right, (time.perf_counter() - start) * 1e3 / len(pictures)


def line(name: str, right: Sequence[bool]) -> str:
    low, high = wilson(sum(right), len(right))
    return f"{name:<28} {np.mean(right):8.4f} {len(right):6d}   [{low:.4f}, {high:.4f}]"


def report(name: str, redraw: Redraw, number: int, seed: int) -> None:
    """Prints one table."""
    rng = np.random.default_rng(seed)
    asked = prompts("heldout", number, seed)
    right, milliseconds = verdicts(asked, redraw(render_batch([sample_scene(p, rng) for p in asked], rng)))
    print(f"\n{name:<28} {'right':>8} {'n':>6}   95 % interval")
    for tag in TAGS:
        print(line(tag, [ok for prompt, ok in zip(asked, right, strict=True) if prompt.tag == tag]))
    print(line("all", right))
    scenes = [random_example(rng, damaged=1.0)[0] for _ in range(number // 4)]
    found = Oracle().detect(list(redraw(render_batch(scenes, rng))))
    kinds = [sorted(kind for kind, objects in one.items() for _ in objects) for one in found]
    wanted = [sorted(item.shape for item in scene.items) for scene in scenes]
    print(line("damaged scenes, exact items", [a == b for a, b in zip(kinds, wanted, strict=True)]))
    print(f"{milliseconds:.2f} ms a picture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a model folder or bundled name: judge its tokenizer's reconstructions too")
    args = parser.parse_args()
    print(f"command: python {' '.join(sys.argv)}\nseed: {args.seed}\ncommit: {commit()}")
    report("rendered", lambda pictures: pictures, args.scenes, args.seed)
    if args.model:
        report("reconstructed", reconstruct_with(args.model), args.scenes, args.seed)


if __name__ == "__main__":
    main()
