"""The acting policy over image tokens, for every family: raw logits -> guidance -> temperature -> log-probs.

Shapes: S scored positions, V codes.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from openunirl.types import ImageSampling


def guide(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """uncond + w*(cond - uncond): [2S, V], conditional rows first, -> [S, V] float32. With w = 1 there is no
    unconditional half, and the logits are returned as they are."""
    if scale == 1:
        return logits
    cond, uncond = logits.float().chunk(2)
    return uncond + scale * (cond - uncond)


def log_policy(logits: torch.Tensor, sampling: ImageSampling, guidance_scale: float) -> torch.Tensor:
    """Log-probs of the acting policy, float32: [2S, V] guided or [S, V] not -> [S, V]."""
    return torch.log_softmax(guide(logits.float(), guidance_scale) / sampling.temperature, dim=-1)


def drawing_loss(logits_SV: torch.Tensor, tokens_S: torch.Tensor, teacher_SV: torch.Tensor | None) -> torch.Tensor:
    """Mean cross-entropy of raw logits to the tokens, or to a teacher's log-probs where there is one."""
    if teacher_SV is None:
        return F.cross_entropy(logits_SV.float(), tokens_S)
    return F.cross_entropy(logits_SV.float(), teacher_SV.exp())


def scatter(values_S: torch.Tensor, at_S: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A table of `shape` that holds values_S at the flat places at_S, and 0 elsewhere; differentiable."""
    flat = torch.zeros(shape.numel(), dtype=values_S.dtype, device=values_S.device)
    return flat.index_copy(0, at_S, values_S).view(shape)
