"""A training step rehearsed without numbers: what it would hold, compute and move, told by the step's own code.

    blank model -> drawing -> answering -> train.train_step, all in a Ledger -> Rehearsal

In: a RunConfig, the rates of a machine. Out: a Rehearsal: what is held throughout, and for each phase the most that is
held beside it, multiply-adds and seconds. One process; plan.py spreads it over several.

Departures from a real step: 1. a sampler's loop is left after 4 passes and continued from the last two (the work of a
pass and what it holds grow evenly with its number or, in a masked sampler, with the number of masked tokens);
2. sampled images and answers are made up for what follows, answers as long as they may be, and all judged right, so
that SFT keeps every image; 3. of several parts of a batch one is taken, with the gradients of an earlier one there;
4. sources of reward other than the model itself are left out, and so is torch.compile; 5. matrices are not packed for a
CPU (packed_linear.py), and the attention kernel is the CPU's; 6. of a detector and its colour classifier the weights
count, by their published sizes, and nothing of what they do; 7. an evaluation's reference pictures are left out, of
which a batch takes no more memory than one of its own.

Shapes: B images, N image tokens, Q answers, T answer tokens.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from openunirl.config import RunConfig
from openunirl.distributed import Processes
from openunirl.draws import KeyedDraws, key
from openunirl.ledger import Ledger
from openunirl.models import masked, sharded
from openunirl.models.blank import blank_model
from openunirl.models.protocol import UnifiedModel
from openunirl.optim import average_weights, build_optimizer
from openunirl.phases import (
    ANSWERING,
    DRAWING,
    EVALUATING,
    OPTIMIZER,
    SCORING,
    UPDATE,
    Cost,
    Rates,
    Rehearsal,
    continued,
)
from openunirl.rewards import score
from openunirl.rollout import roll_out
from openunirl.run import Run, set_up
from openunirl.run_world import evaluates, loads_detector, prompts_of_run
from openunirl.tasks.worlds import WORLDS, World
from openunirl.train import train_step
from openunirl.types import AnswerRollout, AnswerSampling, ImageQuestion, ImageRollout, ImageSampling, Match

_TAKEN = 4  # passes of a loop
DETECTOR = 4 * (68_741_083 + 427_616_513)
"""Bytes of Mask2Former with Swin-S and of CLIP ViT-L/14, both in float32."""


class _EnoughError(Exception):
    """Leaves a sampler's loop."""


def rehearse(
    config: RunConfig, rates: Rates, *, blank: Callable[[], UnifiedModel] | None = None, fused: bool = True
) -> Rehearsal:
    """`blank` makes the model without numbers, by default that of `config`; `fused`: the optimizer treats all weights
    at once, as torch does on a GPU and not on a CPU."""
    precision = {"auto": "bf16"}.get(config.train.mixed_precision, config.train.mixed_precision)
    detector = DETECTOR if loads_detector(config) else 0
    config, resting = _rehearsable(config), config.train.reference == "cpu"
    model = blank() if blank else blank_model(config.model)
    with torch.device("meta"):
        set_up(model, config)
    gc.collect()
    with Processes.rehearsing(precision) as processes:
        found = _Stage(config, rates, model, processes, fused).play()
    return replace(_visiting(found, config) if resting else found, detector=detector)


def _visiting(found: Rehearsal, config: RunConfig) -> Rehearsal:
    """The base rests on the CPU, and is beside what is held in phases that ask it."""
    asked = {SCORING, EVALUATING} | ({DRAWING} if config.rollout.drawn_by == "base" else set())
    asked |= {ANSWERING} if "frozen" in config.reward.sources and config.reward.kind == "answer" else set()
    phases = {
        name: replace(cost, beside=cost.beside + found.base) if name in asked else cost
        for name, cost in found.phases.items()
    }
    return replace(found, base=0, phases=phases)


def _rehearsable(config: RunConfig) -> RunConfig:
    own = tuple(source for source in config.reward.sources if source in ("self", "frozen")) or ("self",)
    kind = "bf16" if config.train.reference == "bf16" else "copy"
    return replace(
        config,
        reward=replace(config.reward, sources=own, weights=(), shuffle=False),
        loss=replace(config.loss, replay_steps=min(1, config.loss.replay_steps)),  # an update in the first step
        train=replace(config.train, compile=False, max_steps=1, report_to=(), reference=kind),
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
            return made

        plain: Any = model
        if fused:  # on a GPU pictures are not decoded few at a time
            plain.decode_few = lambda decode, tokens_BN, _: decode(tokens_BN)
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
        with self._made_up() as asked:
            roll_out(self.model, prompts, config.rollout, seed=0, step=1)
        first = asked[0]
        rollout = config.rollout
        every = [prompt.prompt for prompt in prompts for _ in range(rollout.num_generations)]
        drawing, answering = self._draw(DRAWING, every, rollout.drawing, rollout.batch_size), self._answer(*first)
        evaluating = {EVALUATING: self._evaluate(world)} if evaluates(config) else {}
        with self._made_up(), self.ledger:
            self._begin(SCORING)
            if config.reward.soft_judges:  # the judges see the whole batch at once
                rollout = roll_out(self.model, prompts, config.rollout, seed=0, step=1)
                score(self.model, rollout, world, config.reward, config.rollout)
                del rollout
        judged = self._taken(SCORING, held).beside
        self.ledger.phases.clear()
        part, times = _one_part(config)
        run = Run(
            config=part,
            folder=Path(),
            model=self.model,
            optimizer=self.optimizer,
            world=world,
            processes=self.processes,
            first_step=1,
            prompts=prompts,
        )
        with self._made_up() as asked, self.ledger:
            self._begin(SCORING)
            if times > 1:
                self._make_gradients()
            train_step(run, prompts[: part.rollout.num_prompts], 1)
        early = self.gradients if times > 1 else 0  # they are there while the base scores, but were not in a real step
        phases = {
            DRAWING: drawing,
            ANSWERING: answering.times(times * sum(len(given[1]) for given in asked) / len(first[1])),
            SCORING: self._taken(SCORING, held + early, times),
            UPDATE: self._taken(UPDATE, held + self.gradients, times),
            OPTIMIZER: self._taken(OPTIMIZER, held + self.gradients),
            **evaluating,
        }
        phases[SCORING] = replace(phases[SCORING], beside=max(phases[SCORING].beside, judged))
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
            phases=phases,
        )

    # ------------------------------------------------------------------------------------------------- phases

    def _begin(self, phase: str) -> None:
        if phase == OPTIMIZER:
            self.gradients = sum(_size(p) for p in self.model.net.parameters() if p.grad is not None)
        self.ledger.phase = phase

    @contextmanager
    def _made_up(self) -> Iterator[list[Any]]:
        """Inside it images and answers come from nowhere; yields what was asked of the sampler of answers."""
        plain, asked = cast(Any, self.model), []

        def sample_answers(*given: Any) -> AnswerRollout:
            asked.append(given)
            return _made_up_answers(given[1], given[-1].max_new_tokens)

        plain.sample_images = partial(_made_up_images, self.model)
        plain.sample_answers = sample_answers
        try:
            yield asked
        finally:
            del plain.sample_images, plain.sample_answers

    def _at_forward(self, *_: Any) -> None:
        if not self._loop:
            self.ledger.phase = UPDATE if torch.is_grad_enabled() else SCORING
            return
        if self._passes == _TAKEN:
            raise _EnoughError
        self.ledger.phase = f"{self._loop} {self._passes}"
        self._passes += 1

    def _taken(self, phase: str, held: int, times: float = 1.0) -> Cost:
        found = self.ledger.phases[phase]
        seconds = found.seconds(self.rates.madds, self.rates.bytes)
        return Cost(beside=max(0, found.peak - held), madds=found.madds * times, seconds=seconds * times)

    def _make_moments(self) -> None:
        """The optimizer's state as it is after a first step."""
        with self.ledger:
            self._make_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.config.train.swa_steps:
                average_weights(self.optimizer, restart=True)
        self.ledger.phases.clear()

    def _make_gradients(self) -> None:
        for weight in self.model.net.parameters():
            if weight.requires_grad:
                weight.grad = self.ledger.absent(weight.detach())

    # -------------------------------------------------------------------------------------------------- loops

    def _evaluate(self, world: World) -> Cost:
        """As evaluation/run.py does it, batch by batch: images, their pictures, a greedy answer on each."""
        look, model = self.config.eval, self.model
        prompts = world.evaluation_prompts(look.split, look.num_prompts or look.during_prompts, 0)
        every = [prompt for prompt in prompts for _ in range(look.num_images)]
        batch = every[: look.batch_size]
        drawing = self._draw(EVALUATING, [prompt.prompt for prompt in every], look.sampling, look.batch_size)
        seeds_B, held = key(0, torch.arange(len(batch))), self.ledger.live
        images = _made_up_images(model, [prompt.prompt for prompt in batch], seeds_B, look.sampling).images
        with self.ledger:
            self.ledger.phase = EVALUATING
            model.decode(images)
        decoding = self._taken(EVALUATING, held)
        questions = [ImageQuestion(image=b, question=one.questions[0].question) for b, one in enumerate(batch)]
        answering = self._answer(images, questions, seeds_B, AnswerSampling(max_new_tokens=look.max_new_tokens))
        times = len(every) / len(batch)
        parts = (drawing, decoding.times(times), answering.times(times))
        return Cost(
            beside=max(part.beside for part in parts),
            madds=sum(part.madds for part in parts),
            seconds=sum(part.seconds for part in parts),
        )

    def _draw(self, name: str, every: Sequence[str], sampling: ImageSampling, size: int) -> Cost:
        """All of these images, `size` at a time as rollout.py and evaluation/run.py make them."""
        batch = every[:size]
        seeds_B = key(0, torch.arange(len(batch)))
        # in turn: the first pass over prompts also gives the first token of all
        num = self.model.num_image_tokens
        in_turn, counts = self.model.draws_tokens_in_turn, masked.masked_counts(num, sampling.num_timesteps)
        sizes = range(num) if in_turn else [0, *counts]

        def draw() -> None:
            base = name == DRAWING and self.config.rollout.drawn_by == "base"
            with self.model.reference() if base else nullcontext():
                self.model.sample_images(batch, seeds_B, sampling)

        return self._loop_of(name, draw, sizes).times(len(every) / len(batch))

    def _answer(self, *asked: Any) -> Cost:
        """Answers to the questions that are asked at once. The first pass sees the images, the second the questions.
        Held is the most of what two cases hold: no answer ends, or one ends first and the others' cache is copied."""
        sizes = range(1 + asked[-1].max_new_tokens)
        cost = self._loop_of(ANSWERING, lambda: self.model.sample_answers(*asked), sizes)
        if len(asked[1]) == 1:
            return cost
        self.ledger.first = cast(Any, self.model).prompting.vocab.eos
        ended = self._loop_of(ANSWERING, lambda: self.model.sample_answers(*asked), sizes)
        self.ledger.first = 1
        return replace(cost, beside=max(cost.beside, ended.beside))

    def _loop_of(self, name: str, work: Callable[[], object], sizes: Sequence[int]) -> Cost:
        """The cost of passes of these sizes, from the first few of them."""
        held = self.ledger.live
        self._loop, self._passes = name, 0
        with self.ledger, suppress(_EnoughError):
            self.ledger.phase = f"{name} 0"
            work()
        self._loop = ""
        taken = [self._taken(f"{name} {number}", held) for number in range(min(self._passes, len(sizes)))]
        self.ledger.phases.clear()
        gc.collect()  # the frames of a loop that was left
        return continued(taken, sizes)


def _one_part(config: RunConfig) -> tuple[RunConfig, float]:
    """A batch as large as one of the parts that the real one is split into, and how many of them there are."""
    rollout, parts = config.rollout, config.optim.gradient_accumulation_steps
    images = rollout.num_prompts * rollout.num_generations
    size = math.ceil(images / parts)
    group = min(rollout.num_generations, size)
    prompts = math.ceil(size / group)
    few = replace(rollout, num_prompts=prompts, num_generations=group)
    optim = replace(config.optim, gradient_accumulation_steps=1)
    return replace(config, rollout=few, optim=optim), images / (prompts * group)


def _units(model: UnifiedModel) -> tuple[int, int]:
    """Bytes of the largest unit that sharding gathers by itself, and of what is gathered with the root."""
    sizes = [sum(map(_size, unit.parameters())) for unit in sharded.units(model.net, model.trunk)]
    return max(sizes), sum(map(_size, model.net.parameters())) - sum(sizes)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# -------------------------------------------------------------------------------------------------- made up


def _made_up_images(
    model: UnifiedModel, prompts: Sequence[str], seeds_B: torch.Tensor, sampling: ImageSampling
) -> ImageRollout:
    """Random tokens, revealed as a masked sampler would reveal them."""
    shape = (len(prompts), model.num_image_tokens)
    drawn = masked.sample(
        lambda _, tokens_BN, at_BK: torch.zeros(*(tokens_BN if at_BK is None else at_BK).shape, 2),
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


def _made_up_answers(questions: Any, longest: int) -> AnswerRollout:
    """Answers as long as may be, those of an image unlike from their first token on, so that none is read for two."""
    shape = (len(questions), longest)
    return AnswerRollout(
        questions=questions,
        texts=("",) * len(questions),
        tokens_QT=torch.arange(shape[0])[:, None].repeat(1, longest),
        mask_QT=torch.ones(shape, dtype=torch.bool),
        logprobs_QT=torch.zeros(shape),
    )
