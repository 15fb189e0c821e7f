"""Metrics out: metrics.jsonl always, and any of accelerate's trackers beside it.

In: one flat dict per step, names as in TRL. Out: a line of metrics.jsonl, flushed, and the same to TensorBoard and
others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, on_main_process

from openunirl.disk import naming, whole


class JsonlTracker(GeneralTracker):
    """Appends rows to metrics.jsonl. On resuming, rows after the checkpoint's step are dropped first."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        if last_step is not None and path.exists() and PartialState().is_main_process:
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last_step]
            with whole(path) as partial:
                partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The run directory has config.json already."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _step_of(line: str) -> float:
    """A line cut short by a kill counts as after every step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
