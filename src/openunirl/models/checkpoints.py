"""Reads weights from a folder, a file or a hub id; writes safetensors. No pickle is ever executed.

In: a path or hub id, in the official layout (`.safetensors`, or `.bin`/`.pth` read with weights_only=True, sharded or
not). Out: a flat state dict. Loading is strict: missing, extra and mis-shaped weights are named in one error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from openunirl.disk import whole
from openunirl.run_directory import read_object


class UnreadableWeights(ValueError):
    """A weight file is damaged: its content is not what was written."""


_PATTERNS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
_BESIDE = ("*.json", "*.txt", "*.jinja", "README.md")
"""What lies beside the weights on the hub: configurations, tokenizers, a chat template, the model card."""

MOST_LAYERS = 1000
"""Of one stack, as a configuration tells them."""
_DEPTHS = re.compile(
    r"(?:\w+_)?layers|(?:n|num|\w+_num)_layer|(?:num_|encoder_|decoder_)?depths?|num_(?:res_|residual_)?blocks|"
    r"num_feature_levels"
)
"""How fields are called that count layers; others, such as num_levels of a codebook, may be any number."""

Net = TypeVar("Net", bound=nn.Module)


def resolve(source: str | Path) -> Path:
    """A local path as it is; anything else is taken for a hub id and downloaded (or found in the local cache)."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise ValueError(f"no such file or folder: {source} (a hub id has the form owner/name)")
    try:
        return Path(snapshot_download(str(source), allow_patterns=[*_BESIDE, *_PATTERNS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{source} is neither a local path nor a hub id that can be reached: {reason}") from None


def weight_files(path: Path, stem: str | None = None) -> list[Path]:
    """The weight files of a folder, safetensors preferred. `stem` narrows to files whose name starts with it."""
    if path.is_file():
        return [path]
    for pattern in _PATTERNS:
        found = sorted(p for p in path.glob(pattern) if stem is None or p.name.startswith(stem))
        if found:
            return found
    wanted = f"{stem}*" if stem else "weights"
    raise ValueError(f"{path} holds no {wanted} file ({', '.join(_PATTERNS)})")


def read_state(path: Path, stem: str | None = None, *, keep_dtype: bool = False) -> dict[str, torch.Tensor]:
    """All weights of a file or folder in float32 (integers, or all with `keep_dtype`, as they are stored). Under
    `torch.device("meta")` their shapes only: no number is read.

    Errors: UnreadableWeights.
    """
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(path, stem):
        try:
            part = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
        except Exception as error:  # damaged files raise many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, LookupError | TypeError | AttributeError):  # the reader's own words tell nothing
                reason = "its parts do not fit together"
            raise UnreadableWeights(
                f"{file} cannot be read as weights: {reason}; it is damaged or was copied in part: get it again"
            ) from None
        state |= part
    return {k: v.float() if v.is_floating_point() and not keep_dtype else v for k, v in state.items()}


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    if torch.get_default_device().type != "meta":
        return load_file(file)
    shapes: dict[str, torch.Tensor] = {}
    with safe_open(file, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - it is no dict
            part = stored.get_slice(name)
            dtype = torch.float32 if "F" in part.get_dtype() else torch.int64
            shapes[name] = torch.empty(part.get_shape(), dtype=dtype)
    return shapes


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    loaded: Any = torch.load(file, map_location=torch.get_default_device(), weights_only=True)
    for wrapper in ("state_dict", "module", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise ValueError("it is not a flat table of tensors")
    return loaded


def load_strictly(
    module: nn.Module, state: Mapping[str, torch.Tensor], source: object, optional: tuple[str, ...] = ()
) -> None:
    """Loads `state`. The keys `optional` may be missing.

    Errors: ValueError as check_fit; UnreadableWeights where a weight is not finite.
    """
    check_fit(module, state, source, optional)
    for name, weight in state.items():
        if weight.is_floating_point() and not weight.is_meta and not bool(weight.isfinite().all()):
            raise UnreadableWeights(
                f"the weight {name} of {source} is not finite, so every result would be worthless: take a checkpoint "
                "that was saved earlier, or get the file again"
            )
    module.load_state_dict(dict(state), strict=False)


def build(
    make: Callable[[], Net],
    state: Mapping[str, torch.Tensor],
    source: object,
    sizes: object,
    optional: tuple[str, ...] = (),
) -> Net:
    """The network that `make` makes of what the file `sizes` says, with the weights `state`; memory is taken for it
    once names and shapes are known to fit.

    Errors: as load_strictly's; and ValueError that names `sizes` where no network can be made.
    """
    check_sizes(make, state, source, sizes, optional)
    with _that_can_be(sizes):
        net = make()
    load_strictly(net, state, source, optional)
    return net


def check_sizes(
    make: Callable[[], nn.Module],
    state: Mapping[str, torch.Tensor],
    source: object,
    sizes: object,
    optional: tuple[str, ...] = (),
) -> None:
    """That the network can be made, and that the weights fit it; takes no memory. Errors: `build`'s."""
    with _that_can_be(sizes), torch.device("meta"):
        planned = make()
    check_fit(planned, state, source, optional)


def check_fit(
    module: nn.Module, state: Mapping[str, torch.Tensor], source: object, optional: tuple[str, ...] = ()
) -> None:
    """ValueError saying which weights are missing, extra or mis-shaped; the module may be on the meta device."""
    own = module.state_dict()
    missing = [k for k in own if k not in state and k not in optional]
    extra = [k for k in state if k not in own]
    wrong = [
        f"{k} is {list(state[k].shape)}, wanted {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or extra or wrong:
        told = [
            f"{n}: {_some(names)}"
            for n, names in (("missing", missing), ("extra", extra), ("wrong shape", wrong))
            if names
        ]
        raise ValueError(
            f"the weights of {source} do not fit {type(module).__name__}; {'; '.join(told)}. They are incomplete, or "
            "of another model or size: get them again, or give the files that belong together"
        )


@contextmanager
def telling(source: object, fix: str) -> Iterator[None]:
    """Inside it a ValueError gets the name of the source, and the fix."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}; {fix}") from error


def read_tokenizer(folder: Path, kind: Any, flag: str = "--model.tokenizer") -> Any:
    """The text tokenizer in a folder, read by one of transformers' classes; `flag` names another on the command line.

    Errors: ValueError where there is none, or a damaged one."""
    fix = f"name a folder or hub id that holds one with {flag}"
    if not folder.is_dir():
        raise ValueError(f"there is no tokenizer folder {folder}: {fix}")
    try:
        tokenizer = kind.from_pretrained(folder)
        tokenizer("a")  # what is damaged in its limits shows at the first text
        return tokenizer
    except Exception as error:  # damaged files raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, LookupError | TypeError | AttributeError):  # the reader's own words tell nothing
            reason = "its files hold something else than transformers expects"
        raise ValueError(f"{folder} holds no tokenizer that can be read ({reason}): {fix}") from error


def _some(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def config_file(path: Path) -> Path:
    """Where config.json lies: in the folder, or beside the file."""
    return (path if path.is_dir() else path.parent) / "config.json"


def read_config(path: Path) -> dict[str, Any]:
    """config.json beside the weights, or {} where there is none. Errors: ValueError for a damaged one."""
    file = config_file(path)
    return read_object(file, "repair it, or get it again") if file.exists() else {}


def read_sizes(kind: Any, fields: Mapping[str, Any], source: object) -> Any:
    """One of transformers' configuration classes from the fields of a config.json.

    Errors: ValueError that names the source, and the field whose value cannot be."""
    check_depths(fields, source)
    with _that_can_be(source):
        return kind.from_dict(dict(fields))


@contextmanager
def _that_can_be(source: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers and torch raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{source} has a field that cannot be ({reason}): correct it, or get the file again") from None


def check_depths(fields: Any, source: object) -> None:
    """Errors: ValueError for a number of layers that no network has: building them would never end."""
    if isinstance(fields, list | tuple):
        for part in fields:
            check_depths(part, source)
    for name, value in fields.items() if isinstance(fields, Mapping) else ():
        check_depths(value, source)
        numbers = value if isinstance(value, list | tuple) else [value]
        most = max((number for number in numbers if isinstance(number, int)), default=0)
        if _DEPTHS.fullmatch(str(name)) and most > MOST_LAYERS:
            raise ValueError(
                f"{source} has a field that cannot be ({name} is {most!s:.80}, and {MOST_LAYERS} layers are the most "
                "that are built): correct it, or get the file again"
            )


def write_state(file: Path, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Writes contiguous CPU copies, floats cast to `dtype` when given; whole or not at all.

    Errors: OSError that names the file, where the disk refuses it.
    """
    cast = {k: v.to(dtype) if dtype is not None and v.is_floating_point() else v for k, v in state.items()}
    held = {k: v.detach().cpu().contiguous() for k, v in cast.items()}
    with whole(file) as partial:
        save_file(held, partial, metadata={"format": "pt"})
