"""The network of Show-o: transformers' Phi with q/k layer norm, a sliced head and a mixable embedding.

In: token ids (or relaxed one-hots at the image positions), a boolean attention mask, positions. Out: logits of the
asked rows of the vocabulary at the asked positions, of which alone the last layer is computed (trunk.py). Parameter
names are the official ones (`showo.` + Phi's).

Departures: 1. masks are boolean here and become additive in the model's dtype (the official -9.2e18 overflows fp16).

Shapes: B rows, L positions, N image tokens, S (flat) or K (of each row) selected positions, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PhiConfig, PhiForCausalLM
from transformers.models.phi.modeling_phi import PhiDecoderLayer

from openunirl.models.chunked import Reduce
from openunirl.models.layers import PrefixCache, RowsEmbedding, RowsLinear
from openunirl.models.prefix import Common, Prefix
from openunirl.models.trunk import Rotation, attend, run_layers, selected

_TELLING = {
    "showo.model.embed_tokens.weight": 2,
    "showo.model.layers.0.mlp.fc1.weight": 2,
    "showo.model.layers.0.self_attn.q_layernorm.weight": 1,
}
"""The weights whose shapes tell all sizes, and how many dimensions each has."""


@dataclass(frozen=True, kw_only=True)
class ShowoSizes:
    """Every size of the language model. Example (the real one): ShowoSizes(vocab_size=58498, hidden_size=2048, ...)"""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 2048
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> ShowoSizes:
        """Infers sizes from official key names. Errors: ValueError where a key that tells a size is missing."""
        told = []
        for name, rank in _TELLING.items():
            if name not in state or state[name].ndim != rank or not state[name].numel():
                raise ValueError(f"this is not a Show-o checkpoint: the weight {name!r} is missing or of another shape")
            told.append(state[name].shape)
        (vocab_size, hidden_size), (intermediate_size, _), (head_dim,) = told
        layers = {int(k.split(".")[3]) for k in state if k.startswith("showo.model.layers.")}
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=len(layers),
            num_heads=hidden_size // head_dim,
        )

    def phi_config(self, attn_implementation: str) -> PhiConfig:
        config = PhiConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            max_position_embeddings=self.max_positions,
            qk_layernorm=True,  # the official class forces it on, whatever Phi-1.5's config says
            layer_norm_eps=self.layer_norm_eps,
            hidden_act="gelu_pytorch_tanh",  # Phi's gelu_new in one kernel
            rope_parameters={
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.partial_rotary_factor,
            },
            tie_word_embeddings=False,
            attention_dropout=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = attn_implementation
        return config


class ShowoLayer(PhiDecoderLayer):
    """Phi's layer, at the positions `select` (trunk.py): attention and what follows it both start from one norm."""

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
        normed_BLH, norms = self.input_layernorm(hidden_BLH), (own.q_layernorm, own.k_layernorm)
        attended = attend(
            own, own.dense, normed_BLH, position_embeddings, attention_mask, past_key_values, select, common, norms
        )
        return attended + self.mlp(selected(normed_BLH, select)) + selected(hidden_BLH, select)


class ShowoNet(nn.Module):
    """All of Show-o that is trained. Called as net(ids, mask, ...); state-dict keys equal the official checkpoint's."""

    def __init__(self, sizes: ShowoSizes, *, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        self.sizes = sizes
        self.attn_implementation = attn_implementation
        phi = PhiForCausalLM(sizes.phi_config(attn_implementation))
        phi.model.embed_tokens = RowsEmbedding(sizes.vocab_size, sizes.hidden_size)
        phi.lm_head = RowsLinear(sizes.hidden_size, sizes.vocab_size)
        for layer in phi.model.layers:
            layer.__class__ = ShowoLayer  # the same weights, another forward
        nn.init.normal_(phi.model.embed_tokens.weight, std=0.02)
        nn.init.normal_(phi.lm_head.weight, std=0.02)
        nn.init.zeros_(phi.lm_head.bias)
        self.showo = phi

    def forward(
        self,
        ids_BL: torch.Tensor,
        mask: torch.Tensor,
        *,
        positions_BL: torch.Tensor | None = None,
        cache: PrefixCache | None = None,
        select: torch.Tensor | None = None,
        rows: tuple[int, int] | None = None,
        onehots_BNV: torch.Tensor | None = None,
        onehots_start: int = 0,
        onehots_row: int = 0,
        reduce: Reduce | None = None,
        groups: int = 1,
        prefix: Prefix | None = None,
    ) -> Any:
        """Logits at the positions `select` (trunk.py: flat indices into B*L; None = all) for the vocabulary range
        `rows`.

        mask: bool [B or 1, 1, L or 1, L (+ cached)], True = may attend. With `onehots_BNV` the embeddings of the N
        positions from `onehots_start` are onehots @ embedding[onehots_row:...], and the ids there are not read. With
        `prefix` (prefix.py) everything else is of what stands behind it.
        Returns [B, L, V] or as many as are selected, [S, V] or [B, K, V]; with `reduce`, which takes [S], what it makes
        of them (chunked.py).
        """
        embed: Any = self.showo.model.embed_tokens
        assert prefix is None or (onehots_BNV is None and positions_BL is not None), "behind a prefix: ids, positions"
        if onehots_BNV is not None:
            end = onehots_start + onehots_BNV.shape[1]
            soft_BNH = embed(None, onehots_BNV, onehots_row)
            hidden = torch.cat([embed(ids_BL[:, :onehots_start]), soft_BNH, embed(ids_BL[:, end:])], dim=1)
        else:
            hidden = embed(ids_BL if prefix is None else prefix.in_one_row(prefix.ids_DP, ids_BL))
        trunk: Any = self.showo.model
        if positions_BL is None:
            seen = cache.get_seq_length() if cache is not None else 0
            positions_BL = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        # -inf is what sdpa makes of a bool mask, in every layer anew
        low = -torch.inf if self.attn_implementation == "sdpa" else torch.finfo(hidden.dtype).min
        hidden = run_layers(
            trunk.layers, trunk.rotary_emb, hidden, mask, positions_BL, low, cache=cache, select=select, prefix=prefix
        )
        hidden = trunk.final_layernorm(hidden)
        head: Any = self.showo.lm_head
        return head(hidden, rows, reduce, groups) if reduce is not None else head(hidden, rows)
