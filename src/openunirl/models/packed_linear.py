"""Faster Linear layers while a sampler runs: weights are made ready once, and not at each of its hundreds of passes.

In: a network. Out: the same network, whose float32 nn.Linear layers keep inside the context what they make of their
weights at the first call. 1. On an x86 CPU weights are packed into oneDNN's blocked layout; products are equal up to
the order of additions. Torch takes float32 products from MKL, which lays weights out anew at every call
(benchmarks/janus_sampling.py measures it). 2. Under autocast weights are cast; products are the same. Autocast's own
cache ends with each forward of a prepared net, which is where accelerate enters it, and never holds a slice of rows or
a weight that is not trained.

Departures from torch.utils.mkldnn: activations stay ordinary tensors, and nothing is converted for good. In another
dtype the layers stay as they are; so do subclasses whose forward is their own, and without autocast all that are not on
a CPU or below SMALLEST. Autocast is looked for at every call. The packed copy takes as much memory as the weights until
the context ends, the cast one half of it. Weights must not change inside it.

Shapes: B rows, I inner, O outer (rows of the weight).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from openunirl.models.layers import RowsLinear
from openunirl.models.sharded import whole_weights

Ready = dict[tuple[torch.dtype, tuple[int, int] | None], tuple[torch.Tensor, torch.Tensor | None]]
"""Weight and bias by what `_kind` says and the range of rows asked for."""

SMALLEST = 2**17  # entries of a weight; below, a call costs more than its product (tiny models, few rows)


def available() -> bool:
    """Whether this build of torch has oneDNN's packed products for x86."""
    ops: Any = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise") and torch.backends.mkl.is_available()
    )


def pack(weight_OI: torch.Tensor) -> torch.Tensor:
    """A copy of a float32 CPU weight in oneDNN's own layout, which only `packed_product` reads."""
    ops: Any = torch.ops.mkldnn
    return ops._reorder_linear_weight(weight_OI)


def packed_product(input: torch.Tensor, packed: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """F.linear on a packed weight."""
    ops: Any = torch.ops.mkldnn
    return ops._linear_pointwise(input, packed, bias_O, "none", [], "")


@contextmanager
def packed_linears(net: nn.Module) -> Iterator[None]:
    """Inside, each plain float32 Linear of `net` packs or casts its weight at its first call and uses it at every call.

    Only for use without gradients. A weight is read in its layer's own forward, as ever; of a sharded network all
    weights are gathered first (sharded.py).
    """
    assert not torch.is_grad_enabled(), "packed weights have no gradient"
    linears = [m for m in net.modules() if isinstance(m, nn.Linear) and type(m) in (nn.Linear, RowsLinear)]
    layers = [m for m in linears if "forward" not in vars(m)]
    for layer in layers:
        layer.forward = partial(_forward, layer, type(layer).forward, {})
    try:
        with whole_weights(net):
            yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _forward(
    layer: nn.Linear, plain: Any, ready: Ready, input: torch.Tensor, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    kind = _kind(layer.weight, input)
    if kind is None:
        return plain(layer, input) if rows is None else plain(layer, input, rows)
    if (kind, rows) not in ready:
        start, stop = rows or (0, layer.weight.shape[0])
        weight_OI = layer.weight[start:stop].detach()
        bias_O = None if layer.bias is None else layer.bias[start:stop].detach().to(kind)
        ready[kind, rows] = pack(weight_OI) if kind == torch.float32 else weight_OI.to(kind), bias_O
    return (packed_product if kind == torch.float32 else F.linear)(input, *ready[kind, rows])


def _kind(weight_OI: torch.Tensor, input: torch.Tensor) -> torch.dtype | None:
    """Autocast's dtype where it casts the weight, float32 where the weight is to be packed, None where neither is."""
    device = weight_OI.device.type
    if weight_OI.dtype != torch.float32 or isinstance(weight_OI, DTensor) or not input.numel():
        return None
    if torch.is_autocast_enabled(device):
        return None if input.dtype == torch.float64 else torch.get_autocast_dtype(device)
    packs = device == "cpu" and type(weight_OI) is nn.Parameter and weight_OI.numel() >= SMALLEST and available()
    return torch.float32 if packs and input.dtype == torch.float32 else None
