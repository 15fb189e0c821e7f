"""Damaged networks that judge, summaries, results and journals: kinds of benchmarks/damaged_inputs.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from damage import Rng, damaged_bytes, damaged_json, damaged_lines
from openunirl.compare import write_comparison
from openunirl.compare_sources import read_sources
from openunirl.evaluation.color import ClipColors
from openunirl.evaluation.detectors import Mask2FormerDetector
from openunirl.evaluation.geneval import judge_pictures
from openunirl.evaluation.judges import JUDGES, PhotoJudge
from openunirl.evaluation.kept import Kept, place_of, write_picture
from openunirl.evaluation.llm_judge import ChatModel
from openunirl.evaluation.run import summarize_rows
from openunirl.models.protocol import bundled, load_model
from openunirl.tasks.geneval import COLORS, evaluation_prompts
from openunirl.tasks.records import write_jsonl
from openunirl.types import AnswerSampling, ImageQuestion, Images, ImageSampling

Row = dict[str, Any]
JOBS = {(index, sample): (index, sample) for index in range(2) for sample in range(2)}


class EvaluationInputs:
    """Sound inputs, made once, and for each kind a function that damages one and reads it, and returns "sound" or
    "skip", or raises."""

    def __init__(self, place: Path):
        self.place, self.file = place, place / "input"
        self.noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        self.told = [_result(index, sample) for index, sample in JOBS]
        self.summary_of_told = summarize_rows(self.told, self.told, "oracle", seed=0, sampling={"num_timesteps": 8})
        for name in ("a", "b"):
            for index, _ in JOBS:
                (place / name / "evaluation" / f"{index:05d}" / "samples").mkdir(parents=True, exist_ok=True)
            write_jsonl(place / name / "evaluation" / "results.jsonl", self.told)
            write_jsonl(place / name / "evaluation" / "references.jsonl", self.told)
            (place / name / "evaluation.json").write_text(json.dumps(self.summary_of_told))
            for job in JOBS:
                write_picture(place_of(place / name / "evaluation", *job), _picture(job))

    # ------------------------------------------------------------------------------------------------ networks

    def _networks(self) -> tuple[Path, Path]:
        """Small ones, as the tests make them."""
        detector, clip = self.place / "mask2former", self.place / "clip"
        if not detector.exists():
            sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
            from photo_checkpoints import save_clip, save_mask2former

            save_mask2former(detector)
            save_clip(clip, words=("red", "blue"))
        return detector, clip

    def _damaged_network(self, whole: Path, rng: Rng) -> Path:
        """A copy with a file gone or damaged, or with a weight renamed or of another shape; the others are links."""
        copy = self.place / "network"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy, copy_function=lambda source, target: os.symlink(os.path.realpath(source), target))
        file, kind = rng.choice([each for each in sorted(copy.rglob("*")) if each.is_file()]), rng.randrange(4)
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
        if file.suffix == ".safetensors" and kind < 2:
            state = load_file(file)
            name = rng.choice(sorted(state))
            value = state.pop(name)
            renamed = {name + "s": value} if rng.random() < 0.5 else {name: torch.zeros(rng.randint(1, 5))}
            save_file(state | renamed, file, metadata={"format": "pt"})
        elif file.suffix == ".json" and kind < 2:
            told = json.loads(content)
            file.write_text(json.dumps(extreme(told, rng) if rng.random() < 0.5 else damaged_json(told, rng)))
        elif kind == 2:
            file.unlink()
        else:
            file.write_bytes(damaged_bytes(content, rng))
        return copy

    def detector(self, rng: Rng) -> str:
        """What is checked before drawing, and then the networks themselves, on noise."""
        whole, clip = self._networks()
        place = str(self._damaged_network(whole, rng))
        JUDGES["mask2former"](place, str(clip)).check()
        record = evaluation_prompts()[0].metadata()
        judge = PhotoJudge(Mask2FormerDetector(place), ClipColors(str(clip)))
        (verdict,) = judge_pictures(judge, [record], [self.noise])
        assert verdict.correct or verdict.reason
        return "sound"  # a number may be another number

    def color_classifier(self, rng: Rng) -> str:
        from openunirl.types import Detection

        detector, whole = self._networks()
        place = str(self._damaged_network(whole, rng))
        JUDGES["mask2former"](str(detector), place).check()
        (color,) = ClipColors(place).colors(self.noise, [Detection(box=(0, 0, 20, 24), score=1.0)], "bus")
        assert color in COLORS
        return "sound"

    def janus_folder(self, rng: Rng) -> str:
        return self._drawn_and_asked("tiny-janus", rng)

    def showo_folder(self, rng: Rng) -> str:
        return self._drawn_and_asked("tiny-showo", rng)

    def _drawn_and_asked(self, name: str, rng: Rng) -> str:
        """Loaded, one picture drawn, one question answered."""
        bundle = bundled(name)
        assert bundle is not None
        model = load_model(self._damaged_network(Path(bundle), rng))
        seeds = torch.zeros(1, dtype=torch.int64)
        drawn = model.sample_images(["a red circle"], seeds, ImageSampling(num_timesteps=2))
        assert drawn.tokens_BN.shape == (1, model.num_image_tokens) and bool(drawn.logprobs_BN.isfinite().all())
        assert bool((drawn.tokens_BN < model.num_codes).all() and (drawn.tokens_BN >= 0).all())
        images = Images(tokens_BN=drawn.tokens_BN)
        assert bool(model.decode(images).isfinite().all())
        asked = [ImageQuestion(image=0, question="what color is the circle?")]
        told = model.sample_answers(images, asked, seeds, AnswerSampling(max_new_tokens=2))
        assert len(told.texts) == 1
        return "sound"

    def chat_model(self, rng: Rng) -> str:
        """Made, and asked for one reply."""
        self._networks()  # makes the import possible
        from photo_checkpoints import save_chat

        whole = self.place / "chat"
        if not whole.exists():
            save_chat(whole)
        (reply,) = ChatModel(str(self._damaged_network(whole, rng))).replies(["a well"])
        assert isinstance(reply, str)
        return "sound"

    # -------------------------------------------------------------------------------------- what `report` reads

    def summary(self, rng: Rng) -> str:
        """evaluation.json; what of it cannot be used is "-" in the table, or told."""
        damaged: Any = self.summary_of_told
        for _ in range(rng.randint(1, 3)):
            damaged = damaged_json(damaged, rng)
        content = json.dumps(damaged).encode()
        (self.place / "b" / "evaluation.json").write_bytes(
            damaged_bytes(content, rng) if rng.random() < 0.3 else content
        )
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            page = write_comparison([self.place / "a", self.place / "b"], self.place / "page.html")
        numbers = json.loads(page.with_suffix(".json").read_text())
        assert numbers["sides"] == ["a", "b"] and all(note in printed.getvalue() for note in numbers["notes"][:10])
        lost = any(line["levels"][0] and not line["levels"][1] for line in numbers["lines"])
        return "skip" if lost or numbers["notes"] else "sound"

    def geneval_results(self, rng: Rng) -> str:
        """The results.jsonl of GenEval's own tool: every line is a row or told."""
        names = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")
        file = self.place / "theirs.jsonl"
        file.write_bytes(damaged_lines([{name: row[name] for name in names} for row in self.told], rng))
        problems: list[str] = []
        (_, theirs), _ = read_sources([self.place / "a", file], problems)
        lines = sum(bool(line.strip()) for line in file.read_bytes().splitlines())
        told = any("skipped" in problem for problem in problems)
        assert told or len(theirs.generated) == lines, f"{lines} lines, {len(theirs.generated)} rows, and not a word"
        assert theirs.summary["geneval"]["n"] == len(theirs.generated) > 0
        return "skip" if told else "sound"

    # --------------------------------------------------------------------- what `evaluate MODEL` goes on from

    def drawn_journal(self, rng: Rng) -> str:
        """Of the shapes world: a damaged picture is drawn again, a damaged row is an error or made again."""
        folder = self.place / "drawn"
        shutil.rmtree(folder, ignore_errors=True)
        before = _drawn(Kept(folder), self.told)
        journal = folder / "journal" / "drawing" / "process-0000.jsonl"
        place = place_of(folder / "evaluation", *rng.choice(list(JOBS)))
        if own := rng.random() < 0.5:
            rows = [json.loads(line) for line in journal.read_text().splitlines()]
            journal.write_bytes(damaged_lines(rows, rng))
        else:
            place.write_bytes(damaged_bytes(place.read_bytes(), rng))
        kept = Kept(folder)
        after = _drawn(kept, self.told)
        assert [(row["index"], row["sample"]) for row in after] == list(JOBS)
        assert own or after == before, "another row than that of the picture"
        assert np.array_equal(kept.pictures(list(JOBS)), np.stack([_picture(job) for job in JOBS]))
        return "sound"


def extreme(value: Any, rng: Rng) -> Any:
    """With one of its numbers, however deep, exchanged for one that no network has."""
    places: list[tuple[Any, Any]] = []

    def look(inner: Any) -> None:
        for key, part in inner.items() if isinstance(inner, dict) else enumerate(inner):
            if isinstance(part, dict | list):
                look(part)
            elif isinstance(part, int | float):
                places.append((inner, key))

    changed = json.loads(json.dumps(value))
    look(changed)
    if places:
        inner, key = rng.choice(places)
        inner[key] = rng.choice((-3, 0, 1, 3, 10**7, 2**31, 2**63, 1e300, -0.5))
    return changed


def _result(index: int, sample: int) -> Row:
    """As `evaluate MODEL` writes it; half of them are right."""
    right = (index + sample) % 2 == 0
    metadata = evaluation_prompts()[index].metadata()
    row: Row = {
        "filename": f"{index:05d}/samples/{sample:04d}.png",
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
    }
    row |= {"question": "what is it?", "expected": "bench", "answer": "bench", "answer_correct": True, "settled": True}
    row |= {"correct": right, "reason": "" if right else "expected bench>=1, found 0", "metadata": json.dumps(metadata)}
    return row | {"details": "{}", "index": index, "sample": sample, "objects": 1, "digest": f"{index}{sample}"}


def _picture(job: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(job).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def _drawn(kept: Kept, rows: list[Row]) -> list[Row]:
    """As draw_and_judge does it."""

    def make(missing: list[tuple[int, int]]) -> Iterator[list[Row]]:
        for job in missing:
            kept.keep(job, _picture(job))
            yield [row for row in rows if (row["index"], row["sample"]) == job]

    report: Callable[[str, int, int], None] = lambda stage, done, total: None  # noqa: E731
    return kept.rows("drawing", JOBS, make, report, drawn=True)
