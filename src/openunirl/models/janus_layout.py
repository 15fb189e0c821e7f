"""Translates Janus' weight names and configuration between deepseek-ai's layout and transformers' own.

In: a flat state dict or a config.json in one layout. Out: the same in the other, bit for bit and in the stored dtype.
Source: the modules of deepseek-ai/Janus and of transformers' JanusForConditionalGeneration; golden/janus/hf_mapping.md.

Departures: 1. weights that no forward pass reads (the pooling head, the codebook's usage counter, rotary tables) are
dropped on the way to transformers, so they do not come back; 2. sizes come from the weights, and only what leaves no
trace in them (head counts, rotary base) from the configuration; 3. a vision tower of a size that deepseek-ai has not
named gets its sizes written beside its name.

Shapes: P patches, D vision width, 3D the joined query, key and value rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from transformers import JanusConfig, LlamaConfig

from openunirl.models import checkpoints

Tensors = Mapping[str, torch.Tensor]


class _Rule(NamedTuple):
    official: str
    hf: str | None  # None: no forward pass reads it
    change: Literal["none", "qkv", "first_dim"] = "none"


# What may stand for a placeholder. `qkv` numbers the three parts, in this order, of one official weight.
_PLACEHOLDERS = {
    "n": r"\d+",
    "m": r"\d+",
    "leaf": "weight|bias",
    "one_two": "1|2",
    "qkv": "q|k|v",
    "side": "encoder|decoder",
    "res": r"(?:norm1|conv1|norm2|conv2|nin_shortcut)\.(?:weight|bias)",
    "att": r"(?:norm|q|k|v|proj_out)\.(?:weight|bias)",
    "end": r"(?:conv_in|conv_out|norm_out)\.(?:weight|bias)",
    "quant": r"(?:quant_conv|post_quant_conv|quantize\.embedding)\.(?:weight|bias)",
    "llama": r"(?:embed_tokens|norm|layers\.\d+\.\w+(?:\.\w+)?)\.(?:weight|bias)",
    "any": r"[\w.]+",
}

_TOWER, _VISION = "vision_model.vision_tower", "model.vision_model"
_BLOCK, _LAYER = _TOWER + ".blocks.{n}", _VISION + ".encoder.layers.{n}"
_VQ, _HF_VQ = "gen_vision_model", "model.vqmodel"
_DOWN, _HF_DOWN = _VQ + ".encoder.conv_blocks.{n}", _HF_VQ + ".encoder.down.{n}"
_UP, _HF_UP = _VQ + ".decoder.conv_blocks.{n}", _HF_VQ + ".decoder.up.{n}"
_MID, _HF_MID = _VQ + ".{side}.mid", _HF_VQ + ".{side}.mid"

# The first rule that fits a name decides; every rule is read in both directions.
RULES = (
    _Rule(_TOWER + ".patch_embed.proj.{leaf}", _VISION + ".embeddings.patch_embedding.{leaf}"),
    _Rule(_TOWER + ".pos_embed", _VISION + ".embeddings.position_embedding.weight", "first_dim"),
    _Rule(_BLOCK + ".norm{one_two}.{leaf}", _LAYER + ".layer_norm{one_two}.{leaf}"),
    _Rule(_BLOCK + ".attn.qkv.{leaf}", _LAYER + ".self_attn.{qkv}_proj.{leaf}", "qkv"),
    _Rule(_BLOCK + ".attn.proj.{leaf}", _LAYER + ".self_attn.projection_layer.{leaf}"),
    _Rule(_BLOCK + ".mlp.fc{one_two}.{leaf}", _LAYER + ".mlp.fc{one_two}.{leaf}"),
    _Rule(_TOWER + ".norm.{leaf}", _VISION + ".post_layernorm.{leaf}"),
    _Rule(_TOWER + ".attn_pool.{any}", None),
    _Rule("aligner.layers.0.{leaf}", "model.aligner.fc1.{leaf}"),
    _Rule("aligner.layers.2.{leaf}", "model.aligner.hidden_layers.0.{leaf}"),
    _Rule("gen_aligner.layers.0.{leaf}", "model.generation_aligner.fc1.{leaf}"),
    _Rule("gen_aligner.layers.2.{leaf}", "model.generation_aligner.hidden_layers.0.{leaf}"),
    _Rule("gen_head.output_mlp_projector.{leaf}", "model.generation_head.proj_out.{leaf}"),
    _Rule("gen_head.vision_head.{leaf}", "model.generation_head.vision_head.{leaf}"),
    _Rule("gen_embed.weight", "model.generation_embeddings.weight"),
    _Rule(_DOWN + ".res.{m}.{res}", _HF_DOWN + ".block.{m}.{res}"),
    _Rule(_DOWN + ".attn.{m}.{att}", _HF_DOWN + ".attn.{m}.{att}"),
    _Rule(_DOWN + ".downsample.conv.{leaf}", _HF_DOWN + ".downsample.conv.{leaf}"),
    _Rule(_UP + ".res.{m}.{res}", _HF_UP + ".block.{m}.{res}"),
    _Rule(_UP + ".attn.{m}.{att}", _HF_UP + ".attn.{m}.{att}"),
    _Rule(_UP + ".upsample.conv.{leaf}", _HF_UP + ".upsample.conv.{leaf}"),
    _Rule(_MID + ".0.{res}", _HF_MID + ".block_1.{res}"),
    _Rule(_MID + ".1.{att}", _HF_MID + ".attn_1.{att}"),
    _Rule(_MID + ".2.{res}", _HF_MID + ".block_2.{res}"),
    _Rule(_VQ + ".{side}.{end}", _HF_VQ + ".{side}.{end}"),
    _Rule(_VQ + ".{quant}", _HF_VQ + ".{quant}"),
    _Rule(_VQ + ".quantize.codebook_used", None),
    _Rule("language_model.model.layers.{n}.self_attn.rotary_emb.inv_freq", None),
    _Rule("language_model.model.{llama}", "model.language_model.{llama}"),
    _Rule("language_model.lm_head.weight", "lm_head.weight"),
)


def is_official(state: Tensors) -> bool:
    """Whether any name is deepseek-ai's (they begin with the part, transformers' with `model.` or `lm_head.`)."""
    return any(_find(name, _OFFICIAL) for name in state)


def is_hf(state: Tensors) -> bool:
    """Whether any name is transformers' JanusForConditionalGeneration's (`lm_head` alone is many models')."""
    return any(name.startswith("model.") and _find(name, _HF) for name in state)


def to_hf(official_state: Tensors) -> dict[str, torch.Tensor]:
    """The names of JanusForConditionalGeneration.state_dict(). Errors: ValueError for a name that no rule knows."""
    state: dict[str, torch.Tensor] = {}
    for name, value in official_state.items():
        rule, parts = _known(name, _OFFICIAL, "deepseek-ai's Janus")
        if rule.hf is None:
            continue
        if rule.change == "qkv":
            if value.shape[0] % 3:
                raise ValueError(f"{name} has {value.shape[0]} rows, wanted three equal parts (query, key, value)")
            # A copy each: safetensors refuses weights that share their storage.
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[rule.hf.format(**parts, qkv=letter)] = part.clone()
        elif rule.change == "first_dim":
            if value.ndim != 3 or value.shape[0] != 1:
                raise ValueError(f"{name} has the shape {list(value.shape)}, wanted [1, patches, width]")
            state[rule.hf.format(**parts)] = value[0]
        else:
            state[rule.hf.format(**parts)] = value
    return state


def to_official(hf_state: Tensors) -> dict[str, torch.Tensor]:
    """deepseek-ai's names, without those that no forward pass reads.

    Errors: ValueError for a name that no rule knows, and for a query, key or value whose partners are missing.
    """
    state: dict[str, torch.Tensor] = {}
    for name, value in hf_state.items():
        rule, parts = _known(name, _HF, "transformers' Janus")
        assert rule.hf is not None
        official = rule.official.format(**parts)
        if rule.change == "qkv":
            trio = [rule.hf.format(**{**parts, "qkv": letter}) for letter in "qkv"]
            missing = [other for other in trio if other not in hf_state]
            if missing:
                raise ValueError(f"{name} needs its partner {missing[0]}, which is missing")
            if official not in state:
                state[official] = torch.cat([hf_state[other] for other in trio])
        else:
            state[official] = value[None] if rule.change == "first_dim" else value
    return state


_Compiled = tuple[tuple[re.Pattern[str], _Rule], ...]


def _compile(template: str) -> re.Pattern[str]:
    """A template such as `aligner.layers.0.{leaf}` as a pattern with one named group for each placeholder."""
    pieces = re.split(r"\{(\w+)\}", template)
    texts = [f"(?P<{p}>{_PLACEHOLDERS[p]})" if i % 2 else re.escape(p) for i, p in enumerate(pieces)]
    return re.compile("".join(texts))


_OFFICIAL: _Compiled = tuple((_compile(rule.official), rule) for rule in RULES)
_HF: _Compiled = tuple((_compile(rule.hf), rule) for rule in RULES if rule.hf is not None)


def _find(name: str, rules: _Compiled) -> tuple[_Rule, dict[str, str]] | None:
    for pattern, rule in rules:
        if match := pattern.fullmatch(name):
            return rule, match.groupdict()
    return None


def _known(name: str, rules: _Compiled, layout: str) -> tuple[_Rule, dict[str, str]]:
    found = _find(name, rules)
    if found is None:
        raise ValueError(f"{name} is not a weight of {layout}: the checkpoint belongs to another model or layout")
    return found


# --------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The ids that transformers' configuration holds and deepseek-ai's processor looks up.

    Example (Janus-Pro): SpecialTokens(bos=100000, eos=100001, pad=100002, begin_of_image=100016, placeholder=100581)
    """

    bos: int
    eos: int
    pad: int
    begin_of_image: int
    placeholder: int


_NAMED_TOWER = "siglip_large_patch16_384"
_NAMED_TOWER_SIZES = {"image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4}
# deepseek-ai's names of further towers; all have 16 heads.
_TOWER_HEADS = {_NAMED_TOWER: 16, "siglip_so400m_patch14_384": 16, "siglip_so400m_patch14_224": 16}
_LANGUAGE_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def hf_config(
    official_config: Mapping[str, Any],
    official_state: Tensors,
    tokens: SpecialTokens | None = None,
    source: object = "config.json",
) -> dict[str, Any]:
    """The config.json of JanusForConditionalGeneration for an official checkpoint, its head untied.

    Without `tokens` the ids are transformers' defaults. Errors: ValueError, beginning with `source`, where a field or a
    weight that tells a size is missing or a field cannot be, or the vision tower's head count is not known.
    """
    try:
        for part in ("language_config", "vision_config"):
            if not isinstance(official_config[part], dict):
                raise ValueError(f"{source}: its {part} is {official_config[part]!r:.80}, wanted an object")
        vision, vq = _vision_config(official_config, official_state), _vq_config(official_state)
        text = dict(official_config["language_config"])
    except KeyError as error:
        raise ValueError(f"{source}: this is not a whole Janus checkpoint: {error} is missing") from None
    for left_out in ("torch_dtype", "dtype", "architectures", "_attn_implementation", "_attn_implementation_internal"):
        text.pop(left_out, None)
    text |= {"model_type": "llama", "tie_word_embeddings": False}
    ids: dict[str, Any] = {}
    if tokens is not None:
        text |= {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
        ids = {"image_token_id": tokens.placeholder}
    parts = {"text_config": text, "vision_config": vision, "vq_config": vq, "tie_word_embeddings": False, **ids}
    config = checkpoints.read_sizes(JanusConfig, parts, source)
    dtype = dtype_name(official_state)
    return json.loads(config.to_json_string()) | {"architectures": ["JanusForConditionalGeneration"], "dtype": dtype}


def _vision_config(official_config: Mapping[str, Any], state: Tensors) -> dict[str, Any]:
    params = official_config["vision_config"]["params"]
    heads = params.get("heads") or _TOWER_HEADS.get(params.get("model_name", ""))
    if heads is None:
        raise ValueError(
            f"the head count of the vision tower {params.get('model_name')!r} is not known: "
            "write it into config.json as vision_config.params.heads"
        )
    width, channels, patch_size, _ = state[f"{_TOWER}.patch_embed.proj.weight"].shape
    patches = state[f"{_TOWER}.pos_embed"].shape[1]
    image_size = math.isqrt(patches) * patch_size
    if params.get("image_size", image_size) != image_size:
        raise ValueError(
            f"config.json says that images have {params['image_size']} pixels a side, the weights {image_size} "
            f"({patches} patches of {patch_size}): one of them belongs to another model"
        )
    hidden = state[f"{_TOWER}.blocks.0.mlp.fc1.weight"].shape[0]
    return {
        "hidden_size": width,
        "num_hidden_layers": _count(state, _TOWER + r"\.blocks"),
        "num_attention_heads": heads,
        "num_channels": channels,
        "image_size": image_size,
        "patch_size": patch_size,
        # Half a unit more, so that transformers' int(width * ratio) cannot fall below the true size.
        "mlp_ratio": hidden // width if hidden % width == 0 else (hidden + 0.5) / width,
        "projection_dim": state["aligner.layers.0.weight"].shape[0],
        "num_image_tokens": patches,
        "depth": _count(state, r"aligner\.layers", by="weight"),
    }


def _vq_config(state: Tensors) -> dict[str, Any]:
    codes, code_width = state[f"{_VQ}.quantize.embedding.weight"].shape
    base, channels = state[f"{_VQ}.encoder.conv_in.weight"].shape[:2]
    levels = range(_count(state, _VQ + r"\.encoder\.conv_blocks"))
    widths = [state[f"{_VQ}.encoder.conv_blocks.{n}.res.0.conv1.weight"].shape[0] for n in levels]
    return {
        "embed_dim": code_width,
        "num_embeddings": codes,
        "latent_channels": state[f"{_VQ}.encoder.conv_out.weight"].shape[0],
        "in_channels": channels,
        "out_channels": state[f"{_VQ}.decoder.conv_out.weight"].shape[0],
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": _count(state, _VQ + r"\.encoder\.conv_blocks\.0\.res"),
        "projection_dim": state["gen_aligner.layers.0.weight"].shape[0],
        "num_hidden_layers": _count(state, r"gen_aligner\.layers", by="weight"),
        "image_token_embed_dim": state["gen_head.output_mlp_projector.weight"].shape[1],
    }


def _count(state: Tensors, prefix: str, by: str = "") -> int:
    """How many distinct numbers follow `prefix` among the names (those that end in `by`)."""
    pattern = re.compile(prefix + r"\.(\d+)\." + (by or ".*"))
    return len({match.group(1) for name in state if (match := pattern.fullmatch(name))})


def dtype_name(state: Tensors) -> str:
    """The dtype that holds every float weight without loss."""
    dtype: torch.dtype | None = None
    for value in state.values():
        if value.is_floating_point():
            dtype = value.dtype if dtype is None else torch.promote_types(dtype, value.dtype)
    return str(dtype).removeprefix("torch.")


def official_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """deepseek-ai's config.json for transformers' one. Errors: ValueError for what its classes cannot express."""
    config = JanusConfig.from_dict(dict(hf_config))
    text: Any = config.text_config
    vision: Any = config.vision_config
    vq: Any = config.vq_config
    if text.model_type != "llama" or vision.use_qk_norm or not vision.attention_bias:
        raise ValueError(
            f"deepseek-ai's layout has a Llama and a vision tower with biases and without query/key norms; this has "
            f"{text.model_type}, attention_bias={vision.attention_bias}, use_qk_norm={vision.use_qk_norm}"
        )
    tower = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.hidden_size,
        "layers": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "mlp_ratio": vision.mlp_ratio,
    }
    named = tower == _NAMED_TOWER_SIZES
    name = _NAMED_TOWER if named else f"siglip_{vision.hidden_size}_patch{vision.patch_size}_{vision.image_size}"
    tower = {"image_size": vision.image_size} if named else tower
    aligner = {"depth": vision.depth, "input_dim": vision.hidden_size, "n_embed": vision.projection_dim}
    gen_aligner = {"depth": vq.num_hidden_layers, "input_dim": vq.embed_dim, "n_embed": vq.projection_dim}
    head = {"image_token_embed": vq.projection_dim, "image_token_size": vq.num_embeddings}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "aligner_config": _part("MlpProjector", "aligner", aligner | {"projector_type": "mlp_gelu"}),
        "gen_aligner_config": _part("MlpProjector", "gen_aligner", gen_aligner | {"projector_type": "mlp_gelu"}),
        "gen_head_config": _part("vision_head", "gen_head", head | {"n_embed": vq.image_token_embed_dim}),
        "gen_vision_config": _part(
            "VQ-16", "gen_vision", {"image_token_size": vq.num_embeddings, "n_embed": vq.embed_dim}
        ),
        "language_config": _language_config(text),
        "vision_config": _part(
            "CLIPVisionTower",
            "vision",
            tower | {"model_name": name, "select_feature": "same", "select_layer": -1},
        ),
        **({"torch_dtype": hf_config["dtype"]} if hf_config.get("dtype") else {}),
    }


def _part(cls: str, model_type: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"cls": cls, "model_type": model_type, "params": params}


def _language_config(text: LlamaConfig) -> dict[str, Any]:
    """Llama's fields as transformers 4 wrote them: the rotary base and its scaling stand apart."""
    rope = dict(text.rope_parameters or {})
    language = {name: getattr(text, name) for name in _LANGUAGE_FIELDS} | {"rope_theta": rope.pop("rope_theta", 1e4)}
    if text.head_dim != text.hidden_size // text.num_attention_heads:
        language["head_dim"] = text.head_dim
    if rope.get("rope_type", "default") != "default":
        language["rope_scaling"] = rope
    return language


VQ = _HF_VQ + "."
"""Where transformers' layout keeps the image tokenizer."""


def split(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is trained, and the image tokenizer's weights under its own names."""
    trained = {name: value for name, value in state.items() if not name.startswith(VQ)}
    return trained, {name.removeprefix(VQ): value for name, value in state.items() if name.startswith(VQ)}
