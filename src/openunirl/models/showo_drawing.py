"""The passes of Show-o's sampler over the image block, whose text prefixes are in a cache.

In: codes with MASKED holes and which of them are read. Out: the acting policy's logits there. At the first step nothing
is shown, so images of one text are the same: one row for each distinct text, and one for all unconditional rows. Later
each image has its own row (guided: two).

Shapes: B images, D distinct texts (guided: the unconditional one is the last), R rows of a pass, N image tokens, K of
them that are read, V codes, L positions of block and text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from openunirl.models.layers import PrefixCache
from openunirl.models.policy import guide
from openunirl.models.showo_prompting import Prompting


@dataclass(frozen=True, kw_only=True)
class DrawingPasses:
    """`texts` holds the D prefixes of text_DL, frozen; rows_R: the prefix of each row, unconditional rows last."""

    net: Callable[..., torch.Tensor]
    prompting: Prompting
    image_ids: Callable[[torch.Tensor], torch.Tensor]
    texts: PrefixCache
    text_DL: torch.Tensor
    rows_R: torch.Tensor
    rows: tuple[int, int]
    guidance_scale: float
    num_image_tokens: int

    def __call__(self, step: int, tokens_BN: torch.Tensor, at_BK: torch.Tensor | None) -> torch.Tensor:
        """[B, K, V], or [B, N, V] where at_BK is None."""
        return self._first(tokens_BN) if step == 0 else self._later(tokens_BN, at_BK)

    def _first(self, tokens_BN: torch.Tensor) -> torch.Tensor:
        count, device = len(self.text_DL), tokens_BN.device
        mask = self.prompting.block_mask(self.text_DL, self.num_image_tokens + 2)
        logits_DNV = self._block(tokens_BN[:1].expand(count, -1), self.texts, mask, None)
        if self.guidance_scale != 1:
            each = torch.arange(count - 1, device=device)
            logits_DNV = logits_DNV.index_select(0, torch.cat([each, torch.full_like(each, count - 1)]))
        return guide(logits_DNV, self.guidance_scale).index_select(0, self.rows_R[: len(tokens_BN)])

    def _later(self, tokens_BN: torch.Tensor, at_BK: torch.Tensor | None) -> torch.Tensor:
        halves = len(self.rows_R) // len(tokens_BN)
        at_RK = None if at_BK is None else at_BK.repeat(halves, 1)
        texts, mask = self._own
        return guide(self._block(tokens_BN.repeat(halves, 1), texts, mask, at_RK), self.guidance_scale)

    def _block(
        self, tokens_RN: torch.Tensor, texts: PrefixCache, mask: torch.Tensor, at_RK: torch.Tensor | None
    ) -> torch.Tensor:
        ids_RL = self.prompting.image_block(self.image_ids(tokens_RN))
        given: dict[str, Any] = {"positions_BL": self.prompting.block_positions(ids_RL), "rows": self.rows}
        if at_RK is None:
            return self.net(ids_RL, mask, cache=texts, **given)[:, 1:-1]
        starts_R1 = torch.arange(len(ids_RL), device=ids_RL.device)[:, None] * ids_RL.shape[1] + 1
        return self.net(ids_RL, mask, cache=texts, select=starts_R1 + at_RK, **given)

    @cached_property
    def _own(self) -> tuple[PrefixCache, torch.Tensor]:
        """The prefix of each row, and what its image block sees, at all later steps; distinct prefixes are not asked
        again."""
        self.texts.keep(self.rows_R)
        return self.texts, self.prompting.block_mask(
            self.text_DL.index_select(0, self.rows_R), self.num_image_tokens + 2
        )
