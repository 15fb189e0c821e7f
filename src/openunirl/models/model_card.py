"""The model card of a converted checkpoint: what it was made from, and under which licence.

In: the source, its own card (README.md), and the run that it is a checkpoint of. Out: README.md, whose front matter
names the base model where that is a hub id. A model card is public, so of a local path only the last part is told.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from openunirl.evaluation.of_model import run_of
from openunirl.models import checkpoints


def is_hub_id(name: str) -> bool:
    """Example: is_hub_id("deepseek-ai/Janus-Pro-1B") and not is_hub_id("unirl.pth")"""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def public_name(source: str) -> str:
    """A hub id as it is, and the last part of a local path."""
    path = Path(source).expanduser()
    return source if is_hub_id(source) and not path.exists() else path.absolute().name


def base_of(source: str, folder: Path, known: Any) -> list[str]:
    """What a checkpoint was made from: what its card `known` names, else the model that its run began with, else the
    source itself. Errors: ValueError for a run whose config.json is damaged."""
    named = known.base_model
    if named:
        return [str(name) for name in (named if isinstance(named, list) else [named])]
    with checkpoints.telling(source, "or name the model that it comes from with --base-model"):
        run = run_of(folder)
    return [public_name(run.model.weights if run else source)]


def card(
    *, title: str, name: str, base: list[str], known: Any, was: str, layout: str, dtypes: str, readers: str
) -> Any:
    """The card of `name` (a `title`), converted from the layout `was`. Licences are those of its own card `known`."""
    ids = [each for each in base if is_hub_id(each)]
    data = ModelCardData(
        base_model=ids[0] if len(ids) == 1 else ids or None,
        library_name="transformers" if layout == "hf" else None,
        license=known.license,
        license_name=known.license_name,
        license_link=known.license_link,
        tags=["openunirl"],
    )
    made = f", which was made from {' and '.join(f'`{each}`' for each in base)} and" if base != [name] else ", which"
    body = (
        f"# {title}, {layout} layout\n\n"
        f"`openunirl convert --layout {layout}` wrote this folder from `{name}`{made} was in {was} layout. The weights "
        f"({dtypes}) have new names and the same values; those that no forward pass reads are left out.\n\n{readers}\n"
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
