"""The network of Janus: transformers' Llama, SigLIP tower, aligners and generation head, behind one forward.

In: text ids, pictures' pixels, drawn codes, a mask, positions. Out: logits of the text head or of the image head at the
asked positions. Parameter names are those of transformers' JanusForConditionalGeneration; the image tokenizer (its
`model.vqmodel`) is not part of it.

Departures: 1. the text head has its own weights whatever a config says (the official model is untied; tying is silent
and moves logits by 13 to 17); 2. the pad id keeps an embedding that is trained, because unconditional rows are made of
pads; 3. root-mean-square norms are torch's own, one kernel each; 4. masks are boolean here and become additive in the
model's dtype.

Shapes: B rows, L positions, N drawn codes, S (flat) or K (of each row) selected positions, V rows of a head, H hidden;
C, height and width of pictures as BCHW.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import JanusConfig, JanusVisionModel, LlamaModel
from transformers.models.janus.modeling_janus import JanusVisionAlignerMLP, JanusVQVAEAlignerMLP, JanusVQVAEHead
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from openunirl.models import checkpoints
from openunirl.models.chunked import Reduce, in_chunks
from openunirl.models.layers import PrefixCache, RowsLinear
from openunirl.models.prefix import Common, Prefix
from openunirl.models.trunk import Rotation, attend, run_layers, selected


class JanusLayer(LlamaDecoderLayer):
    """Llama's layer, at the positions `select` (trunk.py)."""

    def forward(  # type: ignore[override]
        self,
        hidden_BLH: torch.Tensor,
        attention_mask: torch.Tensor,
        position_embeddings: Rotation,
        past_key_values: PrefixCache | None = None,
        select: torch.Tensor | None = None,
        common: Common | None = None,
    ) -> torch.Tensor:
        own: Any = self.self_attn
        normed_BLH = self.input_layernorm(hidden_BLH)
        attended = attend(
            own, own.o_proj, normed_BLH, position_embeddings, attention_mask, past_key_values, select, common
        )
        hidden = selected(hidden_BLH, select) + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class JanusNet(nn.Module):
    """All of Janus that is trained. Called as net(ids, mask, ...)."""

    def __init__(self, config: JanusConfig, *, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        parts: Any = copy.deepcopy(config)
        text, vision, vq = parts.text_config, parts.vision_config, parts.vq_config
        self.num_codes: int = vq.num_embeddings
        text.pad_token_id = None  # or its embedding would be held at zero
        text._attn_implementation = vision._attn_implementation = attn_implementation
        llama = LlamaModel(text)
        _use_torch_norms(llama, text.rms_norm_eps)
        for layer in llama.layers:
            layer.__class__ = JanusLayer  # the same weights, another forward
        self.model = nn.ModuleDict(
            {
                "language_model": llama,
                "vision_model": JanusVisionModel(vision),
                "aligner": JanusVisionAlignerMLP(vision),
                "generation_embeddings": nn.Embedding(vq.num_embeddings, vq.embed_dim),
                "generation_aligner": JanusVQVAEAlignerMLP(vq),
                "generation_head": JanusVQVAEHead(vq),
            }
        )
        self.lm_head = RowsLinear(text.hidden_size, text.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(
        self,
        ids_BL: torch.Tensor | None,
        mask: torch.Tensor,
        *,
        positions_BL: torch.Tensor,
        cache: PrefixCache | None = None,
        codes_BN: torch.Tensor | None = None,
        pixels_BCHW: torch.Tensor | None = None,
        pixels_start: int = 0,
        select: torch.Tensor | None = None,
        head: Literal["text", "image"] = "text",
        rows: tuple[int, int] | None = None,
        reduce: Reduce | None = None,
        groups: int = 1,
        prefix: Prefix | None = None,
    ) -> Any:
        """Logits at the positions `select` (trunk.py: flat indices into B*L; None = all).

        The sequence is the text `ids_BL` and then the drawn codes `codes_BN`; either may be None. What the tower sees
        in `pixels_BCHW` (0..1) takes the places from `pixels_start` on, whatever ids stand there. mask: bool [B or 1,
        1, L or 1, L (+ cached)], True = may attend. `rows` is a range of the text head. Returns [B, L, V] or as many as
        are selected, [S, V] or [B, K, V]; with `reduce`, which takes [S], what it makes of them (chunked.py). With
        `prefix` (prefix.py) everything else is of what stands behind it.
        """
        language: Any = self.model["language_model"]
        parts, prefix_PH = [], None
        if prefix is not None:
            assert ids_BL is not None and pixels_BCHW is None, "behind a prefix: text, then codes"
            text = language.embed_tokens(prefix.in_one_row(prefix.ids_DP, ids_BL))
            prefix_PH, own = text[0].tensor_split([prefix.ids_DP.numel()])
            parts.append(own.view(*ids_BL.shape, -1))
        elif ids_BL is not None:
            parts.append(language.embed_tokens(ids_BL))
        if pixels_BCHW is not None:
            seen_BLH = self.model["aligner"](self.model["vision_model"](pixels_BCHW * 2 - 1).last_hidden_state)
            end = pixels_start + seen_BLH.shape[1]
            parts = [parts[0][:, :pixels_start], seen_BLH, parts[0][:, end:]]
        if codes_BN is not None:
            drawn_BNH = self.model["generation_aligner"](self.model["generation_embeddings"](codes_BN))
            # autocast would leave codes in bfloat16 where no text stands beside them: when drawn, not when scored
            parts.append(drawn_BNH.to(language.embed_tokens.weight.dtype))
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if prefix is not None and prefix_PH is not None:
            hidden = prefix.in_one_row(prefix_PH[None], hidden)
        low = torch.finfo(hidden.dtype).min
        hidden_selected = run_layers(
            language.layers,
            language.rotary_emb,
            hidden,
            mask,
            positions_BL,
            low,
            cache=cache,
            select=select,
            prefix=prefix,
        )
        hidden_selected = language.norm(hidden_selected)
        drawing = self.model["generation_head"]  # gathered with the root, so that chunks gather nothing
        if reduce is None:
            return drawing(hidden_selected) if head == "image" else self.lm_head(hidden_selected, rows)
        if head == "image":
            return in_chunks(drawing, hidden_selected, self.num_codes, reduce, groups)
        return self.lm_head(hidden_selected, rows, reduce, groups)


def _use_torch_norms(llama: nn.Module, eps: float) -> None:
    for name, module in list(llama.named_modules()):
        if name.rpartition(".")[2] in ("norm", "input_layernorm", "post_attention_layernorm"):
            weight: Any = module.weight
            llama.set_submodule(name, nn.RMSNorm(weight.shape[0], eps=eps))


def sizes_of(config: Mapping[str, Any], source: object = "config.json") -> JanusConfig:
    """All sizes from a config.json in transformers' layout.

    Errors: ValueError, beginning with `source`, where a part is missing or a field cannot be."""
    parts = {f"{part}_config": config.get(f"{part}_config") for part in ("text", "vision", "vq")}
    missing = [name for name, value in parts.items() if not isinstance(value, dict)]
    if missing:
        raise ValueError(f"{source} has no {missing[0]}: it is not that of a Janus checkpoint in transformers' layout")
    kept = {name: config[name] for name in ("image_token_id",) if name in config}
    sizes = checkpoints.read_sizes(JanusConfig, {**parts, **kept, "tie_word_embeddings": False}, source)
    _check_traceless(sizes, source)
    return sizes


def _check_traceless(sizes: Any, source: object) -> None:
    """What the shapes of the weights cannot contradict."""
    text, vision = sizes.text_config, sizes.vision_config
    known = {"text_config.rope_theta": (text.rope_parameters or {}).get("rope_theta", 1.0)}
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"):
        known[f"text_config.{name}"] = getattr(text, name, None)
    for name in ("num_attention_heads", "image_size", "patch_size", "layer_norm_eps"):
        known[f"vision_config.{name}"] = getattr(vision, name)
    for name, value in known.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(
                f"{source}: {name} is {value!r:.80}, wanted a number above 0: correct it, or get the file again"
            )
    if text.num_attention_heads % text.num_key_value_heads or text.head_dim % 2:
        raise ValueError(
            f"{source}: text_config has {text.num_attention_heads} heads of {text.head_dim} and "
            f"{text.num_key_value_heads} for keys, wanted a multiple, and an even width: correct it, or get the file "
            "again"
        )
