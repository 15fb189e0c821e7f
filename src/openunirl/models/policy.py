"""The acting policy over image tokens, for every family: raw logits -> guidance -> temperature -> log-probs -> scores.

Shapes: B images, N image tokens, S scored positions, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from openunirl.relaxation import Relaxation, relax_tokens
from openunirl.types import ImageSampling, ImageScores


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def guide(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """uncond + w*(cond - uncond): [2S, V], conditional rows first, -> [S, V], at least float32. With w = 1 there is no
    unconditional half, and the logits are returned as they are."""
    if scale == 1:
        return logits
    cond, uncond = wide(logits).chunk(2)
    return uncond + scale * (cond - uncond)


def log_policy(logits: torch.Tensor, sampling: ImageSampling, guidance_scale: float) -> torch.Tensor:
    """Log-probs of the acting policy, at least float32: [2S, V] guided or [S, V] not -> [S, V]."""
    return torch.log_softmax(guide(wide(logits), guidance_scale) / sampling.temperature, dim=-1)


def drawing_loss(logits_SV: torch.Tensor, tokens_S: torch.Tensor, teacher_SV: torch.Tensor | None) -> torch.Tensor:
    """Mean cross-entropy of raw logits to the tokens, or to a teacher's log-probs where there is one."""
    if teacher_SV is None:
        return F.cross_entropy(logits_SV.float(), tokens_S)
    return F.cross_entropy(logits_SV.float(), teacher_SV.exp())


def score(
    logp_SV: torch.Tensor, tokens_BN: torch.Tensor, scored_BN: torch.Tensor, relax: Relaxation | None = None
) -> ImageScores:
    """What `score_images` returns, from the acting policy's log-probs at the scored tokens, in their flat order."""
    picked_S, shape = scored_BN.flatten().nonzero()[:, 0], tokens_BN.shape
    assert len(logp_SV) == len(picked_S), "one row of log-probs per scored token"
    chosen_S = tokens_BN.flatten().index_select(0, picked_S)
    entropy_S = -(logp_SV.exp() * logp_SV).sum(-1).detach()
    onehots_BNV = None
    if relax is not None:
        onehots_SV = relax_tokens(logp_SV, chosen_S, picked_S, shape[1], relax)
        onehots_BNV = scatter(onehots_SV, picked_S, (*shape, logp_SV.shape[1]))
    return ImageScores(
        logprobs_BN=scatter(logp_SV.gather(1, chosen_S[:, None])[:, 0], picked_S, shape),
        entropy_BN=scatter(entropy_S, picked_S, shape),
        onehots_BNV=onehots_BNV,
    )


def scatter(values: torch.Tensor, at_S: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A table of `shape` [B, N, ...] that holds values [S, ...] at the flat places at_S of B*N, and 0 elsewhere;
    differentiable."""
    flat = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
    return flat.index_copy(0, at_S, values).view(*shape)
