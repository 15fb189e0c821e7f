"""A GPU that is none: tensors that say "pretend", compute on the CPU, and refuse to meet tensors of the CPU.

    with pretend_gpu():
        model.to("pretend"); ...

What torch refuses on a real GPU (an operation on tensors of two devices) is refused here, with numbers, gradients and
`.item()` as on the CPU, on a machine without one. Not found here: what is wrong in a kernel, in a rounding or in a copy
that has not ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.copy_.default, aten.copy.default)
_INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


class OnGpu(torch.Tensor):
    """Says that it lies on the GPU; `inner` is where it does."""

    inner: torch.Tensor
    made = 0
    """How many there were."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0), requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner.detach() if inner.requires_grad else inner
        OnGpu.made += 1

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Gpu(TorchDispatchMode):
    """Makes what is made with device="pretend"."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    here = [each for each in flat if isinstance(each, OnGpu)]
    device = kwargs.get("device")
    asked = torch.device(device) if device is not None else None
    _check(func, args, flat, bool(here))
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
        if asked.type == "cpu" and here and func not in _COPIES:
            raise RuntimeError(f"{func} makes something on the CPU out of what lies on the GPU")
    made = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if func._schema.is_mutable:
        back = {id(_unwrapped(each)): each for each in flat if isinstance(each, torch.Tensor)}
        resized = [each for each in here if each.inner.shape != each.shape]
        assert not resized, f"{func} changes a shape in place, which this GPU cannot"
        return tree_map(lambda each: back.get(id(each), _wrapped(each, here, asked)), made)
    return tree_map(lambda each: _wrapped(each, here, asked), made)


def _unwrapped(each: Any) -> Any:
    return each.inner if isinstance(each, OnGpu) else each


def _wrapped(each: Any, here: list[OnGpu], asked: torch.device | None) -> Any:
    if not isinstance(each, torch.Tensor) or isinstance(each, OnGpu):
        return each
    there = asked.type == NAME if asked is not None else bool(here)
    return OnGpu(each) if there else each


def _check(func: Any, args: Any, flat: list[Any], here: bool) -> None:
    if not here or func in _COPIES:
        return
    checked = flat
    if func in _INDEXED:
        checked = [args[0], *(args[2:3])] if isinstance(args[0], OnGpu) else flat
    strangers = [
        each for each in checked if isinstance(each, torch.Tensor) and not isinstance(each, OnGpu) and each.ndim
    ]
    if strangers:
        shapes = ", ".join(str(tuple(each.shape)) for each in strangers)
        raise RuntimeError(f"{func}: expected all tensors on one device, found pretend:0 and cpu (cpu: {shapes})")


class _Module(_DummyBackendModule):
    """torch.pretend, as autocast and gradient checkpointing ask for it; numbers are drawn by the CPU."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """For the rest of the process: torch registers a device once."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, _Module())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) then comes by here
    try:
        with _Gpu(), mock.patch.object(torch, "inference_mode", torch.no_grad):  # its views want the CPU's own tensors
            yield torch.device(NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
