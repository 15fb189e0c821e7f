"""How a MODEL is evaluated, and draws and answers, found out from where it comes from.

    showlab/show-o-512x512        -> geneval, its authors' settings   (presets_real.PUBLISHED)
    RUN/checkpoints/step-000100   -> RUN/config.json: the world, and how that run evaluates
    what `convert` wrote          -> as the base model that its model card names
    tiny-showo, or what `pretrain` wrote -> shapes

In: MODEL as the command line has it. Out: a KnownEvaluation, or None where nothing tells; a UsageError for a folder
that is no model. A wrong world or wrong sampling would give a low score that looks like any other. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from openunirl.config import EvalConfig, RunConfig, from_dict
from openunirl.flags import UsageError
from openunirl.presets import BUNDLED
from openunirl.presets_real import PUBLISHED
from openunirl.provenance import ABOUT_A_RUN
from openunirl.run_directory import read_object


@dataclass(frozen=True, kw_only=True)
class KnownEvaluation:
    """Example: known_evaluation("tiny-showo") == KnownEvaluation(world="shapes", eval=EvalConfig())"""

    world: Literal["shapes", "geneval"]
    eval: EvalConfig


def published_name(weights: str) -> str | None:
    """The published name of a hub id. Example: published_name("showlab/show-o-512x512") == "showo-512"."""
    return None if Path(weights).exists() else _name_of(weights)


def _name_of(hub_id: str) -> str | None:
    names = (name for name, known in PUBLISHED.items() if hub_id in (known.model.weights, *known.copies))
    return next(names, None)


def known_evaluation(weights: str) -> KnownEvaluation | None:
    """None where nothing tells. Errors: ValueError for a run whose config.json is damaged."""
    if name := published_name(weights):
        return KnownEvaluation(world="geneval", eval=PUBLISHED[name].evaluation)
    folder = Path(weights).expanduser()
    if weights in BUNDLED or (folder / "pretrain.json").is_file() or (folder.parent / "pretrain.jsonl").is_file():
        return KnownEvaluation(world="shapes", eval=EvalConfig())
    run = run_of(folder) if folder.is_dir() else None
    if run is None:
        name = _name_of(base_of_card(folder))
        return KnownEvaluation(world="geneval", eval=PUBLISHED[name].evaluation) if name else None
    # as many prompts and pictures as another model is evaluated with, so that the two can be compared
    size = next(iter(PUBLISHED.values())).evaluation if run.world == "geneval" else EvalConfig()
    own = {name: getattr(run.eval, name) for name in ("sampling", "max_new_tokens", "batch_size")}
    return KnownEvaluation(world=run.world, eval=replace(size, **own))


def base_of_card(folder: Path) -> str:
    """The base model that a folder's model card names, as `convert` writes it; "" where none does, or it is damaged."""
    try:
        base = read_card(folder).base_model
    except ValueError:  # a card is prose: what it fails to say is not known
        return ""
    return base if isinstance(base, str) else ""


def read_card(folder: Path) -> Any:
    """The front matter of the card (README.md) in a folder, or an empty one. Errors: ValueError for a damaged one."""
    from huggingface_hub import ModelCard, ModelCardData

    readme = folder / "README.md"
    try:
        return ModelCard.load(readme).data if readme.is_file() else ModelCardData()
    except Exception as error:  # YAML raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the front matter of {readme} cannot be read ({reason}): repair it, or remove the file"
        ) from None


def run_of(checkpoint: Path) -> RunConfig | None:
    """The configuration of the run that a folder is a checkpoint of. Errors: ValueError for a damaged one."""
    place = checkpoint.resolve()
    file = place.parent.parent / "config.json"
    if place.parent.name != "checkpoints" or not file.is_file():
        return None
    fix = f"repair it, or evaluate a copy of {checkpoint} elsewhere, with --settings or --world"
    values = read_object(file, fix)
    try:
        return from_dict(RunConfig, {name: value for name, value in values.items() if name not in ABOUT_A_RUN})
    except ValueError as error:
        raise ValueError(f"{file} is no run's configuration ({error}): {fix}") from None


def check_model_folder(weights: str) -> None:
    """Errors: UsageError for a run directory, and for a folder of pictures."""
    from openunirl.evaluation.image_folder import holds_pictures

    folder = Path(weights).expanduser()
    if weights in BUNDLED or not folder.is_dir():
        return
    if (folder / "checkpoints").is_dir():
        saved = sorted(place for place in (folder / "checkpoints").iterdir() if place.is_dir())
        such = f", such as {saved[-1]}" if saved else ""
        raise UsageError(f"{folder} is a run directory, not a model: give one of its checkpoints{such}")
    if holds_pictures(folder):
        raise UsageError(
            f"{folder} holds pictures, not a model: pictures are scored with openunirl evaluate --images {folder} "
            "--output-dir DIR"
        )
