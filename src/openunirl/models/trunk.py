"""A decoder's layers, the last of which is computed only where it is read: its keys and values are needed everywhere
(others attend to them, now or through a cache), its queries and all that follows them at selected positions.

In: transformers' layers and rotary positions, hidden states, a boolean mask, a cache. Out: hidden states of the
selected positions. What `select` says: None, everything; [S], flat places in B*L; [B, K], the same with equally many in
each row, which spares the other positions' queries, too; [0, 0], nothing: the pass only fills the cache.

Shapes: B rows, L positions, M positions attended to, S or K selected ones, H hidden, R rotated entries of a head; with
a prefix (prefix.py) hidden states are one row of T places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from openunirl.models.layers import PrefixCache
from openunirl.models.prefix import Common, Prefix

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [1 or B, L, R]."""


def run_layers(
    layers: Iterable[nn.Module],
    rotary: Callable[..., Rotation],
    hidden: torch.Tensor,
    mask: torch.Tensor,
    positions_BL: torch.Tensor,
    low: float,
    *,
    cache: PrefixCache | None = None,
    select: torch.Tensor | None = None,
    prefix: Prefix | None = None,
) -> Any:
    """[B, L, H], or of the selected positions [S, H] or [B, K, H]. hidden: [B, L, H], with a prefix [1, T, H]; the
    boolean mask is `low` where nobody may attend."""
    common = None
    if prefix is not None:
        assert select is not None and select.ndim == 1 and cache is None, "behind a prefix, places are selected"
        positions_BL, own = prefix.positions(positions_BL), mask.shape[-1] - prefix.ids_DP.shape[1]
        if prefix.shared:
            common = Common(prefix.row_B, additive_mask(prefix.mask, hidden, low))
            select = select + common.prefix_places
        else:
            hidden, positions_BL, mask = prefix.joined(hidden), prefix.joined(positions_BL), prefix.joined_mask(mask)
            select = prefix.joined_select(select, own)
    given: dict[str, Any] = {
        "attention_mask": additive_mask(mask, hidden, low),
        "position_embeddings": rotary(hidden, position_ids=positions_BL),
        "past_key_values": cache,
        "common": common,
    }
    *most, last = layers
    for layer in most:
        hidden = layer(hidden, **given)
    return last(hidden, select=select, **given)


def additive_mask(mask: torch.Tensor, like: torch.Tensor, low: float) -> torch.Tensor:
    """Zeros where a bool mask says that one may attend, `low` elsewhere; in the dtype of `like`."""
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(~mask, low)


def selected(table: torch.Tensor, select: torch.Tensor | None) -> torch.Tensor:
    """[1 or B, L, ...] at the selected positions: [S, ...] or [B, K, ...]. A table of one row is that of all rows."""
    if select is None:
        return table
    places = select % table.shape[1] if len(table) == 1 else select
    return table.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, select.shape)


def attend(
    module: Any,
    project: Callable[[torch.Tensor], torch.Tensor],
    normed_BLH: torch.Tensor,
    rotation: Rotation,
    mask: torch.Tensor,
    cache: PrefixCache | None,
    select: torch.Tensor | None,
    common: Common | None,
    norms: Sequence[Callable[[torch.Tensor], torch.Tensor]] = (),
) -> torch.Tensor:
    """What transformers' attention `module` makes of its input, at the selected positions. `project` is its last
    layer; `norms` are those of queries and of keys. mask: [1 or B, 1, L or 1, M]. With `common` the input is [1, T, H],
    the mask the rows' own, and `select` counts the prefixes' places, too."""

    def heads(linear: nn.Module, input_BLH: torch.Tensor, number: int) -> torch.Tensor:
        split = linear(input_BLH).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        return norms[number](split) if norms else split

    def compute(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
        return attention(module, queries, keys, values, mask, dropout=0.0, scaling=module.scaling)[0].flatten(2)

    keys = rotate(heads(module.k_proj, normed_BLH, 1), rotation)
    values = module.v_proj(normed_BLH).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    if cache is not None:
        # autocast rounds keys before it meets queries with them: a cache holds them rounded, not anew at every step
        keys, values = cache.update(keys.to(values.dtype), values, module.layer_idx)
    if select is not None and select.ndim == 2:
        if not select.numel():
            return normed_BLH.new_zeros(*select.shape, normed_BLH.shape[-1])
        normed_BLH = selected(normed_BLH, select)
        rotation = selected(rotation[0], select), selected(rotation[1], select)
        if mask.shape[2] > 1:
            mask = selected(mask[:, 0], select)[:, None]
    if common is not None and select is not None:  # the last layer, whose prefixes nobody reads
        normed_BLH, select = normed_BLH[:, common.prefix_places :], select - common.prefix_places
        rotation = rotation[0][:, common.prefix_places :], rotation[1][:, common.prefix_places :]
    queries = rotate(heads(module.q_proj, normed_BLH, 0), rotation)
    if common is None:
        parts = (compute(queries, keys, values, mask),)
    else:
        parts = common.attend(compute, queries, keys, values, mask)
    if select is not None and select.ndim == 1:
        parts = (selected(parts[0], select),)
    projected = [project(part) for part in parts]
    return projected[0] if len(projected) == 1 else torch.cat(projected, dim=1)


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotary positions on the first R entries of each head: [B, heads, L, head_dim]."""
    cos, sin = (table.unsqueeze(1) for table in rotation)
    size = cos.shape[-1]
    turned = x[..., :size]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)
