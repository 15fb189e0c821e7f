"""The loop. One step reads from left to right:

    prompt -> image tokens -> answer -> reward -> advantage -> loss -> update

In: a RunConfig. Out: a run directory (config.json, metrics.jsonl, checkpoints/, evaluation/, report.html).
Source: UniRL (arXiv 2505.23380); METHOD 2-5. No rendered picture reaches a loss or a reward; the detector reaches
a reward only where --reward.sources names it.

Shapes: B images, J questions per image, Q answers.
"""

from __future__ import annotations

import time
from pathlib import Path

from openunirl.advantages import answer_advantages, image_advantages
from openunirl.config import RunConfig
from openunirl.losses import Stats, Totals, gather_experience, grpo
from openunirl.rewards import score, shuffled
from openunirl.rollout import roll_out
from openunirl.run import Run, StepGuard
from openunirl.types import Prompt


def train(config: RunConfig, *, resume: bool = False, command: str = "") -> Path:
    """Trains, evaluates before and after, writes the report; returns the run directory.

    Errors: ValueError for a run directory that exists (or, with `resume`, does not), and for a run that cannot go on.
    """
    run = Run.open(config, resume=resume, command=command)
    run.evaluate_base()
    guard = StepGuard(config.train.stall_steps)
    for step in run.steps():
        prompts = run.prompts_of(step)
        started = time.perf_counter()
        metrics = train_step(run, prompts, step)
        metrics["seconds"] = time.perf_counter() - started
        guard.check(step, metrics, run.last_checkpoint())
        run.log(step, metrics)
        run.evaluate_if_due(step)
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
        rewards = shuffled(rewards, rollout.scoring_seeds_B)
    group, scale = config.rollout.num_generations, config.loss.scale_rewards
    spread = run.processes.std(rewards.image_B), run.processes.std(rewards.answer_Q)  # over all processes
    advantages_B = image_advantages(rewards.image_BJ, group, scale, spread[0])
    advantages_Q = answer_advantages(
        rewards.answer_Q, group, config.rollout.num_questions, config.rollout.num_answers, scale, spread[1]
    )
    temperature = config.rollout.answer_temperature
    experience = gather_experience(model, rollout, advantages_B, advantages_Q, config.loss, temperature=temperature)
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
    for _ in range(config.loss.num_iterations):
        losses = grpo(
            model, experience, config.loss, parts=config.optim.gradient_accumulation_steps, stats=stats,
            image_totals=image_totals, answer_totals=answer_totals, temperature=temperature,
        )  # fmt: skip
        loss, grad_norm = run.update(losses, step)
        total += loss / config.loss.num_iterations
    size = config.loss.image_coef * advantages_B.abs().mean() + config.loss.answer_coef * advantages_Q.abs().mean()
    return run.metrics(rollout, rewards, stats, loss=total, grad_norm=grad_norm, advantage_abs=float(size))
