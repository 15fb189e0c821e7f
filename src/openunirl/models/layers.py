"""Layers that both families share: a head and an embedding that compute only the rows asked for, and a prefix cache.

FSDP gathers a module's parameters in that module's own forward, so every slice of a weight is taken in there, and so is
every chunk of positions: processes that score different numbers of them gather equally often.

Shapes: B rows, L positions, S selected positions, H hidden, V rows of the vocabulary in use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from openunirl.models.chunked import Reduce, in_chunks


class RowsLinear(nn.Linear):
    """A Linear that can compute a range of its output rows only: forward(x, (start, stop)).

    With `reduce`, x is [S, H] (or `groups` such blocks), and the result is what it makes of the outputs (chunked.py).
    """

    def forward(
        self,
        input: torch.Tensor,
        rows: tuple[int, int] | None = None,
        reduce: Reduce | None = None,
        groups: int = 1,
    ) -> Any:
        if reduce is None:
            return self._rows(input, rows)
        start, stop = rows or (0, self.out_features)
        return in_chunks(lambda hidden_CH: self._rows(hidden_CH, rows), input, stop - start, reduce, groups)

    def _rows(self, input: torch.Tensor, rows: tuple[int, int] | None) -> torch.Tensor:
        if rows is None:
            return super().forward(input)
        start, stop = rows
        return F.linear(input, self.weight[start:stop], None if self.bias is None else self.bias[start:stop])


class RowsEmbedding(nn.Embedding):
    """An Embedding that can also mix its rows.


    With `onehots` [B, N, V] the result is onehots @ weight[first_row : first_row + V], differentiable in `onehots`.
    """

    def forward(
        self, input: torch.Tensor | None, onehots: torch.Tensor | None = None, first_row: int = 0
    ) -> torch.Tensor:
        if onehots is not None:
            rows = self.weight[first_row : first_row + onehots.shape[-1]]
            with torch.autocast(onehots.device.type, enabled=False):  # a one-hot must give its row unrounded
                return (onehots @ rows.to(onehots.dtype)).to(rows.dtype)
        assert input is not None
        return super().forward(input)


class PrefixCache:
    """Keys and values per layer. Open, it appends what it sees; frozen, it only lends its prefix.

    Frozen is what a masked-diffusion sampler needs: every step attends to the same text prefix and leaves no trace.
    Implements the two methods of transformers' Cache that decoder layers call.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.frozen = False

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, heads, L, head_dim] of the new positions -> the same for all positions so far."""
        if layer_idx < len(self.layers):
            old_keys, old_values = self.layers[layer_idx]
            keys, values = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
            if not self.frozen:
                self.layers[layer_idx] = (keys, values)
        else:
            self.layers.append((keys, values))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx][0].shape[2] if layer_idx < len(self.layers) else 0

    def keep(self, rows: torch.Tensor) -> None:
        """From here on row i is what row rows[i] was (rows may repeat). Only one layer at a time is there twice."""
        for layer_idx, (keys, values) in enumerate(self.layers):
            self.layers[layer_idx] = keys.index_select(0, rows), values.index_select(0, rows)
