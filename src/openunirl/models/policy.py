"""The acting policy over image tokens, for every family: raw logits -> guidance -> temperature -> log-probs -> scores.

Shapes: B images, N image tokens, S scored positions, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from openunirl.models.chunked import Reduce
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
    score_rows: Callable[[Reduce, int], tuple[torch.Tensor, ...]],
    tokens_BN: torch.Tensor,
    scored_BN: torch.Tensor,
    sampling: ImageSampling,
    guidance_scale: float,
    relax: Relaxation | None = None,
) -> ImageScores:
    """What `score_images` returns. `score_rows` applies a reduction to the raw logits of the scored tokens in their
    flat order, in so many groups of rows: guided, the unconditional ones follow the conditional ones."""
    picked_S, shape = scored_BN.flatten().nonzero()[:, 0], tokens_BN.shape
    chosen_S = tokens_BN.flatten().index_select(0, picked_S)

    def reduce(logits: torch.Tensor, index_C: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logp_CV, chosen_C = log_policy(logits, sampling, guidance_scale), chosen_S.index_select(0, index_C)
        found = logp_CV.gather(1, chosen_C[:, None])[:, 0], entropy(logp_CV)
        if relax is None:
            return found
        return *found, relax_tokens(logp_CV, chosen_C, picked_S.index_select(0, index_C), shape[1], relax)

    logp_S, entropy_S, *onehots = score_rows(reduce, 1 if guidance_scale == 1 else 2)
    assert len(logp_S) == len(picked_S), "one row of logits (guided: two) per scored token"
    return ImageScores(
        logprobs_BN=scatter(logp_S, picked_S, shape),
        entropy_BN=scatter(entropy_S, picked_S, shape),
        onehots_BNV=scatter(onehots[0], picked_S, (*shape, onehots[0].shape[1])) if onehots else None,
    )


@torch.no_grad()
def entropy(logp_SV: torch.Tensor) -> torch.Tensor:
    return -(logp_SV.exp() * logp_SV).sum(-1)


def scatter(values: torch.Tensor, at_S: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A table of `shape` [B, N, ...] that holds values [S, ...] at the flat places at_S of B*N, and 0 elsewhere;
    differentiable."""
    flat = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
    return flat.index_copy(0, at_S, values).view(*shape)
