"""torch.compile of a decoder's layers, one by one: all are one piece of code, so it is compiled once for each way in
which it is called: with and without gradients, adapters, a relaxed image or a shared prefix, as the last layer, for one
row or several.

In: layers. Out: the same layers. A pass that fills a key/value cache is left alone: its length grows with every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch._dynamo.config as dynamo
from torch import nn

WAYS = 64
"""As many may be compiled; torch's own 8 are fewer than a training step with adapters has."""


def compile_layers(layers: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Changes the layers' own forward, so that hooks (of sharding) stay outside.

    Errors, when called: torch's FailOnRecompileLimitHit beyond WAYS, where torch would go on without compiling.
    """
    for layer in layers:
        compiled = torch.compile(layer.forward, dynamic=True, backend=backend)
        layer.forward = partial(_forward, layer.forward, compiled)


def _forward(plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("past_key_values") is not None:
        return plain(*args, **kwargs)
    with dynamo.patch(recompile_limit=WAYS, fail_on_recompile_limit_hit=True):
        return compiled(*args, **kwargs)
