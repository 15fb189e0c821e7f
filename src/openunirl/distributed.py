"""The only file that knows accelerate: devices, processes, wrapping, exact reductions.

In: a model adapter and optimizers. Out: the same, prepared; shares of a batch; sums and means over all processes.

Departure from accelerate's way: DistributedDataParallel's own reduction wants one backward pass per update that reaches
every parameter. An update here has one pass per part, and no part reaches all of a network that sees with one half and
draws with another; so the passes keep their gradients, and these are averaged once (`averaging`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from openunirl.models.protocol import UnifiedModel
from openunirl.optim import fast_dtype


class Processes:
    """This process among its peers."""

    def __init__(self, mixed_precision: str = "no", trackers: list[Any] | None = None, project: Path | None = None):
        if mixed_precision == "auto":
            mixed_precision = "bf16" if fast_dtype() == torch.bfloat16 else "no"
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision, log_with=trackers or None, project_dir=str(project) if project else None
        )

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

    def prepare(self, model: UnifiedModel, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Moves, wraps and shards `model.net`; returns the wrapped optimizer."""
        model.to(self.device)
        model.net, wrapped = self.accelerator.prepare(model.net, optimizer)
        if model.reference_net is not None:  # the same autocast as the policy, or the KL would not start at 0
            prepared: Any = self.accelerator.prepare_model(model.reference_net, evaluation_mode=True)
            model.reference_net = prepared
            model.rest()
        return wrapped

    @staticmethod
    @contextmanager
    def averaging(net: nn.Module) -> Iterator[None]:
        """Around all backward passes of an update: at its end gradients are the mean over processes. What a process's
        passes did not reach counts as 0; what nobody's reached keeps no gradient, as on one process."""
        if not isinstance(net, DistributedDataParallel):
            yield  # one process, or accelerate shards and reduces
            return
        with net.no_sync():
            yield
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        reached = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
        torch.distributed.all_reduce(reached, group=net.process_group)
        for parameter in (p for p, count in zip(trained, reached.tolist(), strict=True) if count):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad, group=net.process_group)
            parameter.grad /= torch.distributed.get_world_size(net.process_group)

    def unwrapped(self, net: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(net)

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

    def std(self, values: torch.Tensor) -> float:
        """Standard deviation over all processes' values that are not nan."""
        gathered = self.gather(values)
        known = gathered[~gathered.isnan()]
        return float(known.std()) if len(known) > 1 else 0.0

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()
