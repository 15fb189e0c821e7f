"""Peak memory of a piece of work, by what is allocated and freed: exact, and the same on a busy machine.

In: a callable, the device that it works on. Out: bytes above what was allocated before. On a CPU the profiler's record
of torch's own allocator is summed up; on a GPU torch keeps the count (not run on a GPU yet). Memory that other
libraries take (weights packed by oneDNN, BLAS's work space) is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of `device` at the worst moment of `work`, above those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results: Any = recorded.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def megabytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
