"""What several rows begin with, computed once: the prompt of a group's images, and the empty one that guidance adds.

In: prefixes, and which of them each row continues. Out: for the layers, one row of all places, the prefixes' first and
then the rows' own; in attention, a row's own queries meet its prefix's keys and values and its own. No cache stands
between, so gradients flow, and sharding and recomputation meet nothing but a layer's input and output.

Shapes: B rows, L own positions, D prefixes, P positions of a prefix, T = D*P + B*L places, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """ids_DP; positions [1 or D, P]; a boolean mask [D, 1, P, P]; and row_B, the prefix of each row.

    A net's ids, positions and `select` (flat, [S]) are then of the rows' own positions alone, and its mask is [B or 1,
    1, L or 1, P + L]. Example: Prefix(ids_DP=ids, positions_DP=torch.arange(9)[None], mask=causal, row_B=rows)
    """

    ids_DP: torch.Tensor
    positions_DP: torch.Tensor
    mask: torch.Tensor
    row_B: torch.Tensor

    @property
    def shared(self) -> bool:
        """Whether there are fewer prefixes than rows. Where not, whole rows are faster: attention is called once."""
        return len(self.ids_DP) < len(self.row_B)

    def in_one_row(self, prefix_DP: torch.Tensor, own_BL: torch.Tensor) -> torch.Tensor:
        """[D, P, ...] and the rows' own [1 or B, L, ...] -> [1, T, ...]."""
        own_BL = own_BL.expand(len(self.row_B), *own_BL.shape[1:])
        return torch.cat([prefix_DP.flatten(0, 1), own_BL.flatten(0, 1)])[None]

    def positions(self, own_BL: torch.Tensor) -> torch.Tensor:
        """[1, T], from the rows' own positions [1 or B, L]."""
        return self.in_one_row(self.positions_DP.expand_as(self.ids_DP), own_BL)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, ...] -> [B, P + L, ...]: each row with its prefix in front."""
        prefix, own = x[0].tensor_split([self.ids_DP.numel()])
        prefix_DP = prefix.unflatten(0, self.ids_DP.shape)
        return torch.cat([prefix_DP.index_select(0, self.row_B), own.unflatten(0, (len(self.row_B), -1))], dim=1)

    def joined_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """[B, 1, P + L, P + L]."""
        own = mask.shape[-1] - self.ids_DP.shape[1]
        prefix = F.pad(self.mask, (0, own)).index_select(0, self.row_B)
        return torch.cat([prefix, mask.expand(len(self.row_B), 1, own, -1)], dim=2)

    def joined_select(self, select_S: torch.Tensor, own: int) -> torch.Tensor:
        """Flat places among rows of `own` positions -> among rows of P + own."""
        return select_S + self.ids_DP.shape[1] * (1 + select_S // own)


class Common(NamedTuple):
    """What a layer is told of a shared Prefix; its hidden states are [1, T, H]. mask: additive [D, 1, P, P]."""

    row_B: torch.Tensor
    mask: torch.Tensor

    @property
    def prefix_places(self) -> int:
        """D*P, which the rows' own places follow."""
        return self.mask.shape[0] * self.mask.shape[2]

    def attend(
        self,
        compute: Callable[..., torch.Tensor],
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """[1, D*P, H] and [1, B*L, H] where queries [1, heads, T, ...] ask for all places; the latter alone where they
        ask for the rows' own, as a last layer's do. Joined before they are projected, they would be kept twice."""
        (prefix_keys, own_keys), (prefix_values, own_values) = self._apart(keys), self._apart(values)
        own_keys = torch.cat([prefix_keys.index_select(0, self.row_B), own_keys], dim=2)
        own_values = torch.cat([prefix_values.index_select(0, self.row_B), own_values], dim=2)
        if queries.shape[2] < keys.shape[2]:
            return (compute(self._by_row(queries), own_keys, own_values, mask).flatten(0, 1)[None],)
        prefix_queries, own_queries = self._apart(queries)
        # copies: what is kept for the backward pass as a view would keep the rows' own keys and values, too
        prefix = compute(prefix_queries, prefix_keys.clone(), prefix_values.clone(), self.mask)
        own = compute(own_queries, own_keys, own_values, mask)
        return prefix.flatten(0, 1)[None], own.flatten(0, 1)[None]

    def _apart(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, heads, T, ...] -> [D, heads, P, ...] and [B, heads, L, ...]."""
        prefix, own = x[0].tensor_split([self.prefix_places], dim=1)
        return prefix.unflatten(1, (len(self.mask), -1)).transpose(0, 1), self._by_row(own[None])

    def _by_row(self, x: torch.Tensor) -> torch.Tensor:
        """[1, heads, B*L, ...] -> [B, heads, L, ...]."""
        return x[0].unflatten(1, (len(self.row_B), -1)).transpose(0, 1)
