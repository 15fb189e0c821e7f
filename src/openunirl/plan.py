"""`openunirl plan`: whether a training run fits its GPUs, how long a step takes, and what to change where it does not.

    RunConfig -> rehearsal -> share of each GPU -> a table, and other configurations rehearsed in the same way

In: a RunConfig, how many GPUs of which memory and speed. Out: text, and whether it fits. Every number comes from
rehearsal.py, which runs the step's own code without numbers, except for these, which are formulas: 1. several GPUs hold
a copy each, or with --train.shard a share each; sharded, the root's weights and three layers (one in use, one ahead,
one gradient) are gathered at a time, and all weights while a sampler runs; 2. RESERVE for what is no tensor. Neither
was checked on several GPUs; what is checked stands in docs/performance.md. Exchange between GPUs takes no time here.

Units: bytes; GB is 10^9 of them. A multiply-add is two floating-point operations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from openunirl.config import RunConfig
from openunirl.phases import ANSWERING, DRAWING, EVALUATING, OPTIMIZER, UPDATE, Rates, Rehearsal
from openunirl.rehearsal import rehearse
from openunirl.run import keeps_base
from openunirl.run_world import evaluates
from openunirl.validate import check

RESERVE = 1_000_000_000
"""CUDA's context and its libraries' work space."""
GATHERED = 3
MOST_GPUS = 64
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Example: Machine(gpus=8, memory=24_000_000_000, tflops=312.0, bandwidth=2.0, utilization=0.4)"""

    gpus: int
    memory: int
    """Bytes of each GPU."""
    tflops: float
    """Peak of each GPU's matrix products, 10^12 operations a second."""
    bandwidth: float
    """Peak of each GPU's memory, 10^12 bytes a second."""
    utilization: float
    """Share of both that is reached."""

    @property
    def rates(self) -> Rates:
        return Rates(madds=self.utilization * self.tflops * 1e12 / 2, bytes=self.utilization * self.bandwidth * 1e12)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one GPU holds: rows of the table, and the peak of each phase."""

    rows: dict[str, int]
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values()) + RESERVE


def parse_memory(text: str) -> int:
    """Bytes. Example: parse_memory("24GB") == 24_000_000_000. Errors: ValueError for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    bytes_ = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if not bytes_:
        raise ValueError(f"--memory wants a size above 0 in MB, GB, MiB or GiB, such as 24GB, not {text!r}")
    return bytes_


def share(found: Rehearsal, gpus: int, sharded: bool) -> Share:
    """One GPU's part of a step."""
    parts = gpus if sharded else 1
    rows = {
        "weights": found.weights // parts,
        "image tokenizer": found.tokenizer,
        "frozen base": found.base // parts,
        "optimizer": found.optimizer // parts,
        "detector": found.detector,
        "gradients (update)": found.gradients // parts,
    }
    held = sum(rows.values()) - rows["gradients (update)"]
    peaks = {}
    for name, cost in found.phases.items():
        beside = cost.beside
        if parts > 1:
            samples = name in (DRAWING, ANSWERING, EVALUATING)
            whole = found.weights if samples else found.loose + GATHERED * found.largest
            beside = cost.beside // parts if name == OPTIMIZER else cost.beside + whole
        peaks[name] = held + beside + (rows["gradients (update)"] if name in (UPDATE, OPTIMIZER) else 0)
    return Share(rows=rows, peaks=peaks)


def plan(config: RunConfig, machine: Machine, tell: Callable[[str], object] = print) -> bool:
    """Tells the plan, line by line; whether it fits. Errors: ValueError for a configuration that cannot be trained."""
    check(config)
    found = rehearse(config, machine.rates)
    own = _share_of(found, config, machine)
    for line in _table(config, found, own, machine):
        tell(line)
    if own.peak <= machine.memory:
        return True
    for line in _advice(config, found, machine):
        tell(line)
    return False


def _share_of(found: Rehearsal, config: RunConfig, machine: Machine) -> Share:
    return share(found, machine.gpus, config.train.shard and machine.gpus > 1)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def _table(config: RunConfig, found: Rehearsal, own: Share, machine: Machine) -> Iterator[str]:
    gpus = f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''} of {gigabytes(machine.memory)}"
    images = config.rollout.num_prompts * config.rollout.num_generations
    yield f"{config.model.weights}, {config.loss.method}, {images} images a step and GPU, on {gpus}"
    yield f"{found.parameters / 1e6:,.1f} M parameters, {found.trained / 1e6:,.1f} M trained"
    yield ""
    yield "held on each GPU"
    for name, count in own.rows.items():
        yield f"  {name:<20} {gigabytes(count):>12}"
    yield ""
    yield f"  {'phase':<10} {'activations, caches':>20} {'peak':>12} {'multiply-adds':>14} {'seconds':>9}"
    for name, cost in found.phases.items():
        beside, peak = gigabytes(cost.beside), gigabytes(own.peaks[name])
        yield f"  {name:<10} {beside:>20} {peak:>12} {cost.madds / 1e12:>12,.2f} T {cost.seconds:>9,.2f}"
    yield ""
    seconds = sum(cost.seconds for name, cost in found.phases.items() if name != EVALUATING)
    yield (
        f"step: {seconds:,.2f} s, if {machine.utilization:.0%} of {machine.tflops:g} TFLOP/s and of "
        f"{machine.bandwidth:g} TB/s are reached"
    )
    if EVALUATING in found.phases:
        yield "evaluating: the work of one whole evaluation, without the detector's; no part of the step"
    worst = max(own.peaks, key=own.peaks.__getitem__)
    fits = "fits" if own.peak <= machine.memory else "does not fit"
    yield (
        f"peak: {gigabytes(own.peak)} in the phase {worst}, {gigabytes(RESERVE)} of it for CUDA: "
        f"{fits} {gigabytes(machine.memory)}"
    )


# ---------------------------------------------------------------------------------------------------- advice


@dataclass(frozen=True, kw_only=True)
class Change:
    """Flags, and what they make of a configuration. Example: Change(flags="--train.gradient-checkpointing", ...)"""

    flags: str
    apply: Callable[[RunConfig], RunConfig]


def changes(config: RunConfig, gpus: int) -> Iterator[Change]:
    """What takes less memory than `config`, what changes the training least first."""
    images = config.rollout.num_prompts * config.rollout.num_generations
    if not config.train.gradient_checkpointing:
        yield _train("--train.gradient-checkpointing", gradient_checkpointing=True)
    if config.optim.gradient_accumulation_steps < images:
        yield Change(
            flags=f"--optim.gradient-accumulation-steps {images}",
            apply=lambda c: replace(c, optim=replace(c.optim, gradient_accumulation_steps=images)),
        )
    if min(config.rollout.batch_size, images * config.rollout.num_questions * config.rollout.num_answers) > 1:
        yield Change(
            flags="--rollout.batch-size 1", apply=lambda c: replace(c, rollout=replace(c.rollout, batch_size=1))
        )
    if evaluates(config) and config.eval.batch_size > 1:
        yield Change(flags="--eval.batch-size 1", apply=lambda c: replace(c, eval=replace(c.eval, batch_size=1)))
    if config.train.mixed_precision == "no":
        yield _train("--train.mixed-precision bf16", mixed_precision="bf16")
    if gpus > 1 and not config.train.shard:
        yield _train("--train.shard", shard=True)
    if not config.lora.rank:
        if config.train.reference == "copy" and not config.train.shard and keeps_base(config):
            yield _train("--train.reference cpu", reference="cpu")
        yield Change(
            flags="--lora.rank 16",
            apply=lambda c: replace(c, lora=replace(c.lora, rank=16), train=replace(c.train, reference="copy")),
        )


def _train(flags: str, **values: object) -> Change:
    return Change(flags=flags, apply=lambda c: replace(c, train=replace(c.train, **values)))


def _advice(config: RunConfig, found: Rehearsal, machine: Machine) -> Iterator[str]:
    yield ""
    yield "what to change, and the peak on each GPU that it would give"
    known, usable, alone = {config: found}, [], False

    def peak(changed: RunConfig) -> int:
        bare = replace(changed, train=replace(changed.train, shard=False))  # sharding is added to one process's step
        if bare not in known:
            known[bare] = rehearse(bare, machine.rates)
        return _share_of(known[bare], changed, machine).peak

    known[replace(config, train=replace(config.train, shard=False))] = found
    for change in changes(config, machine.gpus):
        try:
            check(change.apply(config))
        except ValueError:  # it does not go with another flag
            continue
        usable.append(change)
        alone = alone or peak(change.apply(config)) <= machine.memory
        yield _row(change.flags, peak(change.apply(config)), machine)
    count = next((n for n in _more(machine.gpus) if share(found, n, True).peak <= machine.memory), None)
    if count:
        yield _row(f"{count} GPUs, --train.shard", share(found, count, True).peak, machine)
    if alone:
        return
    together, flags = config, []
    for change in usable:
        try:
            check(change.apply(together))
        except ValueError:
            continue
        together, flags = change.apply(together), [*flags, change]
        if "--lora.rank 16" in change.flags:  # which has no copy that could rest elsewhere
            flags = [one for one in flags if "--train.reference" not in one.flags]
        if len(flags) > 1 and peak(together) <= machine.memory:
            break
    if len(flags) > 1:
        yield _row(" ".join(change.flags for change in flags), peak(together), machine)


def _more(gpus: int) -> Iterator[int]:
    gpus *= 2
    while gpus <= MOST_GPUS:
        yield gpus
        gpus *= 2


def _row(flags: str, peak: int, machine: Machine) -> str:
    return f"  {flags}: {gigabytes(peak)}{', which fits' if peak <= machine.memory else ''}"
