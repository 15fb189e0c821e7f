"""What a piece of torch code would cost, from running it without numbers: multiply-adds, bytes moved, bytes alive.

In: code on tensors that have a shape and a dtype but no numbers (torch's FakeTensor). Out: a Ledger, by phase. A
storage counts from the operation that makes it until the last tensor, the autograd graph's included, lets go of it, so
a peak is that of torch's own allocator; what a kernel takes for itself while it runs is not in it.

Whole numbers and truths that code decides by (ids, masks, lengths, which token was drawn) are real. Where a decision
hangs on a number that is not there, one is made up: a token at random, a comparison is false, a loss is one half.

Shapes: m, k, n of a product [m, k] x [k, n]: m*k*n multiply-adds.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SMALL = 2**20
"""Entries up to which a table that code may look into stays real; larger ones (one-hots, noise) only have a shape."""

_aten: Any = torch.ops.aten


@dataclass
class Phase:
    """What was done under one name. Example: Phase(peak=2**30) is one whose worst moment was at 1 GiB.

    `moves` counts (multiply-adds, bytes read and written) of operations, so that each can be timed by what bounds it.
    """

    peak: int = 0
    moves: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def madds(self) -> int:
        return sum(madds * times for (madds, _), times in self.moves.items())

    def seconds(self, madds_per_second: float, bytes_per_second: float) -> float:
        """Each operation takes the longer of its arithmetic and its traffic."""
        return sum(
            times * max(madds / madds_per_second, moved / bytes_per_second)
            for (madds, moved), times in self.moves.items()
        )


class Ledger(TorchDispatchMode):
    """Counts all that torch does inside `with ledger:`, under the phase that `ledger.phase` names.

    Example: with ledger: work(); ledger.phases["update"].peak
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.phases: dict[str, Phase] = defaultdict(Phase)
        self.phase = ""
        self.live = 0
        self._held: dict[int, int] = {}
        self._made_up = torch.Generator().manual_seed(0)

    # ------------------------------------------------------------------------------------------ tensors in it

    def absent(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape, dtype and strides of `like`, without numbers; it counts as alive from here on."""
        with self.fake:
            made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
        self._own(made)
        return made

    def adopt(self, module: nn.Module) -> int:
        """Takes the numbers out of all weights and tables of `module`; returns their bytes."""
        before = self.live
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = nn.Parameter(self.absent(weight.detach()), weight.requires_grad)
            for name, table in part._buffers.items():
                if table is not None:
                    part._buffers[name] = self.absent(table)
        return self.live - before

    def _own(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._held or tensor.device.type == "meta":
            return
        self._held[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, storage: int) -> None:
        self.live -= self._held.pop(storage)

    # --------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        absent = any(isinstance(t, FakeTensor) for t in given)
        if func is _aten._local_scalar_dense.default and absent:
            return _scalar(args[0])
        out = func(*args, **kwargs)
        decided = absent and not _in_place(func)
        out = tree_map_only(torch.Tensor, lambda t: self._settled(func, t, given, decided), out)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for tensor in made:
            self._own(tensor)
        phase = self.phases[self.phase]
        phase.peak = max(phase.peak, self.live)
        if not _is_view(func):
            phase.moves[madds(func, args, kwargs, out), sum(map(_bytes, given)) + sum(map(_bytes, made))] += 1
        return out

    def _settled(self, func: Any, tensor: torch.Tensor, given: list[torch.Tensor], decided: bool) -> torch.Tensor:
        """The result of an operation: real where code may look at it, absent where it is large."""
        if not isinstance(tensor, FakeTensor):
            return self.absent(tensor) if tensor.numel() > SMALL and not _is_view(func) else tensor
        if not decided or _is_view(func) or tensor.numel() > SMALL:
            return tensor
        if tensor.dtype == torch.bool:
            return torch.zeros(tensor.shape, dtype=torch.bool)
        if func not in _CHOICES or tensor.is_floating_point():  # such as the sorted values beside their places
            return tensor
        return torch.randint(given[0].shape[-1], tensor.shape, generator=self._made_up, dtype=tensor.dtype)


_CHOICES = {
    _aten.argmax.default,
    _aten.searchsorted.Tensor,
    _aten.sort.default,
    _aten.sort.stable,
    _aten.argsort.default,
    _aten.topk.default,
}
"""Operations that pick a place in the last dimension of their first argument."""


def _scalar(tensor: torch.Tensor) -> Any:
    """A made-up number of the tensor's own kind."""
    return 0.5 if tensor.is_floating_point() else False if tensor.dtype == torch.bool else 1


def _in_place(func: Any) -> bool:
    return func._schema.is_mutable


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _bytes(tensor: torch.Tensor) -> int:
    """Of the entries that are really there: an expanded dimension is read from one place."""
    seen = math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
    return seen * tensor.element_size()


# ------------------------------------------------------------------------------------------- multiply-adds


def madds(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> int:
    """Of one operation; 0 for all that is no product."""
    count = _PRODUCTS.get(func)
    return count(args, kwargs, out) if count else 0


def _product(left: int) -> Callable[..., int]:
    def count(args: Any, kwargs: Any, out: torch.Tensor) -> int:
        return out.numel() * args[left].shape[-1]

    return count


def _convolution(args: Any, kwargs: Any, out: torch.Tensor) -> int:
    weight, transposed = args[1], args[6]
    one = math.prod(weight.shape[2:]) * weight.shape[1]  # for each output entry (transposed: each input entry)
    return (args[0].numel() if transposed else out.numel()) * one


def _convolution_backward(args: Any, kwargs: Any, out: Any) -> int:
    gradient, input, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    one = math.prod(weight.shape[2:]) * weight.shape[1]
    return (input.numel() if transposed else gradient.numel()) * one * (wanted[0] + wanted[1])


def _attention(products: int) -> Callable[..., int]:
    """Scores and their use: 2 products forward; backward makes the scores again: 5."""

    def count(args: Any, kwargs: Any, out: Any) -> int:
        query, key = args[:2] if products == 2 else args[1:3]
        return products * query.numel() * key.shape[-2]

    return count


_PRODUCTS: dict[Any, Callable[..., int]] = {
    _aten.mm.default: _product(0),
    _aten.addmm.default: _product(1),
    _aten.bmm.default: _product(0),
    _aten.baddbmm.default: _product(1),
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _attention(2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention(5),
}


@contextmanager
def naming(ledger: Ledger, phase: str) -> Iterator[None]:
    """What is done inside counts under `phase`."""
    ledger.phase, before = phase, ledger.phase
    try:
        yield
    finally:
        ledger.phase = before
