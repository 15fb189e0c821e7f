"""What every adapter does in the same way: it lives on a device, keeps the frozen base beside the policy, and trains
all of its network or LoRA's matrices in it.

In: a network that is trained and an image tokenizer that is not. Out: `device`, `to`, `freeze_reference`,
`add_adapters`, `reference`, the trained weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from openunirl.config import LoraConfig
from openunirl.models import autoregressive, checkpoints, lora, masked
from openunirl.models.compiled import compile_layers
from openunirl.models.recompute import recompute
from openunirl.models.sharded import as_held
from openunirl.types import ImageSampling

REFERENCE = "reference/model.safetensors"
"""Where a checkpoint keeps a base that has followed the policy: in a folder of its own, which no loader reads along."""


PIXELS_AT_ONCE = 2**16
"""A CPU decodes so many pixels at a time: a tokenizer's widest layers then stay in its caches (docs/performance.md)."""


class Adapter:
    """`net` is trained; `image_tokenizer` is frozen; `reference()` swaps in the frozen base.

    A family names the part of its network that holds the decoder's `layers`, and those that are not to be learned in
    self-improvement.
    """

    trunk: ClassVar[str]
    draws_tokens_in_turn: ClassVar[bool]
    unlearned: ClassVar[tuple[str, ...]] = ()
    prompting: Any

    def __init__(self, net: nn.Module, image_tokenizer: nn.Module) -> None:
        self.net = net
        image_tokenizer.eval().requires_grad_(False)
        self._parts = (image_tokenizer,)
        self.reference_net: nn.Module | None = None
        self.has_lora = False
        self.base_moved = False
        self._rests: torch.device | None = None

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """Moves everything, but for a sharded network; `dtype` is then that of the network, and not of the image
        tokenizer."""
        for module in (self.net, self.reference_net):
            if module is not None and not isinstance(module, FSDPModule):
                nn.Module.to(module, device, dtype)
        for module in self._parts:
            nn.Module.to(module, device)
        return self

    def decode_few(
        self, decode: Callable[[torch.Tensor], torch.Tensor], tokens_BN: torch.Tensor, patch_size: int
    ) -> torch.Tensor:
        """`decode` of all images' tokens, on a CPU a few images at a time. Not for gradients: they keep all parts."""
        tokens_BN = tokens_BN.to(self.device)
        few = max(1, PIXELS_AT_ONCE // (tokens_BN.shape[1] * patch_size**2))
        parts = tokens_BN.split(few) if self.device.type == "cpu" else (tokens_BN,)
        return torch.cat([decode(part) for part in parts])

    def check_sampling(self, sampling: ImageSampling) -> None:
        """Errors: ValueError for a sampling that the family's sampler cannot follow."""
        (autoregressive if self.draws_tokens_in_turn else masked).check(sampling)

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        """The words that the text tokenizer has no ids for, in order of appearance."""
        tokenizer = self.prompting.tokenizer
        if tokenizer.unk_token_id is None:
            return []
        words = dict.fromkeys(word for text in texts for word in text.split())
        return [
            word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]
        ]

    # ------------------------------------------------------------------------------------------ the frozen base

    def freeze_unlearned(self) -> None:
        """From here on nothing is trained that is not to be learned in self-improvement."""
        for name in self.unlearned:
            self.net.get_submodule(name).requires_grad_(False)

    def freeze_reference(self, *, dtype: torch.dtype | None = None, rests_on: torch.device | None = None) -> None:
        """Copies the present weights: they are the base that `reference()` scores with. The copy may have its own
        dtype, and a device where it rests while it does not score."""
        self.freeze_unlearned()
        self.reference_net = copy.deepcopy(self.net).requires_grad_(False)
        if dtype is not None:
            nn.Module.to(self.reference_net, dtype)
        self._rests = rests_on

    def sync_reference(self) -> None:
        """The policy's present weights become the base's. Errors: ValueError where the base is no copy (LoRA)."""
        if self.reference_net is None:
            raise ValueError("sync_reference() needs a copy of the base: call freeze_reference() first")
        with torch.no_grad():
            for held, weight in zip(self.reference_net.parameters(), self.net.parameters(), strict=True):
                held.copy_(weight)
        self.base_moved = True

    def blend_with_base(self, alpha: float, read_base: Callable[[], Adapter]) -> None:
        """The policy becomes the base plus `alpha` of what training added to it, weight by weight; adapters become
        `alpha` of themselves. `read_base` reads the model that training began with, where its weights are needed.

        Source: WiSE-FT (arXiv 2109.01903), which mixes a whole network; so does this, but for what was never trained.
        """
        if self.has_lora:
            lora.scale(self.net, alpha)
            return
        began_with = read_base().net
        with torch.no_grad():
            for base, weight in zip(began_with.parameters(), self.net.parameters(), strict=True):
                base = as_held(base.detach().to(weight.device, weight.dtype), weight)
                weight.copy_(torch.lerp(base, weight, alpha))

    def add_adapters(self, config: LoraConfig, seed: int) -> None:
        """From here on LoRA's matrices are trained and nothing else; the frozen base is the network without them.

        Errors: ValueError for a target that names no layer.
        """
        self.freeze_unlearned()
        lora.add_adapters(self.net, self.trunk, config, seed)
        self.has_lora = True

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self.has_lora:
            with lora.without_adapters(self.net):
                yield
            return
        if self.reference_net is None:
            raise ValueError("reference() needs freeze_reference() to be called on the base first")
        policy, home = self.net, self.device
        if self._rests is not None:
            nn.Module.to(self.reference_net, home)
        self.net = self.reference_net
        try:
            yield
        finally:
            self.net = policy
            self.rest()

    def rest(self) -> None:
        """Sends the copy of the base to where it rests."""
        if self._rests is not None and self.reference_net is not None:
            nn.Module.to(self.reference_net, self._rests)

    # --------------------------------------------------------------------------------------- training, weights

    def compile_layers(self, backend: str = "inductor") -> None:
        """From here on torch.compile runs the decoder's layers, of policy and base, where no cache is filled."""
        for net in filter(None, (self.net, self.reference_net)):
            compile_layers(net.get_submodule(self.trunk).get_submodule("layers").children(), backend)

    def recompute_activations(self) -> None:
        """From here on the decoder's layers keep nothing but their input for the backward pass."""
        recompute(self.net.get_submodule(self.trunk).get_submodule("layers").children())

    def settle_tokenizer(self, pixels_BCHW: torch.Tensor) -> None:
        """Nothing to do for a tokenizer without a learned codebook."""

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The network's weights under its own names, adapters merged."""
        return lora.merged_state(self.net) if self.has_lora else self.net.state_dict()

    def save_adapters(self, path: Path) -> None:
        """Adapters alone beside the merged weights, where there are any: training continues from them."""
        if self.has_lora:
            lora.save(self.net, path / lora.FOLDER)

    def load_weights(self, path: Path) -> None:
        """Replaces what is trained by what is in a folder that `save` wrote.

        Errors: ValueError where one was trained with adapters and the other is not.
        """
        if self.has_lora:
            lora.load(self.net, path / lora.FOLDER)
            return
        if (path / lora.FOLDER).is_dir():
            raise ValueError(
                f"{path} was trained with adapters: continue it with its own --lora.rank and --lora.targets"
            )
        checkpoints.load_strictly(self.net, self.read_trained(path), path)

    def save_reference(self, path: Path) -> None:
        """The base's weights beside the policy's, where they are no longer those of the model that was loaded."""
        if not self.base_moved:
            return
        (path / REFERENCE).parent.mkdir()
        with self.reference():
            checkpoints.write_state(path / REFERENCE, self.net.state_dict())

    def load_reference(self, path: Path) -> None:
        """What `save_reference` wrote, if it did."""
        if (path / REFERENCE).exists() and self.reference_net is not None:
            checkpoints.load_strictly(self.reference_net, checkpoints.read_state(path / REFERENCE), path)
            self.base_moved = True

    @staticmethod
    def read_trained(path: Path) -> dict[str, torch.Tensor]:
        """The weights of the network, from a folder that `save` wrote."""
        raise NotImplementedError
