"""What a piece of torch code would cost, from running it without numbers: multiply-adds, bytes moved, bytes alive.

In: code on tensors that have a shape and a dtype but no numbers (torch's FakeTensor). Out: a Ledger, by phase. A
storage counts from the operation that makes it until the last tensor, the autograd graph's included, lets go of it, so
a peak is that of torch's own allocator; what a kernel takes for itself while it runs is not in it.

Whole numbers and truths that code decides by (ids, masks, lengths, which token was drawn) are real. Where a decision
hangs on a number that is not there, one is made up: of places the second (an answer's token that does not end it; the
first row takes the place `first`), a number is finite, any other comparison is false, a loss is one half.

Shapes: m, k, n of a product [m, k] x [k, n]: m*k*n multiply-adds.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

SMALL = 2**20
"""Entries up to which a table that code may look into stays real; larger ones (one-hots, noise) only have a shape."""

_aten: Any = torch.ops.aten
_prim: Any = torch.ops.prim
_HERE = torch.device("cpu")


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

    _known: ClassVar[dict[Any, tuple[_Made, ...]]] = {}  # what torch said of operations on shapes, for all ledgers
    _costs: ClassVar[dict[Any, tuple[int, int]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.phases: dict[str, Phase] = defaultdict(Phase)
        self.phase = ""
        self.live = 0
        self.first = 1
        self._held: dict[int, int] = {}

    # ------------------------------------------------------------------------------------------ tensors in it

    def absent(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape, dtype and strides of `like`, without numbers; it counts as alive from here on."""
        with _disable_current_modes():
            made = self._empty(like.shape, like.stride(), like.dtype)
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

    def _empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return FakeTensor(self.fake, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), _HERE)

    def _own(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._held[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, storage: int) -> None:
        self.live -= self._held.pop(storage)

    # --------------------------------------------------------------------------------------------- operations

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and torch's guard against it takes as long as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, given = kwargs or {}, []
        if func is _prim.device.default:
            return args[0].fake_device
        signature = func, _signature(args, given), _signature(tuple(kwargs.items()), given)
        absent = any(isinstance(t, FakeTensor) for t in given)
        if func is _aten._local_scalar_dense.default and absent:
            return _scalar(args[0])
        if not absent:
            out = func(*args, **kwargs)
            out = tree_map_only(torch.Tensor, lambda t: self.absent(t) if _large(t) and not _is_view(func) else t, out)
        elif _is_view(func):  # by one way always: torch has another with other strides where a dimension is 1
            with in_kernel_invocation_manager(self.fake):
                out = func(*args, **kwargs)
            out = tree_map_only(torch.Tensor, lambda t: FakeTensor(self.fake, t, _HERE), out)
        elif (known := self._known.get(signature)) is not None:
            out = self._again(known, func, args)
        else:
            out = self._first(func, args, kwargs, given, signature)
        made = _tensors(out)
        for tensor in made:
            self._own(tensor)
        phase = self.phases[self.phase]
        phase.peak = max(phase.peak, self.live)
        if not _is_view(func):
            cost = self._costs.get(signature)
            if cost is None:
                cost = madds(func, args, kwargs, out), sum(map(_bytes, given)) + sum(map(_bytes, made))
                self._costs[signature] = cost
            phase.moves[cost] += 1
        return out

    def _first(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], signature: Any) -> Any:
        """An operation that was not seen before: torch works out what comes of it."""
        out = func(*args, **kwargs)
        if _in_place(func):
            self._known[signature] = ()
            return out
        below = given[0].shape[-1] if func in _CHOICES else 0

        def told(t: torch.Tensor) -> _Made:
            return _Made(t.shape, t.stride(), t.dtype, below, func in _TRUE)

        made = tuple(map(told, _tensors(out)))
        if all(isinstance(t, torch.Tensor) for t in (out if isinstance(out, tuple | list) else (out,))):
            self._known[signature] = made
        return tree_map_only(torch.Tensor, lambda t: self._settled(told(t)), out)

    def _again(self, known: tuple[_Made, ...], func: Any, args: Any) -> Any:
        """The same without asking torch."""
        if not known:  # in place: what is changed is what comes out
            return args[0] if func._schema.returns else None
        out = tuple(map(self._settled, known))
        single = len(func._schema.returns) == 1 and str(func._schema.returns[0].type) == "Tensor"
        return out[0] if single else out if len(func._schema.returns) > 1 else list(out)

    def _settled(self, made: _Made) -> torch.Tensor:
        """The result of an operation on numbers that are not there: real where code may look at it, absent where it is
        large."""
        if math.prod(made.shape) <= SMALL:
            if made.dtype == torch.bool:
                return torch.full(made.shape, made.true)
            if made.below and not made.dtype.is_floating_point:  # a float: the sorted values beside their places
                chosen = torch.full(made.shape, min(1, made.below - 1), dtype=made.dtype)
                torch.atleast_1d(chosen)[:1] = min(self.first, made.below - 1)
                return chosen
        return self._empty(made.shape, made.stride, made.dtype)


class _Made(NamedTuple):
    """A result; `below`: it is a place among so many; `true`: what it says where it is a truth."""

    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype
    below: int
    true: bool


_CHOICES = {
    _aten.argmax.default,
    _aten.searchsorted.Tensor,
    _aten.sort.default,
    _aten.sort.stable,
    _aten.argsort.default,
    _aten.topk.default,
}
"""Operations that pick a place in the last dimension of their first argument."""
_TRUE = {_aten.all.default, _aten.eq.Tensor, _aten.ne.Scalar}
"""Truths that torch.isfinite is made of: x equals itself and is not infinite, all over."""


def _scalar(tensor: torch.Tensor) -> Any:
    """A made-up number of the tensor's own kind."""
    return 0.5 if tensor.is_floating_point() else False if tensor.dtype == torch.bool else 1


def _signature(value: Any, given: list[torch.Tensor]) -> Any:
    """All that the shapes of an operation's results hang on; its tensors are added to `given`."""
    if isinstance(value, torch.Tensor):
        given.append(value)
        return value.shape, value.stride(), value.dtype, type(value)
    if isinstance(value, tuple | list):
        return tuple([_signature(part, given) for part in value])
    return type(value), value


def _tensors(out: Any) -> list[torch.Tensor]:
    return [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, torch.Tensor)]


def _large(tensor: torch.Tensor) -> bool:
    return tensor.numel() > SMALL


@cache
def _in_place(func: Any) -> bool:
    return func._schema.is_mutable


@cache
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
