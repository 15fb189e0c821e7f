"""Optimizers and learning-rate schedules.

In: a module, a step. Out: torch optimizers, a factor for the learning rate, the weights' mean over steps. Muon (torch's
own) treats the matrices of the layers; embeddings, heads, norms and biases always take AdamW, as its authors advise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def lr_factor(step: int, total: int, *, warmup: int = 0, decay: float = 1.0) -> float:
    """Linear warm-up over `warmup` steps, then flat, then linear to 0 over the last share `decay` of `total`.

    Example: lr_factor(0, 10, warmup=0, decay=1.0) == 1.0 and lr_factor(9, 10, decay=1.0) == 0.1
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    falling = decay * total
    return rise * (min(1.0, (total - step) / falling) if falling else 1.0)


def build_optimizer(
    net: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    name: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.95),
    epsilon: float = 1e-8,
) -> list[torch.optim.Optimizer]:
    """ "adamw", or "muon" for layer matrices with AdamW for the rest. Weight decay never touches norms and biases."""
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    matrices = [p for n, p in trained if p.ndim == 2 and ".layers." in n]
    tables = [p for n, p in trained if p.ndim >= 2 and not (p.ndim == 2 and ".layers." in n)]
    vectors = [p for _, p in trained if p.ndim < 2]
    if name == "muon":
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return [muon, torch.optim.AdamW(groups, lr=lr, betas=betas, eps=epsilon)]
    if name != "adamw":
        raise ValueError(f"unknown optimizer {name!r}: use adamw or muon")
    groups = [{"params": matrices + tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=epsilon)]


@torch.no_grad()
def average_weights(optimizer: torch.optim.Optimizer, *, restart: bool) -> None:
    """Counts the present weights into their running mean, which lies in the optimizer's state and is saved, loaded and
    sharded with it. `restart`: the mean begins with them. A weight that no update has touched has no mean yet: its mean
    begins with its first update.

    Source: stochastic weight averaging (arXiv 1803.05407). Example: average_weights(optimizer, restart=step == first)
    """
    for weight, state in _touched(optimizer):
        if restart or "swa" not in state:
            state["swa"], state["swa_count"] = weight.detach().clone(), 0
        state["swa_count"] += 1
        state["swa"].lerp_(weight.detach(), 1 / state["swa_count"])


@torch.no_grad()
def take_average(optimizer: torch.optim.Optimizer) -> None:
    """The weights become their running mean, which is then given up."""
    for weight, state in _touched(optimizer):
        weight.copy_(state["swa"])
    drop_average(optimizer)


def drop_average(optimizer: torch.optim.Optimizer) -> None:
    """Gives up a running mean, where there is one."""
    for _, state in _touched(optimizer):
        for name in ("swa", "swa_count"):
            state.pop(name, None)


def _touched(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if state := optimizer.state.get(weight):
                yield weight, state


def fast_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies it faster, else float32. On a CPU that takes matrix tiles (AMX: about 2.5
    times float32); with AVX-512's bfloat16 alone float32 is 1.4 times as fast (docs/experiments.md)."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.bfloat16 if tiles else torch.float32
