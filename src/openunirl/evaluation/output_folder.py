"""The --output-dir of `openunirl evaluate MODEL`, in either world: made by this very evaluation, or refused.

In: the settings that its rows depend on, and those that its pictures do. Out: settings.json, evaluation/generate.json
and the prompts' records; or a ValueError that names what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openunirl.disk import is_occupied
from openunirl.evaluation.files import write_summary
from openunirl.generate import check_folder, check_settings, open_folder
from openunirl.models.protocol import UnifiedModel
from openunirl.provenance import about

_SETTINGS = "settings"  # .json


@dataclass(frozen=True, kw_only=True)
class OutputFolder:
    """Example: OutputFolder(path=Path("base"), settings={"dtype": "float32"}, drawing=drawing_settings(...))"""

    path: Path
    settings: Mapping[str, Any]
    drawing: Mapping[str, Any]
    """As generate.drawing_settings has them."""

    @property
    def pictures(self) -> Path:
        return self.path / "evaluation"

    def check(self) -> None:
        """Before anything else is read; an evaluation.json of before is then gone, so that none outlives an error.
        Errors: ValueError for a folder of another evaluation or of something else, which is left as it is."""
        known = self.path / f"{_SETTINGS}.json"
        if known.exists():
            check_settings(known, self.settings, made=self.path, flag="--output-dir")
        elif is_occupied(self.path):
            raise ValueError(f"{self.path} exists, is not empty and holds no {known.name}: choose another --output-dir")
        check_folder(self.pictures, self.drawing)
        (self.path / "evaluation.json").unlink(missing_ok=True)

    def open(self, model: UnifiedModel, *, command: str) -> None:
        """One process does it, before anything is drawn. Errors: as `check`, with the weights compared, too; ValueError
        for a prompt that is too long."""
        if not (self.path / f"{_SETTINGS}.json").exists():
            write_summary(self.path, _SETTINGS, dict(self.settings) | about(command))
        open_folder(model, self.pictures, dict(self.drawing), command=command)
