"""Images drawn token by token: the acting policy's sampler; and left-padded rows of ids.

In: logits of the next token, conditional rows first and (guided) unconditional rows after them. Out: tokens and
log-probs. The policy is guided, then temperature-scaled; top-k and top-p only limit what is drawn, and are off by
default: log-probs are those of the policy before them.

Shapes: B images, R rows, N image tokens, V codes, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from openunirl.draws import Draws
from openunirl.models.policy import log_policy
from openunirl.types import ImageSampling


def check(sampling: ImageSampling) -> None:
    """ValueError for a sampling that no autoregressive model can follow."""
    if sampling.temperature <= 0:
        raise ValueError(f"temperature={sampling.temperature} must be above 0 to draw images")
    if sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"top_k={sampling.top_k} must be 0 (off) or more, and top_p={sampling.top_p} above 0 and at most 1 (off)"
        )


def keep_likely(probs_BV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities of unlikely codes set to 0, the rest as they are: the `top_k` most probable (0 = all), and of
    those the fewest that hold the share `top_p` (1 = all).

    Example: keep_likely([[0.5, 0.3, 0.2]], 0, 0.6) == [[0.5, 0.3, 0.0]]
    """
    if top_k == 0 and top_p == 1:
        return probs_BV
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    if top_k:
        sorted_BV[:, top_k:] = 0
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    sorted_BV = sorted_BV.masked_fill(before_BV >= top_p * sorted_BV.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV)


def sample(
    first: torch.Tensor,
    next_logits: Callable[[int, torch.Tensor], torch.Tensor],
    draws: Draws,
    sampling: ImageSampling,
    num_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens_BN int64 and logprobs_BN float32. `first` are the logits of token 0; `next_logits(step, tokens_B1)` takes
    the tokens drawn at step - 1 and gives those of `step`."""
    logits, guided = first, sampling.guidance_scale != 1
    count = len(first) // (2 if guided else 1)
    tokens_BN = torch.zeros(count, num_tokens, dtype=torch.int64, device=first.device)
    logprobs_BN = torch.zeros(tokens_BN.shape, device=first.device)
    for step in range(num_tokens):
        if step:
            logits = next_logits(step, tokens_BN[:, step - 1 : step])
        logp_BV = log_policy(logits, sampling, sampling.guidance_scale)
        probs_BV = keep_likely(logp_BV.exp(), sampling.top_k, sampling.top_p)
        tokens_BN[:, step] = draws.tokens(step, probs_BV[:, None])[:, 0]
        logprobs_BN[:, step] = logp_BV.gather(1, tokens_BN[:, step : step + 1])[:, 0]
    return tokens_BN, logprobs_BN


# ------------------------------------------------------------------------------------------------------- rows


def left_padded(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one table [R, L], and which of its positions belong to a row (pads inside a row do)."""
    longest = max(map(len, rows))
    lengths_R1 = torch.tensor([[len(row)] for row in rows])
    ids_RL = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    return ids_RL, torch.arange(longest) >= longest - lengths_R1


def causal_mask(real_RL: torch.Tensor) -> torch.Tensor:
    """bool [R, 1, L, L]: earlier real positions, and itself (so that no row is empty, not even a pad's)."""
    length = real_RL.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=real_RL.device).tril()
    return ((earlier & real_RL[:, None]) | torch.eye(length, dtype=torch.bool, device=real_RL.device))[:, None]


def positions(real_RL: torch.Tensor) -> torch.Tensor:
    """[R, L]: positions that count from each row's first real id."""
    return (real_RL.cumsum(1) - 1).clamp_min(0)
