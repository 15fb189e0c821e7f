"""`openunirl generate MODEL`: prompts in, pictures out, in GenEval's folder layout.

    prompts or a file -> records -> 00000/metadata.jsonl, 00000/samples/0000.png, ..., and generate.json: the settings

In: a model, prompts, a folder. Out: the files above; each is there whole or not at all, and none is ever written again,
so a call that was interrupted continues, and more pictures per prompt can be asked for later. A call whose settings
differ from generate.json is refused. A picture depends on (seed, prompt index, sample index) and on nothing else (in
another batch its pixels may round differently, by one grey level); evaluation draws the same ones from the same seed.

Shapes: B pictures; H, W pixels, C = 3 colours.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openunirl.config import ModelConfig
from openunirl.disk import is_occupied
from openunirl.draws import key
from openunirl.evaluation.files import write_summary
from openunirl.evaluation.kept import place_of, write_picture
from openunirl.evaluation.run import to_uint8
from openunirl.models.protocol import UnifiedModel, load_model
from openunirl.notices import warn
from openunirl.provenance import about
from openunirl.tasks.records import PROMPT_KEYS, read_jsonl, read_prompts, write_jsonl
from openunirl.types import ImageSampling
from openunirl.validate_model import check_sampling_of, unknown_words

_SETTINGS = "generate"  # .json
_PLACES = ("model.weights", "model.image_tokenizer")


def generate(
    model: ModelConfig,
    prompts: Sequence[str] | Path,
    *,
    output_dir: Path,
    num_images: int,
    seed: int,
    batch_size: int,
    sampling: ImageSampling,
    command: str = "",
) -> Path:
    """Draws what `output_dir` lacks of `num_images` pictures per prompt; a Path is a prompt file. Returns the folder.

    Errors, all before anything is drawn: ValueError for a number out of range, a bad prompt file ("file:line: ..."), a
    prompt that is too long, a sampling that the model cannot follow, and a folder that was made with other settings or
    by something else.
    """
    check_numbers(at_least_one={"num-images": num_images, "batch-size": batch_size}, seed=seed)
    check_sampling(sampling)
    records = read_records(prompts) if isinstance(prompts, Path) else _plain_records(prompts)
    settings = drawing_settings(model, records, seed=seed, sampling=sampling)
    check_folder(output_dir, settings)
    adapter = load_model(model).to(best_device())
    check_sampling_of(adapter, sampling)
    open_folder(adapter, output_dir, settings, command=command)
    texts = (record["prompt"] for record in records)
    for told in unknown_words(
        adapter, model.weights, texts, str(prompts) if isinstance(prompts, Path) else "--prompts"
    ):
        warn(told)
    draw_missing(
        adapter, records, output_dir, num_images=num_images, seed=seed, batch_size=batch_size, sampling=sampling
    )
    return output_dir


def drawing_settings(
    model: ModelConfig, records: Sequence[Mapping[str, Any]], *, seed: int, sampling: ImageSampling
) -> dict[str, Any]:
    """All that a folder's pictures depend on, but the weights."""
    return {"model": asdict(model), "sampling": asdict(sampling), "seed": seed, "prompts": list(records)}


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Errors: ValueError for a folder that was made with other settings or by something else."""
    known = folder / f"{_SETTINGS}.json"
    if known.exists():
        check_settings(known, settings, made=folder, flag="--output-dir")
    elif is_occupied(folder):
        raise ValueError(f"{folder} exists and holds no {known.name}: choose another --output-dir")


def open_folder(model: UnifiedModel, folder: Path, settings: dict[str, Any], *, command: str) -> None:
    """Writes generate.json and the records; one process does it, before any draws. Errors: as check_folder, with the
    weights compared, too; and ValueError for a prompt that is too long."""
    records = settings["prompts"]
    settings = settings | {"weights": fingerprint(model)}
    model.check_prompts([record["prompt"] for record in records])
    check_folder(folder, settings)
    if not (folder / f"{_SETTINGS}.json").exists():
        write_summary(folder, _SETTINGS, settings | about(command))
    for index, record in enumerate(records):
        (folder / f"{index:05d}" / "samples").mkdir(parents=True, exist_ok=True)
        if not (folder / f"{index:05d}" / "metadata.jsonl").exists():
            write_jsonl(folder / f"{index:05d}" / "metadata.jsonl", [record])


def check_sampling(sampling: ImageSampling) -> None:
    """Errors: ValueError that names the flag."""
    for name, value in asdict(sampling).items():
        if not math.isfinite(value):
            raise ValueError(f"--sampling.{name.replace('_', '-')} is {value}, wanted a finite number")
    if sampling.num_timesteps < 1 or sampling.temperature <= 0:
        raise ValueError(
            "--sampling wants num-timesteps >= 1 and temperature > 0; they are "
            f"{sampling.num_timesteps} and {sampling.temperature}"
        )


def draw_missing(
    model: UnifiedModel,
    records: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    sampling: ImageSampling,
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Draws the pictures that are not there; of several processes each takes its share, and the first shows its own."""
    jobs = [(i, k) for i in range(len(records)) for k in range(num_images)][rank::processes]
    missing = [job for job in jobs if not place_of(folder, *job).exists()]
    console = Console(stderr=True)
    with progress_bar(console, disable=rank > 0) as progress:
        bar = progress.add_task(f"drawing{share_of(processes)}", total=len(jobs), completed=len(jobs) - len(missing))
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            seeds_B = key(seed, torch.tensor([i for i, _ in part]), torch.tensor([k for _, k in part]))
            drawn = model.sample_images([records[i]["prompt"] for i, _ in part], seeds_B, sampling)
            for job, picture_HWC in zip(part, to_uint8(model.decode(drawn.images)), strict=True):
                write_picture(place_of(folder, *job), picture_HWC)
            progress.advance(bar, len(part))
    if rank == 0:
        console.print(f"{len(missing)} pictures drawn, {len(jobs) - len(missing)} were there before", highlight=False)


# ----------------------------------------------------------------------------------------------- prompt files


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a prompt file: of .jsonl the objects as they are, of .txt {"prompt": line}.

    Objects need a "prompt" and may hold anything else; a file of nothing but GenEval's fields is read as strictly as
    for training. Errors: ValueError "file:line: what is wrong".
    """
    if path.suffix.lower() == ".txt":
        return [{"prompt": line} for line in _lines(path)]
    if path.suffix.lower() != ".jsonl":
        raise ValueError(
            f"{path}: a prompt file is FILE.jsonl (one JSON object a line) or FILE.txt (one prompt a line)"
        )
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        text_of(row, "prompt", f"{path}:{number}")
    if all({"tag", "include"} <= row.keys() <= set(PROMPT_KEYS) for row in rows):
        read_prompts(path)
    return rows


def _lines(path: Path) -> Iterator[str]:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors begin UTF-8 with a byte order mark
    if not content.strip():
        raise ValueError(f"{path}: the file is empty; it should hold one prompt a line")
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line") from None
        if not text:
            raise ValueError(f"{path}:{number}: the line is blank; delete it")
        yield text


def _plain_records(prompts: Sequence[str]) -> list[dict[str, Any]]:
    for number, prompt in enumerate(prompts, start=1):
        text_of({"prompt": prompt}, "prompt", f"--prompts, number {number}")
    return [{"prompt": prompt} for prompt in prompts]


def text_of(row: Mapping[str, Any], name: str, place: str) -> str:
    """row[name], which has to be a text. Errors: ValueError that begins with `place`."""
    if name not in row:
        raise ValueError(f'{place}: "{name}" is missing')
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f'{place}: "{name}" is {row[name]!r}; it should be a text that is not empty')
    return row[name]


# ------------------------------------------------------------------------------------ shared with `answer`


def check_numbers(*, at_least_one: Mapping[str, int], seed: int) -> None:
    """Errors: ValueError that names the flag."""
    for flag, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"--{flag} is {value}, wanted at least 1")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--seed is {seed}, wanted a number of 64 bits")


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fingerprint(model: UnifiedModel) -> str:
    """fingerprint_of all its weights: a model that was trained on differs, its folder's name may not."""
    return fingerprint_of((*model.net.parameters(), *model.image_tokenizer.parameters()))


def fingerprint_of(weights: Iterable[torch.Tensor]) -> str:
    """16 hex digits of about 1024 values of every weight."""
    digest = hashlib.sha256()
    for weight in weights:
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // 1024)].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def check_settings(file: Path, settings: Mapping[str, Any], *, made: Path, flag: str) -> None:
    """Compares with the settings in `file`, which `made` was made with. Keys that only the file has are not compared,
    and neither are the names of the model and its image tokenizer: their weights speak for them, wherever they lie.

    Errors: ValueError that names what differs and points to `flag`.
    """
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError
    except ValueError:
        raise ValueError(f"{file} is damaged, so {made} cannot be continued: choose another {flag}") from None
    before, now = _flat(known), _flat(settings)
    names = [name for name in now if name not in _PLACES and before.get(name) != now[name]]
    if not names:
        return
    told = [f"{name} {_shown(before.get(name))}, not {_shown(now[name])}" for name in names[:3]]
    if names == ["weights"]:
        old, new = (str(values["model.weights"]) for values in (before, now))
        told = [f"the model {old}, not {new}" if old != new else f"other weights than {new} has now"]
    rest = f" and {len(names) - 3} more differences" if len(names) > 3 else ""
    raise ValueError(f"{made} was made with {'; '.join(told)}{rest}: choose another {flag}, or repeat that call")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2]} -> {"a.b": 1, "number of c": 1, "c 0": 2}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat[f"number of {prefix}{name}"] = len(value)
            flat |= {f"{prefix}{name} {i}": item for i, item in enumerate(value)}
        else:
            flat[prefix + name] = value
    return flat


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def share_of(processes: int) -> str:
    """What a bar adds to its text where it shows the first process's share only. Example: share_of(1) == ""."""
    return f" (process 1 of {processes})" if processes > 1 else ""


def tell_alone(processes: int, does: str) -> None:
    """What the first of several processes does by itself, on stderr. Example: tell_alone(2, "judges the answers")"""
    if processes > 1:
        Console(stderr=True).print(f"only the first of {processes} processes {does}; the others wait", highlight=False)


def progress_bar(console: Console, *, disable: bool = False) -> Progress:
    """rich would send stdout, rows or a folder's name, to the console's stream; so it may not touch it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, redirect_stdout=False, disable=disable)
