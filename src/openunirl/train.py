"""The loop. One step reads from left to right:

    prompt -> image tokens -> answer -> reward -> advantage -> loss -> update

In: a RunConfig. Out: a run directory (config.json, metrics.jsonl, checkpoints/, evaluation/, report.html).
Source: UniRL (arXiv 2505.23380); METHOD 2-5. No rendered picture reaches a loss or a reward; the detector reaches
a reward only where --reward.sources names it.

Shapes: B images, Q answers.
"""

from __future__ import annotations

import time
from pathlib import Path

from openunirl.advantages import ADVANTAGES
from openunirl.config import RunConfig
from openunirl.experience import gather_experience
from openunirl.guards import StepGuard
from openunirl.losses import Stats, Totals
from openunirl.objectives import Terms, loss_parts
from openunirl.relaxation import tau_at
from openunirl.rewards import score, shuffled
from openunirl.rollout import roll_out
from openunirl.run import Run
from openunirl.types import Prompt


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
        run.blend_with_base_if_last(step)
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
    temperature, tau = config.rollout.answer_temperature, tau_at(config.loss.relaxation, step, config.train.max_steps)
    experience = gather_experience(
        model,
        rollout,
        advantages_B,
        advantages_Q,
        config.loss,
        temperature=temperature,
        tau=tau,
        targets=rewards.targets,
        parts=config.optim.gradient_accumulation_steps,
    )
    images, answers = rollout.images.tokens_BN, rollout.answers.mask_QT
    image_totals = Totals(
        samples=run.processes.share(len(images)), tokens=run.processes.share(images.numel()), max_length=images.shape[1]
    )
    answer_totals = Totals(
        samples=run.processes.share(len(answers)),
        tokens=run.processes.share(float(answers.sum())),
        max_length=config.rollout.max_new_tokens,
    )
    stats, total, grad_norm = Stats(), 0.0, 0.0
    terms = Terms(
        config=config.loss,
        image_totals=image_totals,
        answer_totals=answer_totals,
        temperature=temperature,
        stats=stats,
        judges=config.reward.soft_judges,
    )
    for _ in range(config.loss.num_iterations):
        losses = loss_parts(model, experience, parts=config.optim.gradient_accumulation_steps, terms=terms)
        loss, grad_norm = run.update(losses, step)
        total += loss / config.loss.num_iterations
    size = config.loss.image_coef * advantages_B.abs().mean() + config.loss.answer_coef * advantages_Q.abs().mean()
    return run.metrics(rollout, rewards, stats, loss=total, grad_norm=grad_norm, advantage_abs=float(size))
