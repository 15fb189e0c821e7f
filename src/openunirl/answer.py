"""`openunirl answer MODEL`: pictures and questions in, answers out, as JSON lines.

    files, folders, questions or a question file -> jobs -> {"image", "question", "answer"}, one line each

In: a model, pictures, questions. Out: rows in the order of the jobs, on stdout or in a file. The file is written row by
row beside FILE.settings.json; the same call continues it: rows that are there stay as they are, and a half-written last
line is dropped and answered again. A call with another model, temperature, length or seed is refused.

Departures from the official scripts: 1. many questions at once, those on one picture sharing its prefix; 2. pictures of
more than 8 bits a channel are refused, because a conversion would cut off their light parts without a word.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from openunirl.config import ModelConfig
from openunirl.disk import naming
from openunirl.draws import key
from openunirl.evaluation.files import write_summary
from openunirl.evaluation.image_folder import read_picture as decode_picture
from openunirl.generate import best_device, check_numbers, check_settings, fingerprint, progress_bar, text_of
from openunirl.models.protocol import UnifiedModel, load_model
from openunirl.notices import warn
from openunirl.provenance import about
from openunirl.tasks.records import read_jsonl
from openunirl.types import AnswerSampling, ImageQuestion
from openunirl.validate_model import unknown_words

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What counts as a picture in a folder; a file that is named itself may be called anything."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One question on one picture; `number` keys its draws, `image` is its name in the row.

    Example: Job(number=0, image="dir/a.png", file=Path("dir/a.png"), question="what color is the circle?")
    """

    number: int
    image: str
    file: Path
    question: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.image, self.question


def answer(
    model: ModelConfig,
    images: Sequence[str] | Path,
    *,
    questions: Sequence[str],
    output: Path | None,
    sampling: AnswerSampling,
    seed: int,
    batch_size: int,
    command: str = "",
) -> None:
    """Answers what `output` (None: stdout) lacks; a Path is a question file.

    Errors, all before anything is answered: ValueError for a number out of range, a picture or question that is not
    there, a bad question file ("file:line: ..."), and a file that was written with other settings or by something else.
    """
    check_numbers(at_least_one={"max-new-tokens": sampling.max_new_tokens, "batch-size": batch_size}, seed=seed)
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(f"--temperature is {sampling.temperature}, wanted 0 (the most likely tokens) or more")
    for number, question in enumerate(questions, start=1):
        text_of({"question": question}, "question", f"--questions, number {number}")
    jobs = read_questions(images) if isinstance(images, Path) else ask_about(images, questions)
    for file in dict.fromkeys(job.file for job in jobs):
        _open(file).close()
    settings: dict[str, Any] = {"model": asdict(model), "sampling": asdict(sampling), "seed": seed}
    if output is not None:
        _check_output(output, settings)  # now, because loading takes its time; and again with the weights
    adapter = load_model(model).to(best_device())
    settings["weights"] = fingerprint(adapter)
    done: set[tuple[str, str]] = set()
    if output is not None:
        _check_output(output, settings)
        done = _answered(output)
        if not output.exists():
            known = _settings_of(output)
            write_summary(known.parent, known.stem, settings | about(command))
    missing = [job for job in jobs if job.pair not in done]
    origin = str(images) if isinstance(images, Path) else "--questions" if questions else "the prompts' questions"
    for told in unknown_words(adapter, model.weights, (job.question for job in missing), origin):
        warn(told)
    console = Console(stderr=True)
    with (
        progress_bar(console, disable=output is None and sys.stdout.isatty()) as progress,  # rows there show it, too
        nullcontext(sys.stdout) if output is None else open(output, "a", encoding="ascii", newline="\n") as file,
    ):
        bar = progress.add_task("answering", total=len(jobs), completed=len(jobs) - len(missing))
        for rows in answer_jobs(adapter, missing, sampling, seed=seed, batch_size=batch_size):
            with nullcontext() if output is None else naming(output):
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
            progress.advance(bar, len(rows))
    console.print(
        f"{len(missing)} questions answered, {len(jobs) - len(missing)} were answered before", highlight=False
    )


def answer_jobs(
    model: UnifiedModel, jobs: Sequence[Job], sampling: AnswerSampling, *, seed: int, batch_size: int
) -> Iterator[list[dict[str, str]]]:
    """The rows of `batch_size` jobs at a time. Errors: ValueError for a picture that cannot be read."""
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        files = list(dict.fromkeys(job.file for job in part))
        images = model.read_pictures([read_picture(file) for file in files])
        asked = [ImageQuestion(image=files.index(job.file), question=job.question) for job in part]
        seeds_Q = key(seed, torch.tensor([job.number for job in part]))
        texts = model.sample_answers(images, asked, seeds_Q, sampling).texts
        told = zip(part, texts, strict=True)
        yield [{"image": job.image, "question": job.question, "answer": text} for job, text in told]


# -------------------------------------------------------------------------------------------- what is asked


def ask_about(images: Sequence[str], questions: Sequence[str]) -> list[Job]:
    """Every question on every picture, picture by picture; without questions, GenEval-layout prompts' own.

    Errors: ValueError for a path without a picture, or a picture without a question.
    """
    pairs = [
        (file.as_posix(), file, question)
        for name in images
        for file in _pictures(Path(name))
        for question in (questions or [_own_question(file)])
    ]
    return _jobs(pairs)


def read_questions(path: Path) -> list[Job]:
    """The jobs of a question file: JSON objects with "image", a path relative to the file, and "question"; any further
    keys are left alone. Errors: ValueError "file:line: what is wrong"."""
    pairs = []
    for number, row in enumerate(read_jsonl(path), start=1):
        place = f"{path}:{number}"
        image, question = text_of(row, "image", place), text_of(row, "question", place)
        if not (path.parent / image).is_file():
            raise ValueError(f"{place}: there is no picture {path.parent / image}; paths are relative to the file")
        pairs.append((image, path.parent / image, question))
    return _jobs(pairs)


def _jobs(pairs: Iterable[tuple[str, Path, str]]) -> list[Job]:
    """Jobs in order; what is asked twice is answered once."""
    distinct = {(image, question): file for image, file, question in pairs}
    return [
        Job(number=number, image=image, file=file, question=question)
        for number, ((image, question), file) in enumerate(distinct.items())
    ]


def _pictures(place: Path) -> list[Path]:
    """The file itself, or a folder's pictures: in GenEval's layout by prompt and sample, else by name."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ValueError(f"there is no picture or folder {place}")
    prompts = [folder for folder in place.iterdir() if folder.name.isdecimal() and (folder / "samples").is_dir()]
    folders = [folder / "samples" for folder in sorted(prompts, key=lambda f: int(f.name))] or [place]
    found = [
        file
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in PICTURES and not file.name.startswith(".")
    ]
    if not found:
        raise ValueError(f"{place} holds no pictures ({' '.join(PICTURES)}), nor GenEval's 00000/samples folders")
    return found


def _own_question(file: Path) -> str:
    """The question of the prompt that a picture in GenEval's layout belongs to."""
    metadata = file.parent.parent / "metadata.jsonl"
    if file.parent.name != "samples" or not metadata.is_file():
        raise ValueError(f'{file} has no question of its own: give --questions "..." or --question-file FILE')
    row = read_jsonl(metadata)[0]
    if "question" not in row:
        raise ValueError(f'{metadata} holds no question: give --questions "..."')
    return text_of(row, "question", f"{metadata}:1")


# ------------------------------------------------------------------------------------------------ pictures


def read_picture(file: Path) -> Image.Image:
    """The picture in RGB, of its own size, as the detector sees it. Errors: ValueError naming the file."""
    try:
        return Image.fromarray(decode_picture(file)[1])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _open(file: Path) -> Image.Image:
    """Reads the header only."""
    try:
        picture = Image.open(file)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.strerror:  # such as no permission, with the file's name
            raise
        raise ValueError(f"{file} cannot be read as a picture: {error}") from None
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        picture.close()
        raise ValueError(f"{file} has more than 8 bits a channel (mode {picture.mode}): convert it to 8 bits first")
    return picture


# ------------------------------------------------------------------------------------------- an output file


def _settings_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.settings.json")


def _check_output(output: Path, settings: dict[str, Any]) -> None:
    """Errors: ValueError for a file that is not ours or was written with other settings."""
    known = _settings_of(output)
    if output.exists() and (output.is_dir() or not known.exists()):
        raise ValueError(f"{output} exists and there is no {known.name} beside it: choose another --output")
    if output.exists():
        check_settings(known, settings, made=output, flag="--output")


def _answered(output: Path) -> set[tuple[str, str]]:
    """(image, question) of the rows in `output`, whose half-written last line is cut off.

    Errors: ValueError "file:line: ..." where it holds anything but rows.
    """
    content = output.read_bytes() if output.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(output, whole)
    if not whole:
        return set()
    places = {f"{output}:{number}": row for number, row in enumerate(read_jsonl(output), start=1)}
    return {(text_of(row, "image", place), text_of(row, "question", place)) for place, row in places.items()}
