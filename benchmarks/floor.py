"""The floor under a sampler's time: what its matrix products alone would take.

In: the products of each network pass, from shapes. Out: multiply-adds, and the seconds they take at the rate measured
in the same run at the same shapes, by the faster of torch's two routines: what F.linear takes (MKL on x86), or oneDNN's
on weights packed beforehand. A pass is replayed as it comes: its products one after the other, each layer with weights
of its own, so that weights are as cold as they are in the network; no norm, softmax, rotation, copy or packing is part
of it.

Shapes: m rows, k inner, n columns of a product; H hidden.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional as F

from openunirl.models.packed_linear import available, pack, packed_product
from timing import clock, seconds


@dataclass(frozen=True, kw_only=True)
class Product:
    """[m, k] by [k, n]; `batch` of them at once where the right-hand side is no weight (attention).

    Example: Product(m=8, k=512, n=16384)
    """

    m: int
    k: int
    n: int
    batch: int = 0

    @property
    def madds(self) -> int:
        return self.m * self.k * self.n * max(self.batch, 1)

    def call(self, packed: bool) -> Callable[[], torch.Tensor]:
        """The product of random operands; `packed` tells how a weight is laid out."""
        if self.batch:
            right = torch.randn(self.batch, self.n, self.k).transpose(1, 2)
            return partial(torch.bmm, torch.randn(self.batch, self.m, self.k), right)
        left, weight = torch.randn(self.m, self.k), torch.randn(self.n, self.k)
        return partial(packed_product, left, pack(weight), None) if packed else partial(F.linear, left, weight)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A network pass and how often it is taken. Example: Pass(name="step", products=(...), times=255)"""

    name: str
    products: tuple[Product, ...]
    times: float = 1

    @property
    def madds(self) -> float:
        return self.times * sum(product.madds for product in self.products)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder's sizes. `mlp` lists the widths that a layer's hidden state is mapped to before it is mapped back:
    (F, F) for a gated one.

    Example: Decoder(hidden=512, layers=8, heads=8, mlp=(1408, 1408))
    """

    hidden: int
    layers: int
    heads: int
    mlp: tuple[int, ...]

    def products(self, rows: int, queries: int, keys: int, read: int | None = None) -> tuple[Product, ...]:
        """All layers, for `queries` new positions of each row that attend to `keys` positions. The last layer's output
        is wanted at `read` of the new positions (all where it is None): its keys and values are needed at all of them,
        and nothing else is."""
        last = self._layer(rows, queries, keys, queries if read is None else read)
        return self._layer(rows, queries, keys, queries) * (self.layers - 1) + last

    def _layer(self, rows: int, positions: int, keys: int, read: int) -> tuple[Product, ...]:
        width, head = self.hidden, self.hidden // self.heads
        both = (Product(m=rows * positions, k=width, n=width),) * 2
        if not read:
            return both
        m = rows * read
        return (
            *both,
            Product(m=m, k=width, n=width),
            Product(m=read, k=head, n=keys, batch=rows * self.heads),
            Product(m=read, k=keys, n=head, batch=rows * self.heads),
            Product(m=m, k=width, n=width),
            *(Product(m=m, k=width, n=n) for n in self.mlp),
            Product(m=m, k=self.mlp[0], n=width),
        )


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Multiply-adds, and the seconds that they take. Example: Floor(madds=7e10, seconds=2.1)"""

    madds: float
    seconds: float

    def __str__(self) -> str:
        rate = self.madds / self.seconds / 1e9
        return f"{self.madds / 1e9:.2f} G multiply-adds at {rate:.1f} G/s"


class Replay:
    """Times the products of passes; call `measure` once a turn."""

    def __init__(self, passes: Sequence[Pass], repeats: int = 3) -> None:
        self.passes, self.repeats = passes, repeats
        self.routines = {"MKL": False} | ({"oneDNN": True} if available() else {})
        self.taken: list[dict[str, list[float]]] = [{name: [] for name in self.routines} for _ in passes]

    @torch.no_grad()
    def measure(self) -> None:
        home = torch.device("cpu")  # of the operands
        for one, taken in zip(self.passes, self.taken, strict=True):
            for name, packed in self.routines.items():
                calls = [product.call(packed) for product in one.products]
                clocked = [clock(lambda calls=calls: [call() for call in calls], home) for _ in range(self.repeats + 1)]
                taken[name].extend(seconds(one) for one in clocked[1:])

    def fastest(self) -> list[tuple[str, float]]:
        """For each pass the fastest routine and its median seconds."""
        medians = [{name: statistics.median(times) for name, times in taken.items()} for taken in self.taken]
        return [min(each.items(), key=lambda item: item[1]) for each in medians]

    def floor(self) -> Floor:
        """Counted multiply-adds over the median rate of each pass."""
        seconds = sum(one.times * best for one, (_, best) in zip(self.passes, self.fastest(), strict=True))
        return Floor(madds=sum(one.madds for one in self.passes), seconds=seconds)

    def table(self) -> str:
        rows = []
        for one, taken, (name, best) in zip(self.passes, self.taken, self.fastest(), strict=True):
            other = "  ".join(f"{n} {statistics.median(t) * 1e3:.3f}" for n, t in taken.items() if n != name)
            rate = one.madds / one.times / best / 1e9
            rows.append(f"  {one.name:<28} {one.times:6g} x {best * 1e3:9.3f} ms {name:<6} {rate:6.1f} G/s   ({other})")
        return "\n".join(rows)


def training(decoder: Decoder, rows: int, positions: int, read: int, head: tuple[Product, ...]) -> list[Pass]:
    """Forward and backward of `rows` of `positions` that all attend to each other, and of a head's products; of the
    last layer's output `read` positions of each row are wanted. One layer's operands are made and counted for all but
    the last: a training pass' products are too large for warm weights to matter."""
    layer = replace(decoder, layers=1).products(rows, positions, positions)
    last = replace(decoder, layers=1).products(rows, positions, positions, read)
    return [
        Pass(name="a layer, forward", products=layer, times=decoder.layers - 1),
        Pass(name="a layer, backward", products=gradients(layer), times=decoder.layers - 1),
        Pass(name="the last layer, forward", products=last),
        Pass(name="the last layer, backward", products=gradients(last)),
        Pass(name="head, forward", products=head),
        Pass(name="head, backward", products=gradients(head)),
    ]


def gradients(products: Sequence[Product]) -> tuple[Product, ...]:
    """What the backward pass multiplies: for each product the gradients of its two sides."""
    left = (Product(m=p.m, k=p.n, n=p.k, batch=p.batch) for p in products)
    right = (Product(m=p.n, k=p.m, n=p.k, batch=p.batch) for p in products)
    return (*left, *right)


def steps(decoder: Decoder, rows: int, first: int, count: int, extra: tuple[Product, ...], parts: int) -> list[Pass]:
    """`count` passes of one position a row, the first of which attends to `first` keys: `parts` passes of equal share,
    each at the middle of its lengths. `extra` are the products before and after the decoder."""
    size = count / parts
    passes = []
    for part in range(parts):
        keys = round(first + (part + 0.5) * size)
        products = decoder.products(rows, 1, keys) + extra
        passes.append(Pass(name=f"one position, {keys} keys", products=products, times=size))
    return passes
