"""Scores from logits that are never all there: the head is applied to some positions at a time, and each chunk is
reduced to what is wanted of it (a log-prob, an entropy) before the next one.

In: a head, hidden states, a reduction. Out: the reduction's results for all positions. With gradients, a chunk's logits
are computed again in the backward pass, so that only one chunk's live then, too. What fits one chunk is not computed
twice.

Shapes: S positions, G groups of them (guided: 2, conditional and unconditional), C positions of a chunk, H hidden, V
rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

LARGEST = 2**23
"""Logits at once: 32 MiB in float32; a reduction makes a handful of such tensors."""

Reduce = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
"""(logits [G*C, V] of a chunk, which positions int64 [C]) -> tensors [C, ...], each row from its own logits alone."""


def in_chunks(
    head: Callable[[torch.Tensor], torch.Tensor], hidden_SH: torch.Tensor, width: int, reduce: Reduce, groups: int = 1
) -> tuple[torch.Tensor, ...]:
    """`reduce` of all positions' logits; `width` is V. hidden_SH holds `groups` blocks of S rows, which belong together
    one by one: a chunk's logits are those of its positions in each block, block after block."""
    hidden_GSH = hidden_SH.unflatten(0, (groups, -1)) if groups > 1 else hidden_SH[None]
    index_S = torch.arange(hidden_GSH.shape[1], device=hidden_SH.device)

    def one(hidden_GCH: torch.Tensor, index_C: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return reduce(head(hidden_GCH.flatten(0, 1)), index_C)

    chunks = index_S.split(max(1, LARGEST // (groups * width)))
    if len(chunks) == 1:
        return one(hidden_GSH, index_S)
    found = []
    for index_C in chunks:
        part_GCH = hidden_GSH[:, int(index_C[0]) : int(index_C[-1]) + 1]
        if torch.is_grad_enabled():
            found.append(checkpoint(one, part_GCH, index_C, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(one(part_GCH, index_C))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
