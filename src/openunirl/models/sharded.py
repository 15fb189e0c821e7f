"""FSDP2: every process holds a share of the weights, of their gradients and of the optimizer's state.

In: a network and the dotted name of its decoder. Out: the same network, sharded; whole tensors back. A module's weights
are gathered in its own forward: each decoder layer, each embedding and each head by itself, and the rest with the root.
While a sampler runs, all weights stay whole: it makes hundreds of passes, and other processes may make fewer.

torch's own `fully_shard`, because accelerate's FSDP is DDP on a CPU, where this is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from openunirl.models.layers import RowsLinear

K = TypeVar("K", bound=Hashable)


def shard(net: nn.Module, trunk: str) -> None:
    """Shards `net` over all processes, which then lies on their devices: one unit after the other is moved there and
    cut. Every process must hold the same weights."""
    for module in (*units(net, trunk), net):
        fully_shard(module, reshard_after_forward=True)


def units(net: nn.Module, trunk: str) -> list[nn.Module]:
    """What is gathered by itself; the rest is gathered with the root."""
    layers = list(net.get_submodule(trunk).get_submodule("layers").children())
    return [*layers, *(module for module in net.modules() if isinstance(module, RowsLinear | nn.Embedding))]


def empty_copy(net: nn.Module) -> nn.Module:
    """The same network without its weights: `gather_into` gives it some."""
    tensors = (*net.parameters(), *net.buffers())
    empty = {id(t): torch.empty_like(t, device="meta") for t in tensors}
    memo = {
        id(t): nn.Parameter(empty[id(t)], t.requires_grad) if isinstance(t, nn.Parameter) else empty[id(t)]
        for t in tensors
    }
    return copy.deepcopy(net, memo)


def gather_into(plain: nn.Module, net: nn.Module, keep: bool) -> None:
    """All of a sharded network's weights, on the CPU, into its empty copy, by those who `keep` them (`gathered`)."""
    state = gathered(net.state_dict(), keep)
    if keep:
        plain.load_state_dict(state, assign=True)


def gathered(tensors: Mapping[K, torch.Tensor], keep: bool) -> dict[K, torch.Tensor]:
    """All of them whole, on the CPU; every process takes part, and those that do not `keep` them get none. Devices hold
    one whole tensor at a time."""
    kept = {}
    for name, value in tensors.items():
        one = whole(value)
        if keep:
            kept[name] = one.cpu()
    return kept


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, any other as it is; every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a sharded tensor, any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_held(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor of the parameter's shape, sharded as the parameter is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


@contextmanager
def whole_weights(net: nn.Module) -> Iterator[None]:
    """Inside it a sharded network's weights are gathered, and passes exchange nothing."""
    parts = [module for module in net.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
