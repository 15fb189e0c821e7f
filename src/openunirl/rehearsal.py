"""A training step rehearsed without numbers: what it would hold, compute and move, told by the step's own code.

    blank model -> drawing -> answering -> train.train_step, all in a Ledger -> Rehearsal

In: a RunConfig, the rates of a machine. Out: a Rehearsal: what is held throughout, and for each phase the most that is
held beside it, multiply-adds and seconds. One process; plan.py spreads it over several.

Departures from a real step, each to save time and none of memory that counts: 1. a sampler's loop is run for 2, 3 and 4
passes and continued from there (its work is a polynomial of degree 2 in their number, its memory grows evenly);
2. sampled images and answers are made up for what follows, answers as long as they may be, and all judged right, so
that SFT keeps every image; 3. of more than two parts of a batch two are taken (from the second on gradients are there);
4. sources of reward other than the model itself are left out, and so is torch.compile; 5. matrices are not packed for a
CPU (packed_linear.py), and the attention kernel is the CPU's.

Shapes: B images, N image tokens, Q answers, T answer tokens.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openunirl.config import RunConfig
from openunirl.distributed import Processes
from openunirl.draws import KeyedDraws, key
from openunirl.ledger import Ledger
from openunirl.models import masked, sharded
from openunirl.models.blank import blank_model
from openunirl.models.protocol import UnifiedModel
from openunirl.optim import build_optimizer
from openunirl.rewards import score
from openunirl.rollout import roll_out
from openunirl.run import Run, prompts_of_run, set_up
from openunirl.tasks.worlds import WORLDS
from openunirl.train import train_step
from openunirl.types import AnswerRollout, ImageRollout, ImageSampling, Match

DRAWING, ANSWERING, SCORING, UPDATE, OPTIMIZER = "drawing", "answering", "scoring", "update", "optimizer"
_FEW = (2, 3, 4)  # passes of a loop that are really taken


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Multiply-adds and bytes a second that are reached. Example: Rates(madds=6e13, bytes=1e12)"""

    madds: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a phase: the most bytes beside those that are held throughout, multiply-adds, seconds."""

    beside: int
    madds: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """One process's step. Bytes, except `parameters` and `trained`, which count entries. `base` is 0 where the frozen
    base is no copy, or rests elsewhere; `largest` and `loose`: the largest unit that sharding gathers, and what is
    gathered with the root."""

    parameters: int
    trained: int
    weights: int
    tokenizer: int
    base: int
    gradients: int
    optimizer: int
    largest: int
    loose: int
    phases: dict[str, Cost]

    def held(self, phase: str) -> int:
        """Bytes held throughout a phase; gradients are there in the update only."""
        always = self.weights + self.tokenizer + self.base + self.optimizer
        return always + (self.gradients if phase in (UPDATE, OPTIMIZER) else 0)

    @property
    def peak(self) -> int:
        return max(self.held(name) + cost.beside for name, cost in self.phases.items())


def rehearse(
    config: RunConfig, rates: Rates, *, blank: Callable[[], UnifiedModel] | None = None, fused: bool = True
) -> Rehearsal:
    """`blank` makes the model without numbers, by default that of `config`; `fused`: the optimizer treats all weights
    at once, as torch does on a GPU and not on a CPU."""
    precision = {"auto": "bf16"}.get(config.train.mixed_precision, config.train.mixed_precision)
    config, resting = _rehearsable(config), config.train.reference == "cpu"
    model = blank() if blank else blank_model(config.model)
    with torch.device("meta"):
        set_up(model, config)
    gc.collect()
    with Processes.rehearsing(precision) as processes:
        found = _Stage(config, rates, model, processes, fused).play()
    return _visiting(found, config) if resting else found


def _visiting(found: Rehearsal, config: RunConfig) -> Rehearsal:
    """The base rests on the CPU, and is beside what is held in phases that ask it."""
    asked = {SCORING} | ({DRAWING} if config.rollout.drawn_by == "base" else set())
    phases = {
        name: replace(cost, beside=cost.beside + found.base) if name in asked else cost
        for name, cost in found.phases.items()
    }
    return replace(found, base=0, phases=phases)


def _rehearsable(config: RunConfig) -> RunConfig:
    own = tuple(source for source in config.reward.sources if source in ("self", "frozen")) or ("self",)
    return replace(
        config,
        reward=replace(config.reward, sources=own, weights=(), shuffle=False),
        train=replace(
            config.train,
            compile=False,
            max_steps=1,
            report_to=(),
            reference="bf16" if config.train.reference == "bf16" else "copy",
        ),
    )


class _Stage:
    """The model in a ledger, and the pieces of a step that are played on it."""

    def __init__(self, config: RunConfig, rates: Rates, model: UnifiedModel, processes: Processes, fused: bool) -> None:
        self.config, self.rates, self.model, self.processes = config, rates, model, processes
        self.ledger = Ledger()
        self.parameters = sum(p.numel() for p in model.net.parameters())
        self.trained = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
        self.units = _units(model)
        self.weights = self.ledger.adopt(model.net)
        self.tokenizer = self.ledger.adopt(model.image_tokenizer)
        self.base = 0 if model.reference_net is None else self.ledger.adopt(model.reference_net)
        optim = config.optim

        def build(net: nn.Module) -> torch.optim.Optimizer:
            made = build_optimizer(
                net,
                lr=optim.lr,
                weight_decay=optim.weight_decay,
                betas=(optim.adam_beta1, optim.adam_beta2),
                epsilon=optim.adam_epsilon,
            )[0]
            for group in made.param_groups:
                group["foreach"] = fused
            made.register_step_pre_hook(lambda *_: self._begin(OPTIMIZER))
            made.register_step_post_hook(lambda *_: self._begin(""))
            return made

        plain: Any = model
        plain.to = lambda _: model  # its weights are where they belong
        with self.ledger:
            self.optimizer = processes.prepare(model, build)
        del plain.to
        self.gradients = 0
        for net in filter(None, (model.net, model.reference_net)):
            net.register_forward_pre_hook(self._at_forward)
        self._loop = ""  # the loop that is being rehearsed, and its passes so far
        self._passes = 0

    def play(self) -> Rehearsal:
        config, world = self.config, WORLDS[self.config.world]()
        world = replace(world, match=lambda *_: Match(same=True))
        prompts = prompts_of_run(config, world, 1)
        self._make_moments()
        held = self.ledger.live
        drawing = self._draw([prompt.prompt for prompt in prompts])
        short, answering = self._answer(prompts)
        plain: Any = self.model
        answered = 0

        def sample_images(prompts: Sequence[str], seeds_B: torch.Tensor, sampling: ImageSampling) -> ImageRollout:
            return _made_up_images(self.model, prompts, seeds_B, sampling)

        def sample_answers(images: Any, questions: Any, seeds_Q: torch.Tensor, sampling: Any) -> AnswerRollout:
            nonlocal answered
            answered += 1
            return _made_up_answers(short, tuple(questions), sampling.max_new_tokens)

        plain.sample_images, plain.sample_answers = sample_images, sample_answers
        with self.ledger:
            self._begin(SCORING)
            if config.reward.soft_judges:  # the judges see the whole batch at once
                rollout = roll_out(self.model, prompts, config.rollout, seed=0, step=1)
                score(self.model, rollout, world, config.reward, config.rollout)
                del rollout
        judged = self._taken(SCORING, held).beside
        self.ledger.phases.clear()
        shrunk, times = _shrunk(config)
        run = Run(
            config=shrunk,
            folder=Path(),
            model=self.model,
            optimizer=self.optimizer,
            world=world,
            processes=self.processes,
            first_step=1,
            prompts=prompts,
        )
        answered = 0
        with self.ledger:
            self._begin(SCORING)
            train_step(run, prompts[: shrunk.rollout.num_prompts], 1)
        found = {name: self._taken(name, held, times) for name in (SCORING, UPDATE)}
        found[SCORING] = replace(found[SCORING], beside=max(found[SCORING].beside, judged))
        phases = {
            DRAWING: drawing,
            ANSWERING: replace(answering, madds=answering.madds * answered, seconds=answering.seconds * answered),
            **found,
            OPTIMIZER: self._taken(OPTIMIZER, held),
        }
        for name in (UPDATE, OPTIMIZER):
            phases[name] = replace(phases[name], beside=phases[name].beside - self.gradients)
        largest, loose = self.units
        return Rehearsal(
            parameters=self.parameters,
            trained=self.trained,
            weights=self.weights,
            tokenizer=self.tokenizer,
            base=self.base,
            gradients=self.gradients,
            optimizer=held - self.weights - self.tokenizer - self.base,
            largest=largest,
            loose=loose,
            phases={name: replace(cost, beside=max(0, cost.beside)) for name, cost in phases.items()},
        )

    # ------------------------------------------------------------------------------------------------- phases

    def _begin(self, phase: str) -> None:
        if phase == OPTIMIZER:
            trained = [p for p in self.model.net.parameters() if p.grad is not None]
            self.gradients = sum(p.numel() * p.element_size() for p in trained)
        self.ledger.phase = phase

    def _at_forward(self, *_: Any) -> None:
        if self._loop:
            self.ledger.phase = f"{self._loop} {min(self._passes, 2)}"
            self._passes += 1
        else:
            self.ledger.phase = UPDATE if torch.is_grad_enabled() else SCORING

    def _taken(self, phase: str, held: int, times: float = 1.0) -> Cost:
        found = self.ledger.phases[phase]
        seconds = found.seconds(self.rates.madds, self.rates.bytes)
        return Cost(beside=max(0, found.peak - held), madds=found.madds * times, seconds=seconds * times)

    def _make_moments(self) -> None:
        """The optimizer's state as it is after a first step."""
        with self.ledger:
            for weight in self.model.net.parameters():
                if weight.requires_grad:
                    weight.grad = self.ledger.absent(weight.detach())
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.ledger.phases.clear()

    # -------------------------------------------------------------------------------------------------- loops

    def _draw(self, texts: Sequence[str]) -> Cost:
        """All images of a step, in batches as rollout.py makes them."""
        rollout = self.config.rollout
        every = [text for text in texts for _ in range(rollout.num_generations)]
        batch = every[: rollout.batch_size]
        seeds_B, sampling = key(0, torch.arange(len(batch))), rollout.drawing
        in_turn, whole = self.model.draws_tokens_in_turn, self.model.num_image_tokens
        drawn_by = self.model.reference if rollout.drawn_by == "base" else _nobody_else

        def draw(passes: int) -> None:
            if in_turn:
                self.model.num_image_tokens = passes
            with drawn_by():
                self.model.sample_images(
                    batch, seeds_B, sampling if in_turn else replace(sampling, num_timesteps=passes)
                )

        try:
            _, cost = self._loop_of(DRAWING, draw, whole if in_turn else sampling.num_timesteps)
        finally:
            self.model.num_image_tokens = whole
        times = len(every) / len(batch)
        return replace(cost, madds=cost.madds * times, seconds=cost.seconds * times)

    def _answer(self, prompts: Any) -> tuple[AnswerRollout, Cost]:
        """All answers of a step at once, and a few tokens of each to go on with."""
        plain: Any = self.model
        sampler, found = plain.sample_answers, []
        plain.sample_images = lambda p, s, sampling: _made_up_images(self.model, p, s, sampling)
        plain.sample_answers = lambda *given: found.append(given) or _NOTHING
        roll_out(self.model, prompts, self.config.rollout, seed=0, step=1)
        del plain.sample_images, plain.sample_answers
        images, questions, seeds_Q, sampling = found[0]

        def answer(passes: int) -> AnswerRollout:
            return sampler(images, questions, seeds_Q, replace(sampling, max_new_tokens=passes))

        return self._loop_of(ANSWERING, answer, sampling.max_new_tokens)

    def _loop_of(self, name: str, run: Callable[[int], Any], passes: int) -> tuple[Any, Cost]:
        """The result of a few passes, and the cost of as many as there are."""
        held, costs, result = self.ledger.live, [], None
        for few in _FEW:
            self.ledger.phases.clear()
            self._loop, self._passes = name, 0
            with self.ledger:
                self.ledger.phase = f"{name} 0"
                result = run(few)
            self._loop = ""
            costs.append([self._taken(f"{name} {moment}", held) for moment in range(3)])
        self.ledger.phases.clear()
        parts = [_continued(list(same), passes) for same in zip(*costs, strict=True)]
        return result, Cost(
            beside=max(part.beside for part in parts),
            madds=sum(part.madds for part in parts),
            seconds=sum(part.seconds for part in parts),
        )


_NOTHING: Any = None


@contextmanager
def _nobody_else() -> Iterator[None]:
    yield


def _continued(few: Sequence[Cost], passes: int) -> Cost:
    """The cost of so many passes, from those of _FEW."""
    first, further = _FEW[0], passes - _FEW[0]

    def polynomial(a: float, b: float, c: float) -> float:
        return a + further * (b - a) + further * (further - 1) / 2 * (c - 2 * b + a)

    assert _FEW == (first, first + 1, first + 2)
    return Cost(
        beside=max(0, few[1].beside + (passes - _FEW[1]) * (few[2].beside - few[1].beside)),
        madds=polynomial(*(cost.madds for cost in few)),
        seconds=polynomial(*(cost.seconds for cost in few)),
    )


def _shrunk(config: RunConfig) -> tuple[RunConfig, float]:
    """A batch of at most two parts of the same size, and how many of them the real one has."""
    rollout, parts = config.rollout, config.optim.gradient_accumulation_steps
    images = rollout.num_prompts * rollout.num_generations
    size = math.ceil(images / parts)
    if 2 * size >= images:
        return config, 1.0
    group = min(rollout.num_generations, 2 * size)
    prompts = min(rollout.num_prompts, math.ceil(2 * size / group))
    few = replace(rollout, num_prompts=prompts, num_generations=group)
    optim = replace(config.optim, gradient_accumulation_steps=max(1, prompts * group // size))
    return replace(config, rollout=few, optim=optim), images / (prompts * group)


def _units(model: UnifiedModel) -> tuple[int, int]:
    """Bytes of the largest unit that sharding gathers by itself, and of what is gathered with the root."""
    units = sharded.units(model.net, model.trunk)
    sizes = [sum(p.numel() * p.element_size() for p in unit.parameters()) for unit in units]
    whole = sum(p.numel() * p.element_size() for p in model.net.parameters())
    return max(sizes), whole - sum(sizes)


# -------------------------------------------------------------------------------------------------- made up


def _made_up_images(
    model: UnifiedModel, prompts: Sequence[str], seeds_B: torch.Tensor, sampling: ImageSampling
) -> ImageRollout:
    """Random tokens, revealed as a masked sampler would reveal them."""
    shape = (len(prompts), model.num_image_tokens)
    drawn = masked.sample(
        lambda tokens_BN: torch.zeros(*tokens_BN.shape, 2),
        KeyedDraws(seeds_B),
        torch.full(shape, masked.MASKED),
        sampling,
    )
    return ImageRollout(
        prompts=tuple(prompts),
        tokens_BN=torch.randint(model.num_codes, shape, generator=torch.Generator().manual_seed(0)),
        reveal_step_BN=drawn.reveal_step_BN,
        logprobs_BN=torch.zeros(shape),
        sampling=sampling,
    )


def _made_up_answers(short: AnswerRollout, questions: Any, longest: int) -> AnswerRollout:
    """Answers as long as may be, from the few tokens that were drawn."""
    count, few = len(questions), short.tokens_QT.shape[1]
    rows_Q, columns_T = torch.arange(count) % len(short.tokens_QT), torch.arange(longest) % few
    shape = (count, longest)
    return AnswerRollout(
        questions=questions,
        texts=("",) * count,
        tokens_QT=short.tokens_QT[rows_Q][:, columns_T],
        mask_QT=torch.ones(shape, dtype=torch.bool),
        logprobs_QT=torch.zeros(shape),
    )
