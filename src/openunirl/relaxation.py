"""Straight-through Gumbel-softmax: sampled image tokens that pass a gradient on.

In: log-probs of the acting policy (guided, temperature-scaled) at the state in which a token was sampled, and that
token. Out: y = onehot(u) + (p - stopgrad(p)), p = softmax((l + g) / tau): the value is exactly the one-hot of the
sampled token, the gradient that of p.

Source: Gumbel-softmax (Jang et al., arXiv 1611.01144), straight-through; UniRL (arXiv 2505.23380) for its use; the
truncated-Gumbel construction (Maddison et al., A* sampling, arXiv 1411.0030) for the noise. Departures: 1. the token is
already there, so by default the noise is drawn *conditional* on that token being the argmax of l + g: value and
relaxation agree, and over the draws of tokens the noise is plain Gumbel noise again; "plain" ignores the token;
2. noise is keyed by image, token and code, never by batch.

Shapes: B images, N image tokens, S scored tokens (flattened over B*N), V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from openunirl.config import RelaxationConfig
from openunirl.draws import key, uniforms

Noise = Literal["conditional", "plain"]


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """How the tokens of one scoring pass are relaxed; drawn once and reused at every inner step.

    Example: Relaxation(seeds_B=key(7, torch.arange(4)), tau=0.7)
    """

    seeds_B: torch.Tensor
    tau: float = 1.0
    noise: Noise = "conditional"


def tau_at(config: RelaxationConfig, step: int, max_steps: int) -> float:
    """The temperature at `step`, which counts from 1: from `tau` at the first to `final_tau` at the last.

    Example: tau_at(RelaxationConfig(tau=1.0, final_tau=0.25, schedule="exponential"), 2, 3) == 0.5
    """
    if config.final_tau is None or max_steps == 1:
        return config.tau
    done = (step - 1) / (max_steps - 1)
    if config.schedule == "linear":
        return config.tau + done * (config.final_tau - config.tau)
    return config.tau * (config.final_tau / config.tau) ** done


def conditional_gumbel(logp_SV: torch.Tensor, chosen_S: torch.Tensor, uniform_SK: torch.Tensor) -> torch.Tensor:
    """Gumbel noise g [S, V] given that `chosen_S` is the argmax of logp + g.

    `logp_SV` is normalised, so the largest of logp + g is a standard Gumbel variable and independent of where it is;
    the others are Gumbel variables cut off at it. `uniform_SK` holds K = V + 1 uniforms a row: one for the largest.
    """
    exponential_SK = -uniform_SK.log()
    largest_S1 = exponential_SK[:, -1:].log()  # minus the largest of logp + g
    others_SV = -torch.logaddexp(largest_S1, exponential_SK[:, :-1].log() - logp_SV)
    perturbed_SV = others_SV.scatter(1, chosen_S[:, None], -largest_S1)
    return perturbed_SV - logp_SV


def plain_gumbel(uniform_SV: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, whatever was sampled."""
    return -(-uniform_SV.log()).log()


def straight_through(logp_SV: torch.Tensor, chosen_S: torch.Tensor, noise_SV: torch.Tensor, tau: float) -> torch.Tensor:
    """onehot(chosen) + (p - stopgrad(p)) [S, V]; in this order, so that the bracket is exactly 0."""
    p_SV = ((logp_SV + noise_SV) / tau).softmax(-1)
    return F.one_hot(chosen_S, logp_SV.shape[1]).to(p_SV.dtype) + (p_SV - p_SV.detach())


def relax_tokens(
    logp_SV: torch.Tensor, chosen_S: torch.Tensor, picked_S: torch.Tensor, num_tokens: int, relax: Relaxation
) -> torch.Tensor:
    """Relaxed one-hots [S, V] of the tokens at the flat places `picked_S` of B*N; differentiable in `logp_SV`."""
    seeds_B = relax.seeds_B.to(logp_SV.device)
    keys_S = key(seeds_B.index_select(0, picked_S // num_tokens), picked_S % num_tokens)
    count = logp_SV.shape[1]
    if relax.noise == "plain":
        noise_SV = plain_gumbel(uniforms(keys_S, 0, count).to(logp_SV.dtype))
    elif relax.noise == "conditional":
        uniform_SK = uniforms(keys_S, 0, count + 1).to(logp_SV.dtype)
        noise_SV = conditional_gumbel(logp_SV.detach(), chosen_S, uniform_SK)
    else:
        raise ValueError(f"unknown noise {relax.noise!r}: use conditional or plain")
    return straight_through(logp_SV, chosen_S, noise_SV, relax.tau)
