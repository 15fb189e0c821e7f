"""A run's directory before and between its steps: is it free, does a resumed run still fit it, what does it hold?

In: a RunConfig, the directory. Out: config.json, and what evaluations say; or a ValueError that names the field or
file, both values, and the fix. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openunirl.config import RunConfig, to_dict
from openunirl.disk import is_occupied, whole
from openunirl.provenance import about

SAME = (
    *("seed", "world", "prompt_file"),
    *(f"model.{name}" for name in ("weights", "family", "image_tokenizer", "tokenizer", "max_text_len")),
    *("model.num_image_tokens", "model.roles"),
    *(f"eval.{name}" for name in ("split", "num_prompts", "num_images", "num_references", "sampling")),
    "eval.max_new_tokens",
)
"""Fields that a resumed run keeps: they say what it began from, which draws it makes, and how before and after are
compared. All others may change, as may the number of processes, and with it --rollout.num-prompts, which is each one's
(check_prompts_per_step); of evaluations it may give up the last one."""


RESULTS = "results.jsonl"
"""The rows that `evaluate --images` and GenEval's own tool write."""


def is_evaluation(place: Path) -> bool:
    """Whether it is an evaluation by itself - a file, or a folder that holds one - and no run directory, which has a
    report of its own."""
    return place.is_file() or any((place / name).exists() for name in ("evaluation.json", RESULTS))


def check_directory(folder: Path, *, resume: bool) -> None:
    """Errors: ValueError for a directory that is there already or, with `resume`, is not."""
    if not resume and is_occupied(folder):
        raise ValueError(
            f"the run directory {folder} exists: continue it with --resume, or choose another --output-dir"
        )
    if resume and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no run directory (it has no config.json): start it without --resume")


def swa_from(config: RunConfig) -> int | None:
    """The first step whose weights are averaged, if any."""
    train = config.train
    return max(1, train.max_steps - train.swa_steps + 1) if train.swa_steps else None


def swa_holds(config: RunConfig, step: int) -> int | None:
    """The first step of the running mean that is held after `step`, if one is: the last step takes it."""
    first = swa_from(config)
    return first if first and first <= step < config.train.max_steps else None


def check_resumed(
    folder: Path, config: RunConfig, done: int, blended: float = 1.0, averaged: int = 0, mean_from: int | None = None
) -> None:
    """Errors: ValueError for a configuration that the run in `folder` cannot go on with. Its last checkpoint is step
    `done`, whose weights are the mean of `averaged` steps' (0: none) and were blended with alpha `blended`, and which
    holds a running mean from step `mean_from` on."""
    path = folder / "config.json"
    known, now = (_flat(values) for values in (read_object(path, "start the run again"), to_dict(config)))
    for name in SAME:
        for field in [key for key in now if key == name or key.startswith(f"{name}.")]:
            given_up = field == "eval.num_prompts" and now[field] == 0
            if field in known and known[field] != now[field] and not given_up:
                flag = f"--{field.replace('_', '-')}"
                raise ValueError(
                    f"{flag} is {now[field]}, and the run in {folder} was started with {known[field]}: leave {flag} "
                    "out to continue it, or start another run in another --output-dir"
                )
    if config.train.max_steps < done:
        raise ValueError(
            f"--train.max-steps is {config.train.max_steps}, and the run in {folder} has a checkpoint of step {done}: "
            f"give at least {done} (more go on from there)"
        )
    if config.train.max_steps == done and config.train.wise_ft_alpha != blended:
        raise ValueError(
            f"--train.wise-ft-alpha is {config.train.wise_ft_alpha}, but the last step of the run in {folder}, step "
            f"{done}, was saved with {blended}, and none is left to blend after: give --train.max-steps more than "
            f"{done}, or --train.wise-ft-alpha {blended}"
        )
    given, last = config.train.swa_steps, config.train.max_steps
    if last == done and given != averaged:
        raise ValueError(
            f"--train.swa-steps is {given}, but the last step of the run in {folder}, step {done}, was saved with "
            f"{averaged}, and none is left to average: give --train.max-steps more than {done}, or --train.swa-steps "
            f"{averaged}"
        )
    if last > done and (first := swa_from(config)) and first <= done and first != mean_from:
        held = f"holds a mean from step {mean_from} on" if mean_from else "holds no mean"
        raise ValueError(
            f"--train.swa-steps is {given}: with --train.max-steps {last} the mean begins at step {first}, but the "
            f"last checkpoint of the run in {folder}, step {done}, {held}: give --train.swa-steps at most {last - done}"
        )


def check_prompts_per_step(folder: Path, config: RunConfig, processes: int, known: int | None) -> None:
    """Errors: ValueError where a step would draw another number of prompts than the `known` one of the run's last
    checkpoint: which prompts a step draws is counted from the first."""
    own = config.rollout.num_prompts
    if known is None or own * processes == known:
        return
    fix = f"give {known // processes}" if known % processes == 0 else "take a number of processes that divides it"
    raise ValueError(
        f"--rollout.num-prompts is {own} on {processes} process{'es' * (processes > 1)}, and the run in {folder} draws "
        f"{known} prompts a step: {fix}, or start another run in another --output-dir"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": (1, 2)}} -> {"a.b": [1, 2]}, as JSON would give it back."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def write_config(path: Path, config: RunConfig, command: str) -> None:
    """Atomically; a resumed run keeps the command that started it and lists the later ones."""
    told = about(command)
    if path.exists():
        known = read_object(path, "start the run again")
        told["resumed"] = [*known.get("resumed", []), command]
        told["command"] = known.get("command", command)
    with whole(path) as partial:
        partial.write_text(json.dumps(to_dict(config) | told, indent=1) + "\n", encoding="utf-8")


def read_evaluation(folder: Path, name: str) -> dict[str, Any] | None:
    """A summary that an earlier call of the run wrote; None where there is none.

    Errors: ValueError for a damaged one.
    """
    path = folder / "evaluation" / f"{name}.json"
    return read_object(path, "remove it, and --resume evaluates again") if path.exists() else None


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The object in a JSON file of a run. Errors: ValueError that names the file, and the fix."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        told = f"it holds a {type(found).__name__}, not an object"
    except ValueError as error:
        found, told = None, str(error)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged ({told}): {fix}")
    return found
