"""torch.compile of a decoder's layers, one by one: all are one piece of code, so it is compiled once.

In: layers. Out: the same layers. A pass that fills a key/value cache is left alone: its length grows with every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn


def compile_layers(layers: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Changes the layers' own forward, so that hooks (of sharding) stay outside."""
    for layer in layers:
        compiled = torch.compile(layer.forward, dynamic=True, backend=backend)
        layer.forward = partial(_forward, layer.forward, compiled)


def _forward(plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (plain if kwargs.get("past_key_values") is not None else compiled)(*args, **kwargs)
