"""`openunirl convert`: a checkpoint from the layout of its authors to transformers' own, and back.

    folder, file or hub id -> weights, config, tokenizer -> DST/ (safetensors, config.json, tokenizer, model card)

In: a Show-o or Janus checkpoint, safetensors or `.bin`/`.pth`, sharded or not; or a folder that `save` wrote. Out: a
folder in the other layout. Weights keep their bits and their dtype; what is written was checked against the network.
`hf` is what PhiForCausalLM (Show-o) and JanusForConditionalGeneration (Janus) load with from_pretrained; `official` has
the names of showlab/show-o and of deepseek-ai/Janus.

Departures: 1. a Show-o folder in transformers' layout keeps its own fields under `showo` in config.json, so that it can
go back; 2. no chat template is made up: Janus' roles differ between checkpoints, and stand in config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from huggingface_hub import save_torch_state_dict
from transformers import JanusConfig, JanusForConditionalGeneration, PhiConfig

from openunirl.disk import whole
from openunirl.evaluation.of_model import read_card
from openunirl.models import checkpoints, janus_files, janus_layout, model_card
from openunirl.models.janus_net import sizes_of
from openunirl.models.janus_prompting import read_tokenizer, roles_of
from openunirl.models.showo_net import ShowoNet, ShowoSizes
from openunirl.presets import bundled
from openunirl.run_directory import read_object

Layout = Literal["official", "hf"]
Present = Literal["official", "hf", "own"]  # our folder of a Janus: transformers' names, nothing for its processor
Tensors = Mapping[str, torch.Tensor]

_IMAGE_TOKENIZER = "image_tokenizer.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def convert(
    source: str,
    destination: Path,
    layout: Layout,
    base_model: str | None = None,
    *,
    tokenizer: str | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes `source` into the folder `destination` in `layout`, whole or not at all, and returns the folder.

    source: a folder, a file, a hub id or a bundled model. base_model: the hub id that the model card names; by default
    that of the source's own card, of the run that it is a checkpoint of, or the source itself. tokenizer: a folder or
    hub id, for a source that comes without one.
    Errors: ValueError for a destination that is not empty, a base model that is no hub id, a source that cannot be
    read, is neither Show-o nor Janus or is in that layout already, a weight of another model, and for what the layout
    cannot express.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(get_args(Layout))}")
    if base_model and not model_card.is_hub_id(base_model):
        raise ValueError(f"--base-model is {base_model!r}, wanted a hub id (owner/name): correct it, or leave it out")
    _check_free(destination)
    read = _read(source, tokenizer, base_model)
    family, present = _recognise(read)
    if present == layout:
        raise ValueError(f"{source} is in the {layout} layout of {family.title} already: there is nothing to convert")
    written = family.to_hf(read) if layout == "hf" else family.to_official(read)
    card = model_card.card(
        title=family.title,
        name=read.name,
        base=read.base,
        known=read.card,
        was="openunirl's own" if present == "own" else f"the {present}",
        layout=layout,
        dtypes=", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in read.state.values()})),
        readers=family.readers[layout],
    )
    with _whole(destination) as folder:
        save_torch_state_dict(_unshared(written.state), folder, max_shard_size=max_shard_size)
        for target, file in written.copies.items():
            (folder / target).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / target)
        for target, values in written.json.items():
            (folder / target).parent.mkdir(exist_ok=True)
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            (folder / target).write_text(text, encoding="utf-8")
        card.save(folder / "README.md")
    return destination


# ---------------------------------------------------------------------------------------------- read and write


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What was read from `path`. `card` is what its model card says, `base` what it was made from, `tokenizer` the
    folder of its files, `image_tokenizer` the file that our own folders of a Show-o have beside the language model's;
    None where there are none."""

    name: str
    path: Path
    card: Any
    base: list[str]
    state: dict[str, torch.Tensor]
    config: dict[str, Any]
    tokenizer: Path | None
    image_tokenizer: Path | None

    @property
    def config_file(self) -> Path:
        return checkpoints.config_file(self.path)

    def json(self, file: str, folder: Path | None = None) -> dict[str, Any]:
        """A JSON file beside the weights, {} where there is none. Errors: ValueError for a damaged one."""
        path = (folder or self.config_file.parent) / file
        return read_object(path, "repair it, or get it again") if path.exists() else {}


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What is to be written: weights, JSON files (they replace copies of the same name) and copied files."""

    state: dict[str, torch.Tensor]
    json: dict[str, dict[str, Any]]
    copies: dict[str, Path] = field(default_factory=dict)


def _read(source: str, tokenizer: str | None, base_model: str | None) -> _Source:
    path = checkpoints.resolve(bundled(source) or source)
    folder = path if path.is_dir() else path.parent
    own = path.is_dir() and (folder / _IMAGE_TOKENIZER).exists()
    place = checkpoints.resolve(tokenizer) if tokenizer else folder
    found = [f for f in (place / "tokenizer", place) if (f / "tokenizer_config.json").exists()]
    if tokenizer and not found:
        raise ValueError(f"{tokenizer} has no tokenizer_config.json: name a folder or hub id that holds a tokenizer")
    card = read_card(folder)
    return _Source(
        name=model_card.public_name(source),
        path=path,
        card=card,
        base=[base_model] if base_model else model_card.base_of(source, folder, card),
        state=checkpoints.read_state(path, "model" if own else None, keep_dtype=True),
        config=checkpoints.read_config(path),
        tokenizer=found[0] if found else None,
        image_tokenizer=folder / _IMAGE_TOKENIZER if own else None,
    )


def _recognise(source: _Source) -> tuple[_Family, Present]:
    for family in FAMILIES.values():
        present = family.layout_of(source)
        if present is not None:
            return family, present
    some = ", ".join(list(source.state)[:3])
    raise ValueError(f"{source.name} is no checkpoint of {' or '.join(FAMILIES)}: its weights are called {some}, ...")


def _check_free(destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty folder: name a new one, nothing is overwritten")


@contextmanager
def _whole(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that takes its place at the end, and is removed where anything goes wrong."""
    with whole(destination) as partial:
        partial.mkdir()
        yield partial
        _check_free(destination)


def _unshared(state: Tensors) -> dict[str, torch.Tensor]:
    """Copies of weights that share their storage with another: safetensors would leave them out or refuse them."""
    seen: set[int] = set()
    unshared: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        storage = value.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != value.nbytes
        unshared[name] = value.clone() if shared else value
        seen.add(storage.data_ptr())
    return unshared


def _tokenizer_copies(source: _Source, under: str = "") -> dict[str, Path]:
    if source.tokenizer is None:
        return {}
    return {under + name: source.tokenizer / name for name in _TOKENIZER_FILES if (source.tokenizer / name).exists()}


# ------------------------------------------------------------------------------------------------------- Show-o

_PREFIX = "showo."


def _showo_layout(source: _Source) -> Present | None:
    if any(name.startswith(_PREFIX) for name in source.state):
        return "official"
    return "hf" if "model.layers.0.self_attn.q_layernorm.weight" in source.state else None


def _showo_to_hf(source: _Source) -> _Written:
    sizes = _check_showo(source.state, source.name)
    config = json.loads(sizes.phi_config("sdpa").to_json_string())
    config |= {"architectures": ["PhiForCausalLM"], "dtype": janus_layout.dtype_name(source.state)}
    # Readers of transformers 4 look for them here.
    config |= {"partial_rotary_factor": sizes.partial_rotary_factor, "rope_theta": sizes.rope_theta}
    return _Written(
        state={name.removeprefix(_PREFIX): value for name, value in source.state.items()},
        json={"config.json": config | ({"showo": source.config} if source.config else {})},
        copies=_tokenizer_copies(source) | _image_tokenizer(source),
    )


def _showo_to_official(source: _Source) -> _Written:
    state = {_PREFIX + name: value for name, value in source.state.items()}
    sizes = _check_showo(state, source.name)
    _check_phi(source, sizes)
    config = source.config.get("showo") or {"_class_name": "Showo", "vocab_size": sizes.vocab_size}
    image_tokenizer = _image_tokenizer(source)
    copies = _tokenizer_copies(source, "tokenizer/" if image_tokenizer else "")
    return _Written(state=state, json={"config.json": config}, copies=copies | image_tokenizer)


def _image_tokenizer(source: _Source) -> dict[str, Path]:
    return {_IMAGE_TOKENIZER: source.image_tokenizer} if source.image_tokenizer else {}


def _check_showo(official_state: Tensors, name: str) -> ShowoSizes:
    sizes = ShowoSizes.from_state_dict(official_state)
    with torch.device("meta"):
        checkpoints.check_fit(ShowoNet(sizes), official_state, name)
    return sizes


def _check_phi(source: _Source, sizes: ShowoSizes) -> None:
    """Official checkpoints hold no such fields: they must be what the official class takes for granted."""
    if not source.config:
        raise ValueError("a Show-o in transformers' layout needs its config.json beside the weights")
    given = checkpoints.read_sizes(PhiConfig, source.config, source.config_file)
    wanted = sizes.phi_config("sdpa")
    for name in ("qk_layernorm", "num_attention_heads", "layer_norm_eps"):
        if getattr(given, name) != getattr(wanted, name):
            raise ValueError(f"Show-o's {name} is {getattr(wanted, name)}; config.json says {getattr(given, name)}")
    rope, wanted_rope = given.rope_parameters or {}, dict(wanted.rope_parameters or {})
    if any(rope.get(name) != value for name, value in wanted_rope.items()):
        raise ValueError(f"Show-o's rotary embedding is {wanted_rope}; config.json says {dict(rope)}")


# -------------------------------------------------------------------------------------------------------- Janus

_OF_PROCESSORS = ("preprocessor_config.json", "generation_config.json")
"""What `save` leaves out of a Janus' folder, and `convert` writes."""


def _janus_layout(source: _Source) -> Present | None:
    if janus_layout.is_official(source.state):
        return "official"
    if not janus_layout.is_hf(source.state):
        return None
    whole = all((source.config_file.parent / name).exists() for name in _OF_PROCESSORS)
    return "own" if "family" in source.config and not whole else "hf"


def _janus_to_hf(source: _Source) -> _Written:
    words = _janus_tokenizer(source)
    tokens = janus_files.special_tokens(words)
    if janus_layout.is_official(source.state):
        state = janus_layout.to_hf(source.state)
        config = janus_layout.hf_config(source.config, source.state, tokens, source.config_file)
    else:
        state = source.state
        config = _janus_config(source, state) | {"image_token_id": tokens.placeholder}
    _check_janus(config, state, source)
    config |= _janus_ours(source, words)
    files = janus_files.hf_files(config, tokens, *_janus_files(source))
    return _Written(state=state, json={"config.json": config, **files}, copies=_tokenizer_copies(source))


def _janus_to_official(source: _Source) -> _Written:
    words = _janus_tokenizer(source)
    config = _janus_config(source, source.state)
    _check_janus(config, source.state, source)
    files = janus_files.official_files(config, *_janus_files(source))
    config = janus_layout.official_config(config) | _janus_ours(source, words)
    state = janus_layout.to_official(source.state)
    return _Written(state=state, json={"config.json": config, **files}, copies=_tokenizer_copies(source))


def _janus_config(source: _Source, hf_state: Tensors) -> dict[str, Any]:
    """transformers' configuration beside the weights, its defaults written out and its head untied."""
    config = sizes_of(source.config, source.config_file)
    known = {"architectures": ["JanusForConditionalGeneration"], "dtype": janus_layout.dtype_name(hf_state)}
    return json.loads(config.to_json_string()) | known


def _check_janus(hf_config: Mapping[str, Any], hf_state: Tensors, source: _Source) -> None:
    def make() -> JanusForConditionalGeneration:
        return JanusForConditionalGeneration(JanusConfig.from_dict(dict(hf_config)))

    checkpoints.check_sizes(make, hf_state, source.name, source.config_file)


def _janus_files(source: _Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tokenizer's and the image processor's configuration; the latter may lie inside the processor's."""
    pixels = source.json("processor_config.json").get("image_processor") or source.json("preprocessor_config.json")
    if not isinstance(pixels, dict):
        file = source.config_file.with_name("processor_config.json")
        raise ValueError(f"{file}: image_processor is {pixels!r}, wanted an object: correct it, or get the file again")
    return source.json("tokenizer_config.json", source.tokenizer), pixels


def _janus_ours(source: _Source, words: Any) -> dict[str, Any]:
    """Roles are written down because only the name of Janus-1.3B tells its own, and the name is lost here."""
    ours = {"family": "janus"} | janus_files.own_fields(source.config, source.config_file)
    if "roles" not in ours:
        fix = "give --base-model deepseek-ai/Janus-1.3B"
        ours["roles"] = list(roles_of(source.name, words, str(source.path.resolve()), *source.base, fix=fix))
    return ours


def _janus_tokenizer(source: _Source) -> Any:
    if source.tokenizer is None:
        raise ValueError(f"{source.name} has no tokenizer: name a folder or hub id that holds one with --tokenizer")
    return read_tokenizer(source.tokenizer, "--tokenizer")


# ----------------------------------------------------------------------------------------------------- families


class _Family(NamedTuple):
    title: str
    layout_of: Callable[[_Source], Present | None]
    to_hf: Callable[[_Source], _Written]
    to_official: Callable[[_Source], _Written]
    readers: Mapping[Layout, str]


FAMILIES: dict[str, _Family] = {
    "showo": _Family(
        title="Show-o",
        layout_of=_showo_layout,
        to_hf=_showo_to_hf,
        to_official=_showo_to_official,
        readers={
            "hf": "`PhiForCausalLM.from_pretrained` loads the language model. It knows nothing of images: the ids "
            "above the text's are image codes, and images need Show-o's attention mask.",
            "official": "The names are those of showlab/show-o.",
        },
    ),
    "janus": _Family(
        title="Janus",
        layout_of=_janus_layout,
        to_hf=_janus_to_hf,
        to_official=_janus_to_official,
        readers={
            "hf": "`JanusForConditionalGeneration.from_pretrained` loads it. To draw as the authors do, call "
            '`generate(generation_mode="image", do_sample=True, top_k=0)`: transformers takes the most likely token '
            "by default, and only the 50 most likely ones when it samples. Its image encoder takes the codebook at its "
            "stored length, where the authors' scales every code to length 1.",
            "official": "The names are those of deepseek-ai/Janus.",
        },
    ),
}
