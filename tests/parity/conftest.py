"""Where the golden data lies: OPENUNIRL_GOLDEN, or tests/golden."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(os.environ.get("OPENUNIRL_GOLDEN", Path(__file__).parent.parent / "golden"))
