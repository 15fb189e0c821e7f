"""Packs all questions and answers about an image behind its prefix, as a tree in which nothing stands twice.

In: for each image the segments asked on it (lists of ids) and which of their positions predict answer tokens. Out: ids,
positions, mask and the flat indices to read. A token sees the prefix and its own segment up to itself; positions
restart after the prefix, so a packed segment's logits equal those of the segment alone. What two segments of an image
begin with alike (a question with several answers, answers that agree) is one branch, computed and read once.

Shapes: B images, Q segments, L positions (prefix included), U positions that are read, S answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Packed:
    """text_BL: ids after the prefix; positions_BL, mask over prefix and text; select_U: flat indices into B*L.

    read_S: which of U predicts each answer token; slot_S: where that goes in a flat [Q, T] table. Order of S: by
    segment, then by answer token.
    """

    text_BL: torch.Tensor
    positions_BL: torch.Tensor
    mask: torch.Tensor
    select_U: torch.Tensor
    read_S: torch.Tensor
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
    start = prefix_len - 1  # the root of an image's tree
    branch: list[dict[tuple[int, int], int]] = [{} for _ in range(num_images)]  # (place before, token) -> place
    reads: dict[tuple[int, int], int] = {}  # (image, place) -> which of U
    read, slots = [], []
    for q, (image, question, answer) in enumerate(zip(images, questions, answers, strict=True)):
        places = [start]
        for token in [*question, *answer[:-1]]:  # the last token predicts nothing that is scored
            places.append(branch[image].setdefault((places[-1], token), prefix_len + len(branch[image])))
        ends = places[len(question) : len(question) + len(answer)]
        read += [reads.setdefault((image, place), len(reads)) for place in ends]
        slots += [q * width + t for t in range(len(answer))]
    longest = max(map(len, branch))
    length = prefix_len + longest
    text_BL = np.full((num_images, longest), pad)
    positions_BL = np.tile(np.arange(length).clip(max=start), (num_images, 1))
    mask_BLL = np.zeros((num_images, length, length), dtype=bool)
    mask_BLL[:, :, :prefix_len] = True
    if causal_prefix:
        mask_BLL[:, :prefix_len, :prefix_len] = np.tri(prefix_len, dtype=bool)
    for image, tree in enumerate(branch):
        for (before, token), place in tree.items():
            text_BL[image, place - prefix_len] = token
            positions_BL[image, place] = positions_BL[image, before] + 1
            mask_BLL[image, place, prefix_len:place] = mask_BLL[image, before, prefix_len:place]
            mask_BLL[image, place, place] = True
    return Packed(
        text_BL=torch.from_numpy(text_BL),
        positions_BL=torch.from_numpy(positions_BL),
        mask=torch.from_numpy(mask_BLL)[:, None],
        select_U=torch.tensor([image * length + place for image, place in reads], dtype=torch.int64),
        read_S=torch.tensor(read, dtype=torch.int64),
        slot_S=torch.tensor(slots, dtype=torch.int64),
    )
