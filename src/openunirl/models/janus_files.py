"""The files that lie beside Janus' weights, for the processors of transformers and of deepseek-ai.

In: a configuration in transformers' layout, the source's tokenizer_config.json and preprocessor_config.json. Out: the
content of those files, of processor_config.json and of generation_config.json in the wanted layout; and our own
config.json, written and read.

Departures: 1. a tokenizer is declared as PreTrainedTokenizerFast for transformers: version 5 rebuilds whatever calls
itself a Llama tokenizer, with other ids; 2. no chat template is made up, because roles differ between checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from transformers import JanusConfig

from openunirl.models.janus_layout import SpecialTokens
from openunirl.models.janus_prompting import (
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    EOS,
    PAD,
    PLACEHOLDER,
    SHORTEST_SIDE,
    SYSTEM,
    Prompting,
)

_PIXEL_FIELDS = ("do_normalize", "image_mean", "image_std", "min_size", "rescale_factor")
_PIXELS = {
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "min_size": SHORTEST_SIDE,
    "rescale_factor": 1 / 255,
}
"""What every Janus was trained with, and what holds for a folder without preprocessor_config.json."""


def hf_files(
    hf_config: Mapping[str, Any], tokens: SpecialTokens, words: Mapping[str, Any], pixels: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """File name -> content of what JanusProcessor and `generate` read, for an image side of `hf_config`'s pixels.

    words: tokenizer_config.json, pixels: preprocessor_config.json (or {}), of either layout.
    """
    vision = hf_config["vision_config"]
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "image_token": PLACEHOLDER}
    return {
        "tokenizer_config.json": dict(words) | tokenizer | {"boi_token": BEGIN_IMAGE, "eoi_token": END_IMAGE},
        "preprocessor_config.json": {"image_processor_type": "JanusImageProcessor", "processor_class": "JanusProcessor"}
        | {"size": size, **_pixel_fields(pixels)},
        "processor_config.json": {
            "processor_class": "JanusProcessor",
            "num_image_tokens": vision["num_image_tokens"],
            "use_default_system_prompt": hf_config.get("system", SYSTEM) == SYSTEM,
        },
        "generation_config.json": {
            "bos_token_id": tokens.bos,
            "eos_token_id": tokens.eos,
            "pad_token_id": tokens.pad,
            "guidance_scale": 5.0,
            "generation_kwargs": {"boi_token_id": tokens.begin_of_image},
        },
    }


def official_files(
    hf_config: Mapping[str, Any], words: Mapping[str, Any], pixels: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """File name -> content of what deepseek-ai's VLChatProcessor reads; arguments as in `hf_files`."""
    vision = hf_config["vision_config"]
    return {
        "tokenizer_config.json": dict(words) | {"tokenizer_class": "LlamaTokenizerFast"},
        "preprocessor_config.json": {"image_processor_type": "VLMImageProcessor", "processor_class": "VLChatProcessor"}
        | {"image_size": vision["image_size"], **_pixel_fields(pixels)},
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_tag": PLACEHOLDER,
            "num_image_tokens": vision["num_image_tokens"],
            "add_special_token": False,
            "ignore_id": -100,
            "mask_prompt": True,
            "sft_format": "deepseek",
        },
    }


def _pixel_fields(pixels: Mapping[str, Any]) -> dict[str, Any]:
    return {name: pixels.get(name, _PIXELS[name]) for name in _PIXEL_FIELDS}


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """The ids of Janus' own tokens. Errors: ValueError for a tokenizer that lacks one."""
    known = tokenizer.get_vocab()
    missing = [token for token in (BOS, EOS, PAD, BEGIN_IMAGE, PLACEHOLDER) if token not in known]
    if missing:
        raise ValueError(f"the tokenizer does not know {missing[0]}: it is not Janus' (see --tokenizer)")
    return SpecialTokens(
        bos=known[BOS],
        eos=known[EOS],
        pad=known[PAD],
        begin_of_image=known[BEGIN_IMAGE],
        placeholder=known[PLACEHOLDER],
    )


_OWN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "roles": ("two texts", lambda v: isinstance(v, list) and len(v) == 2 and all(isinstance(r, str) for r in v)),
    "system": ("a text", lambda v: isinstance(v, str)),
    "max_text_len": ("a whole number above 0", lambda v: type(v) is int and v > 0),
}
"""Fields of our own config.json that other readers pass over, in whichever layout: what each holds."""


def own_fields(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Those of our own fields that are there. Errors: ValueError that names the source and a field that cannot be."""
    found = {name: config[name] for name in _OWN if name in config}
    for name, value in found.items():
        wanted, fits = _OWN[name]
        if not fits(value):
            raise ValueError(f"{source}: {name} is {value!r:.80}, wanted {wanted}: correct it, or get the file again")
    return found


def own_config(sizes: JanusConfig, prompting: Prompting) -> dict[str, Any]:
    """config.json of a folder that we write: transformers' own, and what we prompt with."""
    config, vocab = json.loads(sizes.to_json_string()), prompting.vocab
    config["text_config"] |= {"bos_token_id": vocab.bos, "eos_token_id": vocab.eos, "pad_token_id": vocab.pad}
    return config | {
        "architectures": ["JanusForConditionalGeneration"],
        "image_token_id": vocab.placeholder,
        "family": "janus",
        "roles": list(prompting.roles),
        "system": prompting.system,
        "max_text_len": prompting.max_text_len,
    }
