"""What every speed table starts with and how its times are taken.

In: named callables, the device that they work on. Out: medians of wall and CPU seconds over repeats that take turns, so
that other work on the machine slows all of them alike. On a busy machine trust the ratios, and CPU seconds above wall
seconds: they are what is compared where the work is on the CPU, on one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from openunirl.provenance import commit


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of one call, or medians. `by_cpu` tells which of the two is compared.

    Example: Seconds(wall=3.1, cpu=2.9, by_cpu=True)
    """

    wall: float
    cpu: float
    by_cpu: bool

    def __truediv__(self, items: int) -> Seconds:
        return replace(self, wall=self.wall / items, cpu=self.cpu / items)


class Measured(Protocol):
    """What floor.Replay gives to a table."""

    def floor(self) -> Any: ...

    def table(self) -> str: ...


def clock(work: Callable[[], object], device: torch.device) -> Seconds:
    """One call, to the end of what it asked of the device."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    by_cpu = device.type == "cpu" and torch.get_num_threads() == 1
    return Seconds(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, by_cpu=by_cpu)


def take_turns(
    tasks: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[Seconds]]:
    """Every task once, then every task again, `repeats` times; the caller has warmed them up."""
    taken: dict[str, list[Seconds]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, work in tasks.items():
            taken[name].append(clock(work, device))
    return taken


def median(taken: list[Seconds]) -> Seconds:
    wall, cpu = (statistics.median(one) for one in ([s.wall for s in taken], [s.cpu for s in taken]))
    return replace(taken[0], wall=wall, cpu=cpu)


def ratios(slow: list[Seconds], fast: list[Seconds]) -> list[float]:
    """How many times faster, turn by turn."""
    return [seconds(a) / seconds(b) for a, b in zip(slow, fast, strict=True)]


def seconds(taken: Seconds) -> float:
    """What is compared."""
    return taken.cpu if taken.by_cpu else taken.wall


def report(taken: Mapping[str, list[Seconds]], replay: Measured, per: Mapping[str, int] | None = None) -> None:
    """Prints the table: the first task is what the others are compared with, "floor" is not a row. `per`: items of each
    task, where times are wanted per item."""
    per = per or dict.fromkeys(taken, 1)
    tasks = {name: [s / per[name] for s in times] for name, times in taken.items() if name != "floor"}
    floor = replay.floor().seconds / per["floor"]
    first = next(iter(tasks.values()))
    print(f"\n{'':<26} {'wall s':>9} {'lowest':>8} {'highest':>8} {'CPU s':>9}   times faster     share of the floor")
    for name, times in tasks.items():
        faster, mid, walls = sorted(ratios(first, times)), median(times), [s.wall for s in times]
        spread = f"{statistics.median(faster):6.2f} [{faster[0]:.2f} .. {faster[-1]:.2f}]"
        share = floor / seconds(mid)
        print(f"{name:<26} {mid.wall:9.3f} {min(walls):8.3f} {max(walls):8.3f} {mid.cpu:9.3f}   {spread}  {share:6.0%}")
    kind = "CPU seconds (one thread)" if next(iter(tasks.values()))[0].by_cpu else "wall seconds"
    print(f"\nratios are of one turn each, by {kind}: median [lowest .. highest]")
    print(f"floor {floor:.4f} s: {replay.floor()}\n{replay.table()}")


def parser(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--short", action="store_true", help="64 image tokens and two repeats: a smoke test, not a claim")
    return made


def header(seed: int) -> None:
    """Prints command, seed, commit, machine, threads, versions."""
    print(f"command: python {' '.join(sys.argv)}\nseed: {seed}\ncommit: {commit()}")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"machine: {_processor()}, {os.cpu_count()} cores{load}; {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for text in info.read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    return platform.processor() or platform.machine()
