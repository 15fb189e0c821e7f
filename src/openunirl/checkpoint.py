"""Save and resume, atomically: a checkpoint folder is either whole or not there.

In: the model, the optimizer's state, the step. Out: checkpoints/step-000100/ with the model in its own layout,
optimizer.pt (read with weights_only=True) and state.json. All randomness is keyed by the step, so nothing else
is needed to continue.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from openunirl.disk import PARTIAL, whole
from openunirl.models.protocol import UnifiedModel
from openunirl.models.sharded import as_held

_PREFIX = "step-"


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{_PREFIX}{step:06d}"


def save(run: Path, model: UnifiedModel, optimizer: dict[str, Any], state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `state["step"]` beside its place, then renames; keeps the newest `keep`.

    Errors: OSError (such as a full disk) with the folder named; what was saved before is untouched.
    """
    final = folder(run, state["step"])
    with whole(final) as partial:
        model.save(partial)
        model.save_reference(partial)
        torch.save(optimizer, partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
    for old in saved(run)[:-keep] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def saved(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = (run / "checkpoints").glob(f"{_PREFIX}[0-9]*")
    return sorted(p for p in found if p.suffix != PARTIAL and (p / "state.json").exists())


def latest(run: Path) -> Path:
    """Errors: ValueError where the run has none."""
    whole = saved(run)
    if not whole:
        raise ValueError(f"{run} has no checkpoint to resume from: start it again without --resume in a new directory")
    return whole[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Moments and step counts; betas, weight decay and learning rate stay those of the present configuration."""
    kept = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    loaded = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in loaded["state"].items():
        loaded["state"][number] = {name: as_held(value, parameters[number]) for name, value in values.items()}
    optimizer.load_state_dict(loaded)
    for group, present in zip(optimizer.param_groups, kept, strict=True):
        group.update(present)
