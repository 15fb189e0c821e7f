"""LoRA: small trainable matrices beside frozen linear layers, by peft. The frozen base is the network without them.

In: a network, which of its layers, rank and alpha. Out: the same network with adapters in it, the plain weights that it
amounts to, and a folder in peft's own layout from which training continues.

Source: LoRA (arXiv 2106.09685). Departures: 1. no dropout: the policy must score as it drew; 2. the frozen base is
scored by leaving the adapters out, without a second copy; 3. heads and embeddings that compute single rows carry none.

An adapter starts at exactly 0: the policy is then its own base, and the KL 0, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openunirl.config import LoraConfig
from openunirl.models.checkpoints import read_state, write_state

FOLDER = "adapter"
"""Where a checkpoint keeps its adapters, beside the merged weights."""
_PREFIX, _NAME = "base_model.model.", ".default."  # of peft's files, of its modules


def add_adapters(net: nn.Module, trunk: str, config: LoraConfig, seed: int) -> None:
    """Freezes `net` and puts adapters into it; the same seed gives the same adapters.

    Errors: ValueError for a target that names no layer.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    names = chosen_layers(net, trunk, config.targets)
    net.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # peft initialises from the global generator
        inject_adapter_in_model(
            PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names, lora_dropout=0.0),  # type: ignore[arg-type]
            net,
        )


def chosen_layers(net: nn.Module, trunk: str, targets: Sequence[str]) -> list[str]:
    """Full names of the linear layers that end in one of `targets`; without targets, all in the layers of `trunk`."""
    linear = [n for n, m in net.named_modules() if type(m) is nn.Linear and m.weight.requires_grad]
    if not targets:
        return [name for name in linear if name.startswith(f"{trunk}.layers.")]
    for target in targets:
        if not any(_ends(name, target) for name in linear):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise ValueError(f"--lora.targets {target}: no layer that can carry an adapter ends so; known: {known}")
    return [name for name in linear if any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


@contextmanager
def without_adapters(net: nn.Module) -> Iterator[None]:
    """Inside it `net` is the frozen base. (peft's own switch also turns gradients off, for good where weights are
    sharded; this one only changes what the forward computes.)"""
    layers = adapted(net)
    for layer in layers.values():
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers.values():
            layer._disable_adapters = False


def adapted(net: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in net.named_modules() if hasattr(module, "lora_A")}


def scale(net: nn.Module, factor: float) -> None:
    """The adapters add `factor` of what they added."""
    with torch.no_grad():
        for layer in adapted(net).values():
            layer.lora_B["default"].weight.mul_(factor)


def merged_state(net: nn.Module) -> dict[str, torch.Tensor]:
    """The plain weights that base and adapters amount to, under the base's own names, the merged ones on the CPU (a
    device holds one at a time); `net` stays as it is."""
    state = {n.replace(".base_layer.", "."): v for n, v in net.state_dict().items() if ".lora_" not in n}
    with torch.no_grad():
        for name, layer in adapted(net).items():
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = (weight + layer.get_delta_weight("default").to(weight.dtype)).cpu()
    return state


def save(net: nn.Module, path: Path) -> None:
    """The adapters alone, as peft.PeftModel.from_pretrained reads them."""
    state = {_PREFIX + n.replace(_NAME, "."): v for n, v in net.state_dict().items() if ".lora_" in n}
    path.mkdir(parents=True, exist_ok=True)
    write_state(path / "adapter_model.safetensors", state)
    config: Any = net.__dict__.get("peft_config") or next(m for m in net.modules() if hasattr(m, "peft_config"))
    config["default"].save_pretrained(path)


def load(net: nn.Module, path: Path) -> None:
    """Replaces the adapters by those of a folder that `save` wrote. Errors: ValueError where they do not fit."""
    if not path.is_dir():
        raise ValueError(f"{path} is not there: that checkpoint was trained without adapters; leave --lora.rank out")
    state = {n.removeprefix(_PREFIX): v for n, v in read_state(path).items()}
    own = {n.replace(_NAME, "."): v for n, v in net.state_dict().items() if ".lora_" in n}
    unfit = [n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape]
    if unfit:
        raise ValueError(
            f"the adapters of {path} do not fit --lora.rank and --lora.targets ({sorted(unfit)[0]} and "
            f"{len(unfit) - 1} more): continue with the run's own"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])
