"""The floor under a sampler's time: what its matrix products alone would take.

In: the products of each network pass, from shapes. Out: multiply-adds, and the seconds they take at the rate measured
in the same run at the same shapes, by the fastest of torch's routines: for weights what F.linear takes (MKL on x86), or
oneDNN's on weights packed beforehand; for attention two batched products, or torch's own attention (SDPA), softmax
included, which is still faster where there are many queries. A pass is replayed as it comes: its products one after the
other, each layer with weights of its own, so that weights are as cold as they are in the network; no norm, softmax (but
SDPA's), rotation, copy or packing is part of it.

Shapes: m rows, k inner, n columns of a product.
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
    """[m, k] by a weight [k, n]. Example: Product(m=8, k=512, n=16384)"""

    m: int
    k: int
    n: int

    @property
    def madds(self) -> int:
        return self.m * self.k * self.n

    def call(self, packed: bool, fused: bool) -> Callable[[], object]:
        """The product of random operands; `packed` tells how the weight is laid out."""
        left, weight = torch.randn(self.m, self.k), torch.randn(self.n, self.k)
        return partial(packed_product, left, pack(weight), None) if packed else partial(F.linear, left, weight)

    def gradients(self) -> tuple[Product, ...]:
        """What the backward pass multiplies: the gradients of the two sides."""
        return Product(m=self.m, k=self.n, n=self.k), Product(m=self.n, k=self.m, n=self.k)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Queries by keys and the result by values, of `rows` rows of all heads; or the gradients of both.

    Example: Attention(rows=4, heads=8, queries=258, keys=268, size=64)
    """

    rows: int
    heads: int
    queries: int
    keys: int
    size: int
    backward: bool = False

    @property
    def madds(self) -> int:
        return (4 if self.backward else 2) * self.rows * self.heads * self.queries * self.keys * self.size

    def call(self, packed: bool, fused: bool) -> Callable[[], object]:
        """On random operands; `fused`: by SDPA."""
        if fused:
            query, key, value = (
                torch.randn(self.rows, self.heads, n, self.size) for n in (self.queries, self.keys, self.keys)
            )
            if not self.backward:
                return partial(F.scaled_dot_product_attention, query, key, value)
            sides = [one.requires_grad_() for one in (query, key, value)]
            with torch.enable_grad():
                out = F.scaled_dot_product_attention(*sides)
            return partial(torch.autograd.grad, out, sides, torch.randn_like(out), retain_graph=True)
        queries, keys, size = self.queries, self.keys, self.size
        shapes = [(queries, size, keys), (queries, keys, size)]
        if self.backward:
            shapes = [side for m, k, n in shapes for side in ((m, n, k), (n, m, k))]
        pairs = [self._operands(*shape) for shape in shapes]
        return lambda: [torch.bmm(left, right) for left, right in pairs]

    def _operands(self, m: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.rows * self.heads
        return torch.randn(batch, m, k), torch.randn(batch, n, k).transpose(1, 2)

    def gradients(self) -> tuple[Attention, ...]:
        return (replace(self, backward=True),)


Work = Product | Attention


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A network pass and how often it is taken. Example: Pass(name="step", products=(...), times=255)"""

    name: str
    products: tuple[Work, ...]
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

    def products(self, rows: int, queries: int, keys: int, read: int | None = None) -> tuple[Work, ...]:
        """All layers, for `queries` new positions of each row that attend to `keys` positions. The last layer's output
        is wanted at `read` of the new positions (all where it is None): its keys and values are needed at all of them,
        and nothing else is."""
        one = Block(rows=rows, positions=queries, keys=keys, read=queries if read is None else read)
        return self.layer([replace(one, read=queries)]) * (self.layers - 1) + self.layer([one])

    def layer(self, blocks: Sequence[Block]) -> tuple[Work, ...]:
        """One layer of which each block's `read` positions are wanted; all blocks meet a weight together."""
        width, m = self.hidden, sum(block.rows * block.read for block in blocks)
        both = (Product(m=sum(block.rows * block.positions for block in blocks), k=width, n=width),) * 2
        if not m:
            return both
        return (
            *both,
            Product(m=m, k=width, n=width),
            *(
                Attention(rows=b.rows, heads=self.heads, queries=b.read, keys=b.keys, size=width // self.heads)
                for b in blocks
                if b.read
            ),
            Product(m=m, k=width, n=width),
            *(Product(m=m, k=width, n=n) for n in self.mlp),
            Product(m=m, k=self.mlp[0], n=width),
        )


@dataclass(frozen=True, kw_only=True)
class Block:
    """`positions` of each of `rows` rows, which attend to `keys` positions on average, and `read` of which are wanted
    of the last layer. Example: Block(rows=8, positions=258, keys=268, read=256)
    """

    rows: int
    positions: int
    keys: int
    read: int


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
        weights = {"MKL": False} | ({"oneDNN": True} if available() else {})
        self.routines = {name: (packed, False) for name, packed in weights.items()}
        self.routines |= {f"{name}, SDPA": (packed, True) for name, packed in weights.items()}
        self.taken: list[dict[str, list[float]]] = [{name: [] for name in self.routines} for _ in passes]

    @torch.no_grad()
    def measure(self) -> None:
        home = torch.device("cpu")  # of the operands
        for one, taken in zip(self.passes, self.taken, strict=True):
            for name, (packed, fused) in self.routines.items():
                if fused and not any(isinstance(product, Attention) for product in one.products):
                    continue
                calls = [product.call(packed, fused) for product in one.products]
                clocked = [clock(lambda calls=calls: [call() for call in calls], home) for _ in range(self.repeats + 1)]
                taken[name].extend(seconds(one) for one in clocked[1:])

    def fastest(self) -> list[tuple[str, float]]:
        """For each pass the fastest routine and its median seconds."""
        medians = [{name: statistics.median(times) for name, times in taken.items() if times} for taken in self.taken]
        return [min(each.items(), key=lambda item: item[1]) for each in medians]

    def floor(self) -> Floor:
        """Counted multiply-adds over the median rate of each pass."""
        seconds = sum(one.times * best for one, (_, best) in zip(self.passes, self.fastest(), strict=True))
        return Floor(madds=sum(one.madds for one in self.passes), seconds=seconds)

    def table(self) -> str:
        rows = []
        for one, taken, (name, best) in zip(self.passes, self.taken, self.fastest(), strict=True):
            other = "  ".join(f"{n} {statistics.median(t) * 1e3:.3f}" for n, t in taken.items() if t and n != name)
            rate = one.madds / one.times / best / 1e9
            rows.append(
                f"  {one.name:<28} {one.times:6g} x {best * 1e3:9.3f} ms {name:<12} {rate:6.1f} G/s   ({other})"
            )
        return "\n".join(rows)


def causal(positions: int) -> int:
    """The keys that each of so many positions attends to on average, where none sees what comes after it."""
    return (positions + 1) // 2


def training(decoder: Decoder, blocks: Sequence[Block], head: tuple[Product, ...]) -> list[Pass]:
    """Forward and backward of the blocks' rows and of a head's products. One layer's operands are made and counted for
    all but the last: a training pass' products are too large for warm weights to matter."""
    layer, last = decoder.layer([replace(block, read=block.positions) for block in blocks]), decoder.layer(blocks)
    return [
        Pass(name="a layer, forward", products=layer, times=decoder.layers - 1),
        Pass(name="a layer, backward", products=gradients(layer), times=decoder.layers - 1),
        Pass(name="the last layer, forward", products=last),
        Pass(name="the last layer, backward", products=gradients(last)),
        Pass(name="head, forward", products=head),
        Pass(name="head, backward", products=gradients(head)),
    ]


def gradients(products: Sequence[Work]) -> tuple[Work, ...]:
    return tuple(side for product in products for side in product.gradients())


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
