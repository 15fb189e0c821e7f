"""Where a result comes from: the commit, the versions, the command. Goes into every config.json and benchmark table."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ABOUT_A_RUN = ("command", "commit", "versions", "resumed")
"""What a run's config.json holds beside its RunConfig: `about`, and the commands that resumed it."""

_PACKAGES = ("openunirl", "torch", "transformers", "accelerate", "numpy")


def commit() -> str | None:
    """The source tree's commit ("-dirty" appended where files differ from it), or None outside a git checkout."""
    place = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*place, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    changed = subprocess.run([*place, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return found.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def about(command: str) -> dict[str, Any]:
    """{"command", "commit", "versions"}."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    return {"command": command, "commit": commit(), "versions": versions}
