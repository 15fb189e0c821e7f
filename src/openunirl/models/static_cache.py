"""A key/value cache whose storage is allocated once: each step writes in place and reads a view of what is filled.

In: new keys and values, layer by layer. Out: views of all keys and values so far, so that nothing is copied as the
sequence grows and no unfilled position is ever attended to.

Departures from transformers' StaticCache: 1. it returns the filled part, not the whole storage behind a mask;
2. `keep` copies rows into storage of another length, which is how several images take over one prompt's prefix.

Shapes: B rows, L positions; tensors are [B, heads, L, head_dim].
"""

from __future__ import annotations

import torch

from openunirl.models.layers import PrefixCache


class StaticCache(PrefixCache):
    """Room for `length` positions per row; rows, heads, dtype and device are those of the first keys.

    Only for use without gradients: writing in place would break the graph.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.filled: list[int] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, heads, L, head_dim] of the new positions -> views of all positions so far."""
        if layer_idx == len(self.layers):
            self.layers.append((self._room(keys), self._room(values)))
            self.filled.append(0)
        start = self.filled[layer_idx]
        end = start + keys.shape[2]
        assert end <= self.length, f"{end} positions do not fit a cache of {self.length}"
        all_keys, all_values = self.layers[layer_idx]
        all_keys[:, :, start:end] = keys
        all_values[:, :, start:end] = values
        self.filled[layer_idx] = end
        return all_keys[:, :, :end], all_values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.filled[layer_idx] if layer_idx < len(self.filled) else 0

    def keep(self, rows: torch.Tensor, length: int | None = None) -> None:
        """The same, with room for `length` positions from here on."""
        self.length = length or self.length

        def kept(old: torch.Tensor, filled: int) -> torch.Tensor:
            chosen = old[:, :, :filled].index_select(0, rows)
            room = self._room(chosen)
            room[:, :, :filled] = chosen
            return room

        for layer_idx, filled in enumerate(self.filled):
            keys, values = self.layers[layer_idx]
            self.layers[layer_idx] = kept(keys, filled), kept(values, filled)

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        rows, heads, _, head_dim = like.shape
        return like.new_empty(rows, heads, self.length, head_dim)
