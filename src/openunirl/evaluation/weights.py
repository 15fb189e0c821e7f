"""Networks of transformers that judge: their weights are checked before hours of work, and read whole or not at all.

    folder or hub id -> read_config -> check_whole: every weight is there, in its shape; no number is read
                                    -> load_whole:  the network

In: a folder or hub id in transformers' layout, and the class of the network, or an Auto class that chooses it. Out: the
network, in float32 unless told otherwise; or a ValueError of one line that names the file and the fix.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from openunirl.models.checkpoints import check_depths

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What transformers reads of a folder, the first that is there; it may be in shards, listed in NAME.index.json."""

_PYTHONS = ("invalid literal", "could not convert", "not enough values", "too many values")
"""How ValueErrors begin that transformers did not mean to raise."""


def files_of(folder: Path) -> list[Path]:
    """The weight files that transformers would read, whether they are there or not. Errors: ValueError for a folder
    without any, and for a damaged list of shards."""
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            try:
                shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return [folder / shard for shard in sorted(set(shards))]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{index} is damaged: get it again") from None
    raise ValueError(
        f"{folder} holds no weights, neither {_WEIGHTS[0]} nor {_WEIGHTS[1]}, whole or in shards: get the checkpoint "
        "again"
    )


def check_file(file: Path) -> None:
    """Whether a weight file is whole, by its header or its list of parts. Errors: ValueError."""
    fix = "it is damaged or was copied in part; get it again"
    if not file.is_file():
        raise ValueError(f"{file} is not there, and {file.parent} wants it: get it again")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: {error}; {fix}") from None
    elif not zipfile.is_zipfile(file) and not _is_old(file):
        raise ValueError(f"{file}: the list of its parts is missing; {fix}")


def _is_old(file: Path) -> bool:
    """Whether torch wrote it before it wrote zip files; of these the end tells nothing."""
    with open(file, "rb") as opened:
        return opened.read(2)[:1] == b"\x80"


def check_files(kind: Any, weights: str) -> list[Path]:
    """The weight files of a folder, none of a hub id. Errors: ValueError that names the one that is not there or was
    cut off."""
    place = Path(weights).expanduser()
    if not place.is_dir():
        return []
    try:
        files = files_of(place)
        for file in files:
            check_file(file)
    except ValueError as error:
        raise ValueError(f"{weights} cannot be read as {kind.__name__}: {error}") from None
    return files


def check_whole(kind: Any, weights: str) -> None:
    """Reads the names and shapes of a checkpoint's weights, in the way in which load_whole reads the weights, and no
    number. Errors: as load_whole's."""
    _read(kind, weights, device_map="meta")


def load_whole(kind: Any, weights: str, dtype: torch.dtype | str = torch.float32) -> Any:
    """The network, for inference. Errors: ValueError as check_files; and where a weight is missing or has another
    shape: transformers would draw it at random and say so in a log line."""
    return _read(kind, weights, dtype=dtype).eval().requires_grad_(False)


def _read(kind: Any, weights: str, **options: Any) -> Any:
    files = check_files(kind, weights)
    with _without_reports():
        net, told = pretrained(kind, weights, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    wrong = {name: f", which is {list(own)}, wanted {list(wanted)}" for name, own, wanted in told["mismatched_keys"]}
    absent = [*sorted(told["missing_keys"]), *sorted(wrong)]
    if absent:
        where, first = files[0] if len(files) == 1 else weights, absent[0]
        raise ValueError(
            f"{where} lacks {len(absent)} weights of {type(net).__name__}, such as {first}{wrong.get(first, '')}: take "
            "a whole checkpoint"
        )
    return net


@contextmanager
def _without_reports() -> Iterator[None]:
    """transformers would log in a table what an error is going to say."""
    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 without TF32, whose rounding flips verdicts near a threshold between one GPU and the next.

    Without cuDNN, too: a batch of which the networks hold 6 GB took 38 GB of an H200, probably for the algorithms that
    cuDNN prefers then (found by elimination; without it not run on a GPU yet, docs/performance.md). torch's own
    convolutions need the columns of one picture.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def pretrained(kind: Any, weights: str, **options: Any) -> Any:
    """kind.from_pretrained. Errors: ValueError, in one line, for what is neither there nor reachable nor readable, and
    for a configuration of more layers than any network has."""
    if kind is AutoConfig:  # some configurations make a list of so many layers
        fields, _ = _told(kind, weights, PreTrainedConfig.get_config_dict, {})
        check_depths(fields, weights)
    return _told(kind, weights, kind.from_pretrained, options)


def _told(kind: Any, weights: str, read: Callable[..., Any], options: dict[str, Any]) -> Any:
    """What `read` reads, its errors in one line."""
    try:
        return read(weights, **options)
    except Exception as error:  # damaged files and a missing network raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, AttributeError | IndexError | KeyError | TypeError) or reason.startswith(_PYTHONS):
            reason = f"one of them holds something else than transformers expects ({type(error).__name__})"
        place = "it is a folder, so look at its files" if Path(weights).is_dir() else "give a folder, or a hub id"
        raise ValueError(f"{weights} cannot be read as {kind.__name__} ({place}): {reason}") from None


def read_config(weights: str, model_type: str) -> Any:
    """The checkpoint's configuration. Errors: ValueError for another kind of network, of which transformers would make
    one with random weights."""
    config = pretrained(AutoConfig, weights)
    if config.model_type != model_type:
        raise ValueError(f"{weights} is of the kind {config.model_type!r}, not {model_type!r}: take another checkpoint")
    return config
