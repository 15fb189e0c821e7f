"""An evaluation on disk, in GenEval's own layout, so that anyone can score the images again.

In: an Evaluation. Out: NAME.json (the summary) and NAME/ with 00000/samples/0000.png, 00000/metadata.jsonl, ...,
results.jsonl (one line per image, GenEval's fields and ours) and references.jsonl (one line per reference image).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from openunirl.disk import remove, whole
from openunirl.evaluation.kept import place_of
from openunirl.evaluation.run import Evaluation
from openunirl.tasks.records import write_jsonl
from openunirl.types import Prompt


def write_evaluation(folder: Path, name: str, evaluation: Evaluation, prompts: Sequence[Prompt]) -> Path:
    """Writes the pictures and rows, then the summary; the summary's presence says that the rest is whole.

    Errors: OSError that names what the disk refused; neither is then there.
    """
    write_pictures(folder, name, evaluation, prompts)
    try:
        return write_summary(folder, name, evaluation.summary)
    except OSError:
        remove(folder / name)
        raise


def write_pictures(folder: Path, name: str, evaluation: Evaluation, prompts: Sequence[Prompt]) -> None:
    """The folder NAME alone, whole or not at all."""
    with whole(folder / name) as partial:
        for row, picture in zip(evaluation.generated, evaluation.pictures, strict=True):
            place = place_of(partial, row["index"], row["sample"])
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place)
        for index, prompt in enumerate(prompts):
            write_jsonl(partial / f"{index:05d}" / "metadata.jsonl", [prompt.metadata()])
        write_rows(partial, evaluation)


def write_rows(folder: Path, evaluation: Evaluation) -> None:
    """results.jsonl and references.jsonl, beside the pictures; each whole or not at all."""
    own = [
        {"filename": place_of(Path(), row["index"], row["sample"]).as_posix(), **row} for row in evaluation.generated
    ]
    write_jsonl(folder / "results.jsonl", own)
    write_jsonl(folder / "references.jsonl", evaluation.references)


def write_summary(folder: Path, name: str, summary: dict[str, Any]) -> Path:
    """NAME.json, atomically. Errors: OSError that names it, where the disk refuses it."""
    path = folder / f"{name}.json"
    with whole(path) as partial:
        partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return path
