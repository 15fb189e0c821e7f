"""How much of the image half's gradient is signal: the mean cosine between independent batches' gradients.

    python benchmarks/gradient_noise.py [--preset tiny-showo-grpo] [--batches 8] [--guidance 1.0 1.5] [--scored 2 0]

For each setting the untouched base rolls out `--batches` batches of the preset, each with its own prompts and draws,
and the policy gradient of every batch is compared with every other: 1 is no noise, 0 is nothing but noise. `--scored 0`
scores every step. The oracle's verdict as reward stands beside the model's own (a diagnostic: no training run sees it);
its last column is the cosine between the two rewards' gradients of different batches. Seed: the preset's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from openunirl.advantages import answer_advantages, image_advantages
from openunirl.config import RunConfig
from openunirl.evaluation.geneval import judge_pictures
from openunirl.evaluation.run import to_uint8
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals
from openunirl.objectives import Terms, loss_parts
from openunirl.presets import PRESETS
from openunirl.provenance import commit
from openunirl.rewards import score
from openunirl.rollout import Rollout, roll_out
from openunirl.run import Run


def verdicts(run: Run, rollout: Rollout) -> torch.Tensor:
    """[B, 1]: 1 where the world's detector calls the image right."""
    assert run.world.judge is not None
    pictures = list(to_uint8(run.model.decode(rollout.images.images)))
    metadata = [prompt.metadata() for prompt in rollout.prompts for _ in range(rollout.num_generations)]
    right = [verdict.correct for verdict in judge_pictures(run.world.judge(), metadata, pictures)]
    return torch.tensor(right).float()[:, None]


def gradient(run: Run, rollout: Rollout, image_BJ: torch.Tensor, answer_Q: torch.Tensor) -> torch.Tensor:
    """The image half's policy gradient of one batch, flat."""
    loss, group = run.config.loss, rollout.num_generations
    advantages_B = image_advantages(image_BJ, group, loss.scale_rewards)
    advantages_Q = answer_advantages(answer_Q, group, rollout.num_questions, rollout.num_answers, loss.scale_rewards)
    experience = gather_experience(run.model, rollout, advantages_B, advantages_Q, loss, temperature=1.0)
    tokens_BN = rollout.images.tokens_BN
    totals = Totals(samples=len(tokens_BN), tokens=tokens_BN.numel(), max_length=tokens_BN.shape[1])
    run.model.net.zero_grad()
    terms = Terms(config=loss, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    for part in loss_parts(run.model, experience, parts=1, terms=terms):
        part.backward()
    return torch.cat([p.grad.flatten() for p in run.model.net.parameters() if p.grad is not None])


def mean_cosine(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Over all pairs of different batches."""
    table = torch.nn.functional.normalize(torch.stack(one)) @ torch.nn.functional.normalize(torch.stack(other)).T
    return float((table.sum() - table.diag().sum()) / (len(one) * (len(one) - 1)))


def measure(preset: RunConfig, guidance: float, scored: int, batches: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        sampling = replace(preset.rollout.sampling, guidance_scale=guidance)
        config = replace(
            preset,
            output_dir=str(Path(folder) / "run"),
            rollout=replace(preset.rollout, sampling=sampling),
            loss=replace(preset.loss, num_scored_steps=scored, answer_coef=0.0, beta=0.0),
            train=replace(preset.train, max_steps=batches, report_to=()),
            eval=replace(preset.eval, num_prompts=0),
        )
        run = Run.open(config, resume=False, command="")
        own, oracle, seconds = [], [], 0.0
        for step in range(1, batches + 1):
            started = time.perf_counter()
            rollout = roll_out(run.model, run.prompts_of(step), config.rollout, seed=config.seed, step=step)
            rewards = score(run.model, rollout, run.world, config.reward, config.rollout)
            own.append(gradient(run, rollout, rewards.image_BJ, rewards.answer_Q))
            seconds += time.perf_counter() - started
            oracle.append(gradient(run, rollout, verdicts(run, rollout), rewards.answer_Q))
    cosines = (mean_cosine(own, own), mean_cosine(oracle, oracle), mean_cosine(own, oracle))
    told = " | ".join(f"{value:.3f}" for value in cosines)
    return f"| {guidance} | {scored or 'all'} | {told} | {seconds / batches:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-showo-grpo", choices=sorted(PRESETS))
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--scored", type=int, nargs="+", default=[2, 0])
    args = parser.parse_args()
    print(f"`{' '.join(sys.argv)}`, commit {commit()}")
    columns = ("guidance", "scored steps", "own reward", "oracle", "own with oracle", "seconds a batch")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for guidance in args.guidance:
        for scored in args.scored:
            print(measure(PRESETS[args.preset], guidance, scored, args.batches), flush=True)


if __name__ == "__main__":
    main()
