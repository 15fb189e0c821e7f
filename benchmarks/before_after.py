"""The README's picture: the same prompts and seeds before (top) and after (bottom) training.

    python benchmarks/before_after.py RUN OUT.png [--columns 12]

Takes the first prompts of the run's evaluation in order, whatever became of them; a green or red bar is the detector's
verdict.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

SCALE, GAP, BAR = 2, 6, 4
GREEN, RED = (46, 160, 67), (207, 34, 46)


def strip(folder: Path, columns: int) -> np.ndarray:
    """One row of pictures, each over its bar: uint8 [H, W, 3]."""
    tiles = []
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()[:columns]:
        row = json.loads(line)
        picture = np.asarray(Image.open(folder / row["filename"]).convert("RGB")).repeat(SCALE, 0).repeat(SCALE, 1)
        bar = np.full((BAR, picture.shape[1], 3), GREEN if row["correct"] else RED, np.uint8)
        tile = np.concatenate([picture, bar])
        tiles += [tile, np.full((len(tile), GAP, 3), 255, np.uint8)]
    return np.concatenate(tiles[:-1], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--columns", type=int, default=12)
    args = parser.parse_args()
    before, after = (strip(args.run / "evaluation" / side, args.columns) for side in ("before", "after"))
    Image.fromarray(np.concatenate([before, np.full((GAP, before.shape[1], 3), 255, np.uint8), after])).save(args.out)


if __name__ == "__main__":
    main()
