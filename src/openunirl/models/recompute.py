"""Gradient checkpointing: a layer keeps its input and computes the rest again in the backward pass.

In: layers. Out: the same layers. Nothing in them is random, so the gradients are the same. A pass without gradients is
left alone, and so is one that fills a key/value cache, which must not be filled twice.

Departure from transformers' switch: that one drops the cache, and works in training mode only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(layers: Iterable[nn.Module]) -> None:
    """Changes the layers' own forward, so that hooks (of sharding) run once."""
    for layer in layers:
        layer.forward = partial(_forward, layer.forward)


def _forward(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
        return plain(*args, **kwargs)
    return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
