"""Where the time goes: torch's profiler on sampling, answering and a training step's passes of both families.

    OMP_NUM_THREADS=1 python benchmarks/profile_rollout.py [--images 4] [--timesteps 8] [--new-tokens 16]
        [--out docs/profile.png] [--seed 0] [--short]

Each piece of work runs once to warm up and once under the profiler. Every operation's own time (without the operations
that it calls) goes to one group by its name, GROUPS below; the rest of the wall time (Python, the profiler itself) is
"outside". Prints a table and draws stacked bars of shares. On a CPU the profiler adds to every operation, so that
groups of many small ones look larger than they are; the totals without it stand in the other benchmarks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
import torch
from torch.profiler import ProfilerActivity, profile

import midsize
from openunirl.draws import key
from openunirl.models.janus import Janus
from openunirl.models.showo import Showo
from openunirl.types import AnswerSampling, ImageQuestion, Images, ImageSampling
from timing import header, parser
from training_step import answers_case, images_case, name_of, sampled_images

GROUPS: dict[str, tuple[str, ...]] = {
    "copies": (
        "reorder", "copy", "cat", "index", "clone", "fill", "zero", "zeros", "embedding", "contiguous", "where",
        "nonzero", "repeat", "stack",
    ),
    "attention": ("attention",),
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution"),
    "activation": ("gelu", "silu", "sigmoid", "tanh", "relu"),
    "norms": ("norm",),
    "draws and log-probs": (
        "softmax", "exp", "log", "cumsum", "searchsorted", "sort", "gather", "scatter", "argmax", "max", "bitwise",
        "rshift", "and", "xor", "multinomial", "uniform",
    ),
}  # fmt: skip
"""Group -> words of an operation's name; the first group that fits takes it, "other" (sums, scalings, rotations, views)
what none fits. Packing weights for a sampler is a copy."""

SHADES = {
    "products": "#1f6fb4", "attention": "#0b3d66", "activation": "#e08a1e", "norms": "#7a5ea8",
    "draws and log-probs": "#3a9a5b", "copies": "#b8453b", "other": "#8c8c8c", "outside": "#d9d9d9",
}  # fmt: skip
"""From left to right: what the floor counts, what else a network needs, what a faster program would not do."""


def group_of(operation: str) -> str:
    """Of an operation, by the profiler's name of it. Example: "aten::native_layer_norm" belongs to "norms"."""
    words = operation.rpartition("::")[2].lower().split("_")
    return next((group for group, own in GROUPS.items() if any(word in own for word in words)), "other")


def profiled(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of each group, and "outside" any operation."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        work()
        wall = time.perf_counter() - start
    taken: Counter[str] = Counter()
    for event in recorded.key_averages():
        taken[group_of(event.key)] += event.self_cpu_time_total / 1e6
    found = {group: taken[group] for group in (*GROUPS, "other")}
    return found | {"outside": max(0.0, wall - sum(found.values()))}


def works(model: Showo | Janus, images: int, timesteps: int, new_tokens: int, seed: int) -> dict[str, Callable]:
    """What is profiled, by name."""
    prompts, seeds_B = midsize.prompts(images), key(seed, torch.arange(images))
    sampling = ImageSampling(guidance_scale=5.0, num_timesteps=timesteps)
    drawn = sampled_images(model, prompts, 5.0, "remask", seed)[0].images
    if isinstance(model, Janus):
        drawn = Images(pixels_BCHW=model.decode(drawn))
    asked = [ImageQuestion(image=b, question=question) for b, question in enumerate(midsize.questions(images))]
    greedy = AnswerSampling(max_new_tokens=new_tokens)
    passes = [images_case(model, prompts, 5.0, "remask"), answers_case(model, prompts, seed)]

    def step() -> None:
        model.net.zero_grad()
        for one in passes:
            one.loss(model).backward()

    return {
        f"{name_of(model)}: drawing": lambda: model.sample_images(prompts, seeds_B, sampling),
        f"{name_of(model)}: answering": lambda: model.sample_answers(drawn, asked, seeds_B, greedy),
        f"{name_of(model)}: training": step,
    }


def draw(rows: dict[str, dict[str, float]], out: Path) -> None:
    """Stacked bars of shares, one a row; a gap between the families."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = [row + 0.5 * name.startswith(last_family(rows)) for row, name in enumerate(rows)]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(rows) + 1.3))
    left = [0.0] * len(rows)
    for group, shade in SHADES.items():
        shares = [100 * found[group] / sum(found.values()) for found in rows.values()]
        axes.barh(places, shares, left=left, color=shade, label=group, height=0.8, edgecolor="white", linewidth=0.6)
        for y, share, start in zip(places, shares, left, strict=True):
            if share >= 3:
                ink = "black" if group == "outside" else "white"
                axes.text(start + share / 2, y, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=8)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of the time", yticks=places, yticklabels=list(rows))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(
        ncols=len(SHADES), loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False, fontsize=8,
        handlelength=1, handletextpad=0.4, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip
    figure.savefig(out, dpi=150, bbox_inches="tight")


def last_family(rows: Mapping[str, object]) -> str:
    return list(rows)[-1].partition(":")[0]


def main() -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("--images", type=int, default=4)
    options.add_argument("--timesteps", type=int, default=8)
    options.add_argument("--new-tokens", type=int, default=16)
    options.add_argument("--out", type=Path, default=Path("docs/profile.png"))
    args = options.parse_args()
    header(args.seed)
    images, timesteps, new_tokens = (1, 2, 2) if args.short else (args.images, args.timesteps, args.new_tokens)
    rows: dict[str, dict[str, float]] = {}
    for family in ("showo", "janus"):
        model = getattr(midsize, family)(side=8 if args.short else 16, seed=args.seed)
        for name, work in works(model, images, timesteps, new_tokens, args.seed).items():
            rows[name] = profiled(work)
    width = max(map(len, rows))
    print(f"{'':<{width}} {'seconds':>8}  " + "  ".join(next(iter(rows.values()))))
    for name, found in rows.items():
        total = sum(found.values())
        cells = (f"{100 * seconds / total:{len(group)}.0f}" for group, seconds in found.items())
        print(f"{name:<{width}} {total:8.2f}  " + "  ".join(cells))
    print("(% of the seconds)")
    draw(rows, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
