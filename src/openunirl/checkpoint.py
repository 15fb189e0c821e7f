"""Save and resume, atomically: a checkpoint folder is either whole or not there.

In: the model, the optimizer's state, the step. Out: checkpoints/step-000100/ with the model in its own layout,
optimizer.pt (read with weights_only=True) and state.json. All randomness is keyed by the step, so nothing else
is needed to continue.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from openunirl.disk import PARTIAL, whole
from openunirl.models.checkpoints import UnreadableWeights
from openunirl.models.protocol import UnifiedModel
from openunirl.models.sharded import as_held
from openunirl.run_directory import read_object

_PREFIX = "step-"
REPLAY = "replay/images.safetensors"
"""The images that all processes hold: in a folder of its own, which no loader of weights reads along."""


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{_PREFIX}{step:06d}"


def save(
    run: Path,
    model: UnifiedModel,
    optimizer: dict[str, Any],
    state: State,
    keep: int,
    *,
    replay: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes the checkpoint of `state.step` beside its place, then renames; keeps the newest `keep`. `replay`: the
    images that all processes hold (replay.py), if any.

    Errors: OSError (such as a full disk) with the folder named; what was saved before is untouched.
    """
    final = folder(run, state.step)
    with whole(final) as partial:
        model.save(partial)
        model.save_reference(partial)
        torch.save(optimizer, partial / "optimizer.pt")
        if replay:
            (partial / REPLAY).parent.mkdir()
            save_file(dict(replay), partial / REPLAY)
        (partial / "state.json").write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
    for old in saved(run)[:-keep] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def saved(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = (run / "checkpoints").glob(f"{_PREFIX}[0-9]*")
    return sorted(p for p in found if p.suffix != PARTIAL and (p / "state.json").exists())


def load_model(checkpoint: Path, model: UnifiedModel) -> None:
    """The policy's weights, and the base's where it has moved. Errors: ValueError for files that are damaged or belong
    to another network."""
    try:
        model.load_weights(checkpoint)
        model.load_reference(checkpoint)
    except UnreadableWeights as error:
        raise ValueError(f"{error}; {_without(checkpoint)}") from None


def latest(run: Path) -> Path:
    """Errors: ValueError where the run has none."""
    whole = saved(run)
    if not whole:
        raise ValueError(f"{run} has no checkpoint to resume from: start it again without --resume in a new directory")
    return whole[-1]


@dataclass(frozen=True, kw_only=True)
class State:
    """What state.json tells of a checkpoint.

    wise_ft_alpha: how far its weights were blended with the base's (1.0: not at all). swa_steps: its weights are the
    mean of so many steps' (0: of none). swa_from: the first step of the running mean that it holds; None: it holds
    none. prompts_per_step: of all processes together; None in checkpoints that do not tell.
    Example: State(step=100, prompts_per_step=32)
    """

    step: int
    wise_ft_alpha: float = 1.0
    swa_steps: int = 0
    swa_from: int | None = None
    prompts_per_step: int | None = None


def read_state(checkpoint: Path) -> State:
    """Errors: ValueError where state.json is damaged."""
    file = checkpoint / "state.json"
    told = read_object(file, _without(checkpoint))
    known: dict[str, Any] = {"step": None}
    known |= {field.name: told[field.name] for field in fields(State) if field.name in told}
    state = State(**known)
    sound = {
        "step": type(state.step) is int and state.step >= 1,
        "wise_ft_alpha": type(state.wise_ft_alpha) in (int, float) and 0 < state.wise_ft_alpha <= 1,
        "swa_steps": type(state.swa_steps) is int and state.swa_steps >= 0,
    } | {
        name: (value := getattr(state, name)) is None or (type(value) is int and value >= 1)
        for name in ("swa_from", "prompts_per_step")
    }
    for name, holds in sound.items():
        if not holds:
            raise ValueError(f"{file} is damaged (its {name} is {getattr(state, name)!r}): {_without(checkpoint)}")
    return state


def read_step(checkpoint: Path) -> int:
    """Errors: ValueError where state.json is damaged."""
    return read_state(checkpoint).step


def _without(checkpoint: Path) -> str:
    return f"remove {checkpoint}, and --resume goes on from the checkpoint before it"


def read_replay(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The images that all processes held; none where a run kept none. Errors: ValueError for a damaged file."""
    file = checkpoint / REPLAY
    if not file.exists():
        return {}
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): {_without(checkpoint)}") from None


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Moments and step counts; betas, weight decay and learning rate stay those of the present configuration.

    Errors: ValueError for a damaged file, and for one of another network.
    """
    file = checkpoint / "optimizer.pt"
    try:
        _load_optimizer(file, optimizer)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: {_without(checkpoint)}") from None
    except Exception as error:  # damaged files raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{file} cannot be read as the state of this run's optimizer ({reason}): {_without(checkpoint)}"
        ) from error


def _load_optimizer(file: Path, optimizer: torch.optim.Optimizer) -> None:
    kept = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # each process reads what it needs
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in loaded["state"].items():
        if (found := values["exp_avg"].shape) != (wanted := parameters[number].shape):
            raise ValueError(f"moments of shape {list(found)} for a weight of shape {list(wanted)}")
        loaded["state"][number] = {
            name: as_held(value, parameters[number]) if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }
    optimizer.load_state_dict(loaded)
    for group, present in zip(optimizer.param_groups, kept, strict=True):
        group.update(present)
