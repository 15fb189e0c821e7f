"""What every adapter does in the same way: it lives on a device, and keeps the frozen base beside the policy.

In: a network that is trained and an image tokenizer that is not. Out: `device`, `to`, `freeze_reference`, `reference`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import nn


class Adapter:
    """`net` is trained; `image_tokenizer` is frozen; `reference()` swaps in the frozen base."""

    def __init__(self, net: nn.Module, image_tokenizer: nn.Module) -> None:
        self.net = net
        image_tokenizer.eval().requires_grad_(False)
        self._parts = (image_tokenizer,)
        self.reference_net: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device) -> Self:
        for module in (self.net, *self._parts, self.reference_net):
            if module is not None:
                nn.Module.to(module, device)
        return self

    def freeze_reference(self) -> None:
        """Copies the present weights: they are the base that `reference()` scores with."""
        self.reference_net = copy.deepcopy(self.net).requires_grad_(False)

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self.reference_net is None:
            raise ValueError("reference() needs freeze_reference() to be called on the base first")
        policy, self.net = self.net, self.reference_net
        try:
            yield
        finally:
            self.net = policy
