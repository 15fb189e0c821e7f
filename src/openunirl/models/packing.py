"""Packs several question-answer segments behind one image prefix, so that the prefix is computed once.

In: for each image the segments asked on it (lists of ids) and which of their positions predict answer tokens. Out: ids,
positions, mask and the flat indices to score. Each segment sees the prefix and itself, causally; positions restart
after the prefix, so a packed segment's logits equal those of the segment alone.

Shapes: B images, Q segments, L positions (prefix included), S scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Packed:
    """text_BL: ids after the prefix; positions_BL, mask over prefix and text; select_S: flat indices into B*L.

    slot_S: where each scored position goes in a flat [Q, T] table. Order of S: by segment, then by answer token.
    """

    text_BL: torch.Tensor
    positions_BL: torch.Tensor
    mask: torch.Tensor
    select_S: torch.Tensor
    slot_S: torch.Tensor


def pack(
    images: Sequence[int],
    questions: Sequence[list[int]],
    answers: Sequence[list[int]],
    *,
    num_images: int,
    prefix_len: int,
    width: int,
    pad: int,
    causal_prefix: bool = False,
) -> Packed:
    """images[q] is the image of segment q = questions[q] + answers[q]; `width` is T of the answer table.

    With `causal_prefix` the prefix's own positions see what stands before them, else the whole prefix.
    """
    text: list[list[int]] = [[] for _ in range(num_images)]
    segment: list[list[int]] = [[] for _ in range(num_images)]
    offset: list[list[int]] = [[] for _ in range(num_images)]
    select, slots = [], []
    for q, (image, question, answer) in enumerate(zip(images, questions, answers, strict=True)):
        start, ids = len(text[image]), [*question, *answer[:-1]]  # the last token predicts nothing that is scored
        text[image] += ids
        segment[image] += [q + 1] * len(ids)
        offset[image] += range(len(ids))
        first = prefix_len + start + len(question) - 1
        select += [(image, first + t) for t in range(len(answer))]
        slots += [q * width + t for t in range(len(answer))]
    longest = max(map(len, text))
    length = prefix_len + longest

    def table(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.int64)

    segment_BL = torch.cat([torch.zeros(num_images, prefix_len, dtype=torch.int64), table(segment, -1)], dim=1)
    prefix_positions = torch.arange(prefix_len).expand(num_images, prefix_len)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segment_BL[:, :, None] == segment_BL[:, None, :]
    mask = (segment_BL == 0)[:, None, :] | (same & causal)
    if causal_prefix:
        mask &= causal
    return Packed(
        text_BL=table(text, pad),
        positions_BL=torch.cat([prefix_positions, prefix_len + table(offset, 0)], dim=1),
        mask=mask[:, None],
        select_S=torch.tensor([image * length + at for image, at in select], dtype=torch.int64),
        slot_S=torch.tensor(slots, dtype=torch.int64),
    )
