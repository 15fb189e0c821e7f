"""Writes the page and the figure of the method's table from the cells that a folder holds.

In: OUT/MODEL/CELL-SEED/cell.json, as method_table.py writes them. Out: a Markdown page, and beside it a figure of
reward, oracle and understanding over generated images. What is not there is a dash; no cell is left out.

Intervals are Student's t over seeds (95 %), so they hold the noise of training and of the evaluation's images alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from method_cells import CELLS, COMMON, CONTRASTS, preset_of
from openunirl.presets import PRESETS
from openunirl.report_numbers import RATES, get, task_name

Cells = dict[str, dict[int, dict[str, Any]]]  # cell -> seed -> cell.json
Value = Callable[[dict[str, Any]], float | None]
Points = Callable[[int, dict[str, Any]], list[list[float]]]  # (seed, cell) -> [[images, value]]

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom, from 1
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

DRAWING: dict[str, Value] = {
    **{task_name(tag): lambda c, tag=tag: get(c, "summary", "geneval", "tasks", tag, "accuracy") for tag in TAGS},
    "overall": lambda c: get(c, "summary", "geneval", "overall"),
}
BALANCE: dict[str, Value] = {
    "understanding": lambda c: get(c, "summary", "understanding", "overall"),
    "answer wrong, image right": lambda c: get(c, "summary", "imbalance", RATES[0]),
    "image wrong, answer right": lambda c: get(c, "summary", "imbalance", RATES[1]),
    "imbalance": lambda c: get(c, "summary", "imbalance", "score"),
    "collusion gap": lambda c: get(c, "summary", "collusion_gap"),
}
TOLD = """
Every cell starts from the base and draws equally many images in training. Held-out, for each seed
{judged}, the same for all cells of a seed, judged by the oracle. Values are means over seeds ± half of a 95 % interval
(Student's t; a seed changes the training and the evaluation's prompts). With three seeds a difference has to be 2.5 of
their standard deviations to leave 0. The two rates are P(answer wrong given image right) and P(image wrong given answer
right); imbalance is their mean, 0 is perfect balance. The collusion gap is self-reward minus the oracle's accuracy.

All trained cells but the recipe differ in nothing but what the second table says: prompts, number of images, questions,
updates, sampler, scored steps, learning rate and random draws are equal. "The demo's recipe" is the model's preset
NAME-sft as it is. All train in float32. The gradient's norm is the first update's: that of "images only" and of
"answers only" tell how much of the joint cell's each half gives. **"Detector reward" is rewarded with the evaluation's
own verdict.**
"""
TOGETHER = """
Differences, paired by model and seed. The four variants are end-to-end, not end-to-end, images only and answers only.
"""
FIGURE = """
Means over seeds. The reward is each cell's own, so cells that reward something else do not compare, as a running mean
over twelve steps; oracle and understanding are on validation prompts, 0 images being the base.
"""

ALIKE = (("sft-e2e", "grpo-e2e"), ("sft", "grpo"), ("sft-t2i-only", "t2i-only"), ("sft-mmu-only", "mmu-only"))
"""Cells that differ in SFT against GRPO only: they share a colour, SFT's line is dashed."""

COMPARED = {
    "drawing": DRAWING["overall"],
    **{name: BALANCE[name] for name in ("understanding", "imbalance", "collusion gap")},
}


def read_cells(out: Path) -> dict[str, Cells]:
    """Model -> its cells."""
    found: dict[str, Cells] = {}
    for path in sorted(out.glob("*/*/cell.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        config = path.parent / "run" / "config.json"
        cell["versions"] = json.loads(config.read_text(encoding="utf-8")).get("versions", {}) if config.exists() else {}
        found.setdefault(path.parent.parent.name, {}).setdefault(cell["cell"], {})[cell["seed"]] = cell
    return found


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half of the 95 % interval); None of one value. Example: mean_interval([0.1, 0.2, 0.3]) -> (0.2, 0.248)"""
    if len(values) < 2:
        return float(np.mean(values)), None
    factor = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.96 + 2.7 / (len(values) - 1)
    return float(np.mean(values)), factor * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def told(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Example: told([0.1, 0.2, 0.3]) -> "0.200 ±0.248"; a dash for no value."""
    if not values:
        return "—"
    mean, half = mean_interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if half is None else f" ±{half:.{digits}f}")


def differences(first: dict[int, Any], second: dict[int, Any], value: Value) -> list[float]:
    """The first's minus the second's value, for each seed that both have."""
    pairs = [(value(first[seed]), value(second[seed])) for seed in sorted(first.keys() & second.keys())]
    return [a - b for a, b in pairs if a is not None and b is not None]


def alike_differences(cells: Cells, value: Value) -> list[float]:
    """GRPO minus SFT for each seed, as the mean of the four variants (ALIKE); of the seeds that have all of them."""
    found = []
    for seed in sorted(set.intersection(*(set(cells.get(name, {})) for pair in ALIKE for name in pair))):
        one = [differences({seed: cells[grpo][seed]}, {seed: cells[sft][seed]}, value) for sft, grpo in ALIKE]
        if all(one):
            found.append(float(np.mean(one)))
    return found


def contrasts(found: Sequence[Cells]) -> str:
    """The table of differences, paired by seed, of one model or of several together."""

    def row(says: str, of: Callable[[Cells, Value], list[float]]) -> list[str]:
        return [says, *(told([d for cells in found for d in of(cells, value)], "+") for value in COMPARED.values())]

    def pair(a: str, b: str) -> Callable[[Cells, Value], list[float]]:
        return lambda cells, value: differences(cells.get(a, {}), cells.get(b, {}), value)

    rows = [row("GRPO against SFT, mean of the four variants", alike_differences)]
    rows += [row(says, pair(a, b)) for says, a, b in CONTRASTS]
    rows += [row(f"{CELLS[name].says} against base", pair(name, "base")) for name in CELLS if name != "base"]
    return table(["first against second", *COMPARED], rows)


def lowest(found: Sequence[Cells]) -> str:
    """How far drawing fell at worst, of SFT's and of GRPO's four variants."""
    sft, grpo = (
        sorted(
            change
            for cells in found
            for pair in ALIKE
            for change in differences(cells.get(pair[side], {}), cells.get("base", {}), DRAWING["overall"])
        )
        for side in (0, 1)
    )
    if not sft or not grpo:
        return ""
    return (
        f"The lowest change of drawing against the base: {grpo[0]:+.3f} of {len(grpo)} cells of GRPO that ended, "
        f"{sft[0]:+.3f} of {len(sft)} of SFT, of which {sum(change < grpo[0] for change in sft)} are below that."
    )


def together(found: Mapping[str, Cells]) -> list[str]:
    """The differences over all models, if there are several."""
    if len(found) < 2:
        return []
    every = list(found.values())
    return [f"## {' and '.join(found)} together", TOGETHER.strip(), contrasts(every), *filter(None, [lowest(every)])]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def known(cells: dict[int, Any], value: Value) -> list[float]:
    return [v for cell in cells.values() if (v := value(cell)) is not None]


def section(model: str, cells: Cells, cap: float) -> str:
    """One model's tables."""
    drawing, balance = [], []
    base = cells.get("base", {})
    for name, cell in CELLS.items():
        of = cells.get(name, {})
        done = {seed: one for seed, one in of.items() if "stopped" not in one}
        gain = "" if name == "base" else told(differences(done, base, DRAWING["overall"]), "+")
        drawing.append([cell.says, *(told(known(done, value)) for value in DRAWING.values()), gain])
        minutes = told([one["minutes"] for one in done.values()], digits=2)
        images = ", ".join(str(count) for count in sorted({one["images"] for one in of.values()})) or "—"
        balance.append(
            [
                cell.says,
                *(told(known(done, value), "+" if name == "collusion gap" else "") for name, value in BALANCE.items()),
                minutes,
                images,
                str(len(done)),
            ]
        )
    parts = [
        f"## {model}",
        "Drawing, by GenEval's task types:",
        table(["cell", *DRAWING, "overall, minus base"], drawing),
        f"What is trained: `{preset_of(model, 'grpo')}` ({rates(model)}) with {fields(COMMON)}, and",
        table(["cell", "differs in", "updates", "first gradient's norm"], training(model, cells)),
        "Understanding and balance:",
        table(["cell", *BALANCE, "minutes", "images", "seeds"], balance),
        "Differences, paired by seed:",
        contrasts([cells]),
        *notes(cells, cap),
    ]
    return "\n\n".join(parts)


def rates(model: str) -> str:
    """What all cells but the recipe have of the preset, and no table tells."""
    preset = PRESETS[preset_of(model, "grpo")]
    optim = {"lr": preset.optim.lr, "warmup_steps": preset.optim.warmup_steps}
    return fields({"optim": optim, "loss": {"beta": preset.loss.beta}})


def fields(change: Mapping[str, Any], prefix: str = "") -> str:
    """Example: fields({"loss": {"beta": 0.0}}) -> "`loss.beta` 0.0"."""
    told = [
        fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) else f"`{prefix}{name}` {value}"
        for name, value in change.items()
    ]
    return ", ".join(told) or "nothing"


def training(model: str, cells: Cells) -> list[list[str]]:
    """A row for each trained cell: what it changes, its updates, how large its first gradient is."""
    rows = []
    for name, cell in CELLS.items():
        if not cell.trains:
            continue
        of = cells.get(name, {}).values()
        updates = ", ".join(str(count) for count in sorted({one["updates"] for one in of})) or "—"
        norms = [one["grad_norm"] for one in of if one["grad_norm"] is not None]
        differs = f"`{preset_of(model, name)}` itself" if cell.recipe else fields(cell.change)
        rows.append([cell.says, differs, updates, told(norms)])
    return rows


def notes(cells: Cells, cap: float) -> list[str]:
    """Runs that stopped themselves, and cells above the cap."""
    found = []
    for name, seeds in cells.items():
        for seed, one in sorted(seeds.items()):
            if "stopped" in one:
                found.append(f"* **{CELLS[name].says}, seed {seed}, stopped itself**: {one['stopped']}")
            elif one["minutes"] > cap:
                found.append(f"* {CELLS[name].says}, seed {seed}: {one['minutes']:.1f} minutes, above the {cap:g}.")
    return ["\n".join(found)] if found else []


# -------------------------------------------------------------------------------------------------- the figure


def line(seeds: dict[int, Any], points: Points) -> np.ndarray | None:
    """[X, 2]: images, and the mean over seeds where all of them have a value."""
    tables = [dict(points(seed, cell)) for seed, cell in seeds.items()]
    shared = sorted(set.intersection(*(set(each) for each in tables))) if tables else []
    return np.array([[x, np.mean([each[x] for each in tables])] for x in shared]) if shared else None


def smooth(points: np.ndarray, width: int = 12) -> np.ndarray:
    """A running mean over up to `width` steps back."""
    values = [points[max(0, i - width + 1) : i + 1, 1].mean() for i in range(len(points))]
    return np.stack([points[:, 0], values], axis=1)


def probes(base: dict[int, Any], column: int) -> Points:
    """The small evaluations' `column`, from the base's on."""

    def points(seed: int, cell: dict[str, Any]) -> list[list[float]]:
        start = base[seed]["probes"] if seed in base else []
        return [[row[0], row[column]] for row in [*start, *cell["probes"]]]

    return points


def rewards(seed: int, cell: dict[str, Any]) -> list[list[float]]:
    return cell["reward"]


def looks(name: str) -> dict[str, str]:
    """Colour and style of a cell's line; no two cells share both."""
    pair = next((pair for pair in ALIKE if name in pair), None)
    if pair:
        return {"color": f"C{ALIKE.index(pair)}", "linestyle": "--" if name == pair[0] else "-"}
    others = [each for each in CELLS if each != "base" and not any(each in pair for pair in ALIKE)]
    dotted = name in ("shuffled", "recipe")
    return {"color": f"C{len(ALIKE) + others.index(name)}", "linestyle": ":" if dotted else "-"}


def draw(found: dict[str, Cells], path: Path) -> None:
    """One row of three panels per model; a line is the mean over seeds."""
    figure = Figure(figsize=(12, 3.4 * len(found) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes, legend = figure.subplots(len(found), 3, squeeze=False), {}
    for (model, cells), panels in zip(found.items(), axes, strict=True):
        base = cells.get("base", {})
        curves: dict[str, Points] = {
            "training reward": rewards,
            "oracle": probes(base, 1),
            "understanding": probes(base, 2),
        }
        for panel, (what, points) in zip(panels, curves.items(), strict=True):
            for name in (name for name in CELLS if name != "base"):
                mean = line(cells.get(name, {}), points)
                if mean is None:
                    continue
                shown = smooth(mean) if points is rewards else mean
                (legend[CELLS[name].says],) = panel.plot(*shown.T, linewidth=1.5, **looks(name))
            panel.set(title=f"{model}: {what}", xlabel="generated images")
            panel.grid(alpha=0.25)
    if legend:
        told = {"loc": "outside lower center", "ncols": 4, "fontsize": 8, "frameon": False}
        figure.legend(list(legend.values()), list(legend), **told)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------------------------- the page


SAID = "experiments.md#2026-11-26-the-methods-table"


def write_page(out: Path, page: Path, *, cap: float) -> None:
    """Writes `page` and, beside it, its figure. Errors: ValueError for a folder without a cell."""
    found = read_cells(out)
    if not found:
        raise ValueError(f"{out} holds no finished cell: run the table without --page-only first")
    every = [cell for cells in found.values() for seeds in cells.values() for cell in seeds.values()]
    commits = ", ".join(sorted({cell["commit"] for cell in every}))
    commands = ", ".join(f"`{command}`" for command in sorted({cell["command"] for cell in every}))
    known = sorted({", ".join(f"{k} {v}" for k, v in cell["versions"].items()) for cell in every if cell["versions"]})
    versions = " and with ".join(known) or "versions that were not kept"
    figure = page.with_suffix(".png")
    draw(found, figure)
    sizes = sorted({(len(cell["correct"]), len(cell["understood"])) for cell in every if "correct" in cell})
    judged = "; ".join(f"{images} images and {references} reference pictures" for images, references in sizes)
    text = [
        "# Results: every objective on both tiny models",
        f"{commands}, commit {commits}, with {versions}. The script writes this page; "
        f"[experiments.md]({SAID}) says what it shows.",
        TOLD.format(judged=judged).strip(),
        f"![Reward, oracle and understanding over generated images]({figure.name})",
        FIGURE.strip(),
        *(section(model, cells, cap) for model, cells in found.items()),
        *together(found),
    ]
    page.write_text("\n\n".join(text) + "\n", encoding="utf-8")
