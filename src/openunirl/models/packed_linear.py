"""Faster Linear layers while a sampler runs on a CPU: weights packed once into oneDNN's blocked layout.

In: a network. Out: the same network, whose float32 nn.Linear layers take their products from oneDNN inside the context.
Products are equal up to the order of additions. On x86 torch takes float32 products from MKL, which lays weights out
anew at every call; a sampler makes hundreds of passes over the same weights (benchmarks/janus_sampling.py measures it).

Departures from torch.utils.mkldnn: activations stay ordinary tensors, and nothing is converted for good. Elsewhere than
on a CPU, in another dtype, under autocast and below SMALLEST the layers stay as they are, and so do subclasses whose
forward is their own. Autocast is looked for at every call: accelerate enters it in the prepared net's forward. The
packed copy takes as much memory as the weights until the context ends. Weights must not change inside it.

Shapes: B rows, I inner, O outer (rows of the weight).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from openunirl.models.layers import RowsLinear
from openunirl.models.sharded import whole_weights

Packed = dict[tuple[int, int] | None, tuple[torch.Tensor, torch.Tensor | None]]  # by the range of rows asked for

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
    """Inside, each plain, large, float32 Linear of `net` packs its weight at its first call and uses it at every call.

    Only for use without gradients. A weight is read in its layer's own forward, as ever; of a sharded network all
    weights are gathered first (sharded.py).
    """
    assert not torch.is_grad_enabled(), "packed weights have no gradient"
    layers = []
    if available():
        large = [m for m in net.modules() if isinstance(m, nn.Linear) and m.in_features * m.out_features >= SMALLEST]
        layers = [m for m in large if type(m) in (nn.Linear, RowsLinear) and "forward" not in vars(m)]
    for layer in layers:
        layer.forward = partial(_forward, layer, type(layer).forward, {})
    try:
        with whole_weights(net):
            yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _forward(
    layer: nn.Linear, plain: Any, packed: Packed, input: torch.Tensor, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    weight_OI = layer.weight
    fits = type(weight_OI) is nn.Parameter and weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32
    fits = fits and input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not fits or not input.numel():
        return plain(layer, input) if rows is None else plain(layer, input, rows)
    if rows not in packed:
        start, stop = rows or (0, weight_OI.shape[0])
        bias_O = None if layer.bias is None else layer.bias[start:stop].detach()
        packed[rows] = pack(weight_OI[start:stop].detach()), bias_O
    return packed_product(input, *packed[rows])
