"""The only file that knows accelerate: devices, processes, precision, sharding, exact reductions.

In: a model adapter and optimizers. Out: the same, prepared; shares of a batch; sums and means over all processes.

Departure from accelerate's way: no DistributedDataParallel. Its reduction wants one backward pass per update that
reaches every parameter, and its buckets are as large as all gradients. An update here has one pass per part, and no
part reaches all of a network that sees with one half and draws with another; so the passes keep their gradients, and
these are averaged once (`averaging`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule

from openunirl.models import sharded
from openunirl.models.protocol import UnifiedModel
from openunirl.optim import fast_dtype

AT_ONCE = 2**23
"""Entries of gradients that are averaged in one exchange (32 MiB); a larger gradient has one of its own."""


def device_of_process() -> torch.device:
    """Where this process computes; may be asked before there are Processes, and then joins it to its peers as they do
    (without the flag, processes on a CPU would each train alone)."""
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    assert device is not None
    return device


class Processes:
    """This process among its peers."""

    def __init__(
        self,
        mixed_precision: str = "no",
        trackers: list[Any] | None = None,
        project: Path | None = None,
        shard: bool = False,
        placing: bool = True,
    ) -> None:
        if mixed_precision == "auto":
            mixed_precision = "bf16" if fast_dtype() == torch.bfloat16 else "no"
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision,
            device_placement=placing,
            log_with=trackers or None,
            project_dir=str(project) if project else None,
        )
        self.shards = shard and self.count > 1
        self._plain: nn.Module | None = None

    @classmethod
    @contextmanager
    def rehearsing(cls, mixed_precision: str) -> Iterator[Processes]:
        """One process on the CPU, whatever this machine has, that moves no weights; afterwards accelerate knows nothing
        of it."""
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True)
        try:
            yield cls(mixed_precision, placing=False)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def prepare(
        self, model: UnifiedModel, build: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """Moves or shards `model.net`, whose forward gets the run's precision; returns the wrapped optimizer that
        `build` makes for it. Without sharding every process begins with the main one's weights."""
        if self.shards:  # from where it was read: no device ever holds all of it
            self._plain = sharded.empty_copy(model.net)
            for net in (model.net, model.reference_net):
                if net is not None:
                    sharded.shard(net, model.trunk)
        model.to(self.device)
        wrapped: Any = self.accelerator.prepare_optimizer(build(model.net))
        model.net = self._prepared(model.net)
        if model.reference_net is not None:  # the same autocast as the policy, or the KL would not start at 0
            model.reference_net = self._prepared(model.reference_net)
            model.rest()
        return wrapped

    def _prepared(self, net: nn.Module) -> Any:
        if self.count > 1 and not self.shards:
            for weight in net.parameters():
                distributed.broadcast(weight.detach(), src=0)
        return self.accelerator.prepare_model(net, evaluation_mode=True)  # in training mode it would wrap it in DDP

    def clip(self, net: nn.Module, largest: float) -> float:
        """Clips the gradients' norm over all weights to `largest`; returns what it was."""
        norm = self.accelerator.clip_grad_norm_(net.parameters(), largest)
        return 0.0 if norm is None else float(sharded.whole(norm))

    def not_finite(self, net: nn.Module) -> str | None:
        """The name of a trained weight that holds a nan or an infinity on any process; None where none does."""
        trained = [(name, weight) for name, weight in net.named_parameters() if weight.requires_grad]
        sound = torch.stack([sharded.own(weight.detach()).isfinite().all() for _, weight in trained])
        if not self.sum({"broken": float(not bool(sound.all()))})["broken"]:
            return None
        own = [name for (name, _), holds in zip(trained, sound.tolist(), strict=True) if not holds]
        return own[0] if own else "of another process"

    @staticmethod
    @contextmanager
    def averaging(net: nn.Module) -> Iterator[None]:
        """Around all backward passes of an update: at its end gradients are the mean over processes. What a process's
        passes did not reach counts as 0; what nobody's reached keeps no gradient, as on one process."""
        yield
        if not distributed.is_initialized() or isinstance(net, FSDPModule):
            return  # one process, or each pass reduced its own
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        reached = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
        distributed.all_reduce(reached)
        gradients = []
        for parameter in (p for p, count in zip(trained, reached.tolist(), strict=True) if count):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for group in _together(gradients):
            flat = torch.cat([g.flatten() for g in group]) if len(group) > 1 else group[0].flatten()
            distributed.all_reduce(flat)
            flat /= distributed.get_world_size()
            for gradient, mean in zip(group, flat.split([g.numel() for g in group]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    @contextmanager
    def whole(self, model: UnifiedModel) -> Iterator[None]:
        """Inside it the main process' `model` is a plain one, that can be saved; every process takes part."""
        wrapped = model.net
        if self._plain is not None:
            sharded.gather_into(self._plain, wrapped, keep=self.is_main)
            model.net = self._plain
        else:
            model.net = self.accelerator.unwrap_model(wrapped)
        try:
            yield
        finally:
            model.net = wrapped
            if self._plain is not None:
                self._plain.to("meta")

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What one process would save, on the CPU of the main process; every process takes part, and others get no
        moments."""
        state = optimizer.state_dict()
        held = {
            number: {name: v for name, v in values.items() if not isinstance(v, torch.Tensor)}
            | sharded.gathered({n: v for n, v in values.items() if isinstance(v, torch.Tensor)}, self.is_main)
            for number, values in state["state"].items()
        }
        return state | {"state": held}

    def share(self, total: float) -> float:
        """A local total summed over processes and divided by their number: the denominator of a local part of a mean
        whose gradients are averaged over processes."""
        return self.sum({"total": total})["total"] / self.count

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over all processes."""
        if self.count == 1:
            return dict(values)
        local = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        reduced: Any = self.accelerator.reduce(local, reduction="sum")
        return dict(zip(values, reduced.tolist(), strict=True))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, in rank order."""
        gathered: Any = self.accelerator.gather(tensor.to(self.device))
        return gathered.cpu()

    def gather_rows(self, tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tables of all processes, in rank order, each with as many rows as it has; they travel through host memory."""
        found: list[dict[str, torch.Tensor]] = self.gather_objects(dict(tables))
        filled = [one for one in found if one]
        return {name: torch.cat([one[name] for one in filled]) for name in (filled[0] if filled else ())}

    def gather_objects(self, own: Any) -> list[Any]:
        """What each process has, in rank order; it travels through host memory."""
        return gather_object([own])

    def std(self, values: torch.Tensor) -> float:
        """Standard deviation over all processes' values that are not nan."""
        gathered = self.gather(values)
        known = gathered[~gathered.isnan()]
        return float(known.std()) if len(known) > 1 else 0.0

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def _together(gradients: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of gradients of one dtype, AT_ONCE entries at most unless one alone has more."""
    group: list[torch.Tensor] = []
    for gradient in gradients:
        full = sum(g.numel() for g in group) + gradient.numel() > AT_ONCE
        if group and (full or gradient.dtype != group[0].dtype):
            yield group
            group = []
        group.append(gradient)
    if group:
        yield group
