"""The loop. One step reads from left to right:

    prompt -> image tokens -> answer -> reward -> advantage -> loss -> update

In: a RunConfig. Out: a run directory (config.json, metrics.jsonl, checkpoints/, evaluation/, report.html).
Source: UniRL (arXiv 2505.23380); METHOD 2-5. No rendered picture reaches a loss or a reward; the detector reaches
a reward only where --reward.sources names it.

Shapes: B images, Q answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from openunirl.advantages import ADVANTAGES
from openunirl.config import RunConfig
from openunirl.experience import gather_experience
from openunirl.guards import StepGuard
from openunirl.losses import Stats, Totals
from openunirl.objectives import Terms, count_kept, loss_parts
from openunirl.relaxation import tau_at
from openunirl.replay import Batch
from openunirl.rewards import score, shuffled
from openunirl.rollout import roll_out
from openunirl.run import Run
from openunirl.types import Prompt, Targets


def train(config: RunConfig, *, resume: bool = False, command: str = "") -> Path:
    """Trains, evaluates before and after, writes the report; returns the run directory.

    Errors: ValueError for a run directory that exists (or, with `resume`, does not), and for a run that cannot go on.
    """
    run = Run.open(config, resume=resume, command=command)
    run.evaluate_base()
    guard = StepGuard(config, warn=run.warn)
    for step in run.steps():
        prompts = run.prompts_of(step)
        started = time.perf_counter()
        metrics = train_step(run, prompts, step)
        metrics["seconds"] = time.perf_counter() - started
        guard.check(step, metrics, run.last_checkpoint())
        run.log(step, metrics)
        run.settle_weights(step)
        run.evaluate_if_due(step)
        run.sync_reference_if_due(step)
        run.save_if_due(step)  # last: what a checkpoint claims has been logged
    run.evaluate_tuned()
    return run.finish()


def train_step(run: Run, prompts: list[Prompt], step: int) -> dict[str, float]:
    """One rollout and its updates; `step` counts from 1."""
    config, model = run.config, run.model
    rollout = roll_out(
        model, prompts, config.rollout, seed=config.seed, step=step, first_prompt=run.processes.rank * len(prompts)
    )
    with run.stopping_at(step):
        rewards = score(model, rollout, run.world, config.reward, config.rollout)
        if config.reward.shuffle:
            rewards = shuffled(rewards, rollout, followed=config.loss.reward_coef > 0)
    advantages_B, advantages_Q = ADVANTAGES[config.loss.method](
        rewards, config.rollout, config.loss, share=run.processes.share, std=run.processes.std
    )
    own = Batch(
        rollout=rollout, advantages_B=advantages_B, advantages_Q=advantages_Q, updates=config.loss.num_iterations
    )
    stats = Stats()
    count_kept(advantages_B, config.loss, stats)
    learned = [
        one
        for batch in run.replay.batches(own, step)
        for one in learn(run, batch, step, stats, targets=rewards.targets)
    ]
    size = config.loss.image_coef * advantages_B.abs().mean() + config.loss.answer_coef * advantages_Q.abs().mean()
    return run.metrics(rollout, rewards, stats, learned, advantage_abs=float(size))


def learn(run: Run, batch: Batch, step: int, stats: Stats, *, targets: Targets | None) -> Iterator[tuple[float, float]]:
    """A batch's updates; (loss, gradient norm before clipping) of each."""
    config, rollout, processes = run.config, batch.rollout, run.processes
    temperature, tau = config.rollout.answer_temperature, tau_at(config.loss.relaxation, step, config.train.max_steps)
    parts = min(config.optim.gradient_accumulation_steps, len(batch.advantages_B))
    experience = gather_experience(
        run.model,
        rollout,
        batch.advantages_B,
        batch.advantages_Q,
        config.loss,
        temperature=temperature,
        tau=tau,
        targets=targets,
        parts=parts,
    )
    images, answers = rollout.images.tokens_BN, rollout.answers.mask_QT
    terms = Terms(
        config=config.loss,
        image_totals=Totals(
            samples=processes.share(len(images)), tokens=processes.share(images.numel()), max_length=images.shape[1]
        ),
        answer_totals=Totals(
            samples=processes.share(len(answers)),
            tokens=processes.share(float(answers.sum())),
            max_length=config.rollout.max_new_tokens,
        ),
        temperature=temperature,
        stats=stats,
        judges=config.reward.soft_judges,
    )
    for _ in range(batch.updates):
        yield run.update(loss_parts(run.model, experience, parts=parts, terms=terms), step)
