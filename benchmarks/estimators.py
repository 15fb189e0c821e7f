"""Log-prob estimators of a masked model against the exact one: bias and noise of the log-prob and of its gradient.

    python benchmarks/estimators.py [--preset tiny-showo-grpo] [--guidance-scale 1.5] [--batches 2] [--prompts 4]
                                    [--images 4] [--draws 6]

The untouched base rolls out `--batches` batches. For its draws, the guided log-prob over all steps of the trajectory is
exact (it equals the sampler's, which is checked first); every estimator is drawn `--draws` times on the same images.
Columns, each the mean over batches (of numerators and denominators apart, where a cosine needs the size of a mean):

    passes       forwards with gradient per image; a guided one is worth two
    bias, sd     of the image's log-prob, in nats per token: mean difference to the exact one, deviation over draws
    cosine, one draw     of one draw's gradient with the exact one: what an update sees
    cosine, mean         of the expected gradient with the exact one. Its size is estimated, without bias, from products
                         of different draws, so that with few of them a cosine may come out above 1; nan: below 0
    cosine, same branch  the same against all steps with the same guidance: what the estimator alone costs
    rel. variance        variance over draws over the exact gradient's squared length

twice: for the policy gradient (each image weighted by its advantage under the preset's reward) and for the gradient of
the mean log-prob. Unguided rows score the conditional branch only; "to time 0.5": random masks of early states only
(mask_time), as the demo's preset draws them. Seed, and unless --guidance-scale is given the guidance: the preset's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from openunirl.advantages import image_advantages
from openunirl.config import RunConfig
from openunirl.draws import key
from openunirl.models.masked import RANDOM_MASKS, Estimator
from openunirl.models.protocol import UnifiedModel, load_model
from openunirl.presets import PRESETS
from openunirl.provenance import commit
from openunirl.rewards import score
from openunirl.rollout import Rollout, roll_out
from openunirl.tasks.worlds import WORLDS

CREDITS = ("policy gradient", "gradient of the mean log-prob")
COLUMNS = (
    "log-probs", "estimator", "passes", "bias", "sd", "cosine, one draw", "cosine, mean", "cosine, same branch",
    "rel. variance",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One draw: each image's log-prob [B], and both credits' gradients [2, parameters]."""

    logprob_B: torch.Tensor
    gradients: torch.Tensor


def scored(
    model: UnifiedModel, rollout: Rollout, credit_CB: torch.Tensor, estimator: Estimator, draw: int, guided: bool
) -> Scored:
    images = rollout.images
    passes = model.scoring_passes(images, estimator, key(rollout.scoring_seeds_B, 100 + draw))
    share = 1 / len(passes) if estimator.name in RANDOM_MASKS else 1.0
    parameters = [p for p in model.net.parameters() if p.requires_grad]
    logprob_B, gradients = torch.zeros(len(images.tokens_BN)), None
    for one in passes:
        logprobs_BN = model.score_images(images, one, logprob_guidance=guided).logprobs_BN
        part_B = share * (logprobs_BN * one.weight_BN * one.scored_BN).sum(1)
        logprob_B += part_B.detach()
        rows = []
        for c, credit_B in enumerate(credit_CB):
            loss = (credit_B * part_B).mean()
            found = torch.autograd.grad(loss, parameters, retain_graph=c == 0, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            rows.append(torch.cat([g.flatten() for g in filled]))
        gradients = torch.stack(rows) if gradients is None else gradients + torch.stack(rows)
    assert gradients is not None
    return Scored(logprob_B=logprob_B, gradients=gradients)


def estimators(num_timesteps: int) -> dict[str, Estimator]:
    some = [k for k in (num_timesteps // 2, num_timesteps // 4, 1) if k]
    return {
        "trajectory, all steps": Estimator(name="trajectory"),
        **{f"trajectory, {k} of {num_timesteps}": Estimator(name="trajectory", num_scored_steps=k) for k in some},
        **{f"remask, {m} draws": Estimator(name="remask", num_draws=m) for m in (1, 4)},
        **{
            f"training_loss{told}, {m} draws": Estimator(name="training_loss", num_draws=m, mask_time=latest)
            for told, latest in (("", 1.0), (" to time 0.5", 0.5))
            for m in (1, 4)
        },
        "full_mask": Estimator(name="full_mask"),
    }


def compare(draws: list[Scored], exact: Scored, same: Scored, num_tokens: int, sums: dict[str, float]) -> None:
    """Adds one batch's numbers to `sums`; the gradients' in units of the exact one's squared length."""
    logprob_DB = torch.stack([one.logprob_B for one in draws]) / num_tokens
    sums["bias"] += float((logprob_DB - exact.logprob_B / num_tokens).mean())
    sums["sd"] += float(logprob_DB.std(0).mean()) if len(draws) > 1 else 0.0
    for c, credit in enumerate(CREDITS):
        g, branch = exact.gradients[c], same.gradients[c]
        length = g.square().sum()
        table = torch.stack([one.gradients[c] for one in draws])
        gram = table @ table.T / length
        own = gram.diag().mean()
        cross = (gram.sum() - gram.diag().sum()) / (len(draws) * (len(draws) - 1)) if len(draws) > 1 else own
        inner, inner_branch = table @ g / length, table @ branch / length
        sums[f"{credit}/one"] += float((inner / gram.diag().sqrt()).mean())
        sums[f"{credit}/inner"] += float(inner.mean())
        sums[f"{credit}/inner_branch"] += float(inner_branch.mean())
        sums[f"{credit}/branch"] += float(branch.square().sum() / length)
        sums[f"{credit}/cross"] += float(cross)
        sums[f"{credit}/variance"] += float(own - cross)


def row(credit: str, guided: bool, name: str, passes: int, sums: dict[str, float], batches: int) -> str:
    cells = ["guided" if guided else "unguided", name, str(passes)]
    cells += [f"{sums['bias'] / batches:+.3f}", f"{sums['sd'] / batches:.3f}"]
    size = max(sums[f"{credit}/cross"], 0) ** 0.5
    mean = sums[f"{credit}/inner"] / (size * batches**0.5) if size else float("nan")
    same = sums[f"{credit}/inner_branch"] / (size * sums[f"{credit}/branch"] ** 0.5) if size else float("nan")
    cells += [f"{sums[f'{credit}/one'] / batches:.3f}", f"{mean:.3f}", f"{same:.3f}"]
    cells.append(f"{sums[f'{credit}/variance'] / batches:.2f}")
    return "| " + " | ".join(cells) + " |"


def measure(config: RunConfig, batches: int, prompts: int, images: int, draws: int) -> None:
    model, world = load_model(config.model), WORLDS[config.world]()
    model.freeze_reference()
    settings = config.rollout
    kinds = estimators(settings.sampling.num_timesteps)
    branches = (True, False) if settings.sampling.guidance_scale != 1 else (False,)  # without guidance they are one
    rows: dict[tuple[bool, str], dict[str, float]] = {
        (guided, name): defaultdict(float) for guided in branches for name in kinds
    }
    passes, worst, num_tokens = {}, 0.0, 1
    for step in range(1, batches + 1):
        asked = world.training_prompts(prompts * batches, config.seed)[(step - 1) * prompts : step * prompts]
        rollout = roll_out(model, asked, settings, seed=config.seed, step=step)
        num_tokens = rollout.images.tokens_BN.shape[1]
        rewards = score(model, rollout, world, config.reward, settings)
        advantages_B = image_advantages(rewards.image_BJ, images, config.loss.scale_rewards)
        credit_CB = torch.stack([advantages_B, torch.ones_like(advantages_B)])
        exact = None
        for guided in branches:
            same = scored(model, rollout, credit_CB, kinds["trajectory, all steps"], 0, guided)
            if exact is None:
                exact = same
                worst = max(worst, float((exact.logprob_B - rollout.images.logprobs_BN.sum(1)).abs().max()))
            for name, kind in kinds.items():
                random = kind.name in RANDOM_MASKS or kind.num_scored_steps > 0
                some = [scored(model, rollout, credit_CB, kind, draw, guided) for draw in range(draws if random else 1)]
                compare(some, exact, same, num_tokens, rows[guided, name])
                passes[name] = len(model.scoring_passes(rollout.images, kind, rollout.scoring_seeds_B))
    told = f"{batches} batches of {prompts} prompts x {images} images, {draws} draws, {settings.sampling}"
    print(f"{told}; exact log-prob of an image ({num_tokens} tokens) equals the sampler's within {worst:.1e}\n")
    for credit in CREDITS:
        print(f"{credit}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for (guided, name), sums in rows.items():
            print(row(credit, guided, name, passes[name], sums, batches))
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-showo-grpo", choices=sorted(PRESETS))
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--guidance-scale", type=float, help="of the sampler; by default the preset's")
    args = parser.parse_args()
    if args.batches < 1 or args.prompts < 1 or args.images < 2 or args.draws < 2:
        parser.error("wanted --batches 1, --prompts 1, --images 2 and --draws 2 at least")
    preset, started = PRESETS[args.preset], time.perf_counter()
    sampling = preset.rollout.sampling
    if args.guidance_scale is not None:
        sampling = replace(sampling, guidance_scale=args.guidance_scale)
    config = replace(preset, rollout=replace(preset.rollout, num_generations=args.images, sampling=sampling))
    print(f"`python {' '.join(sys.argv)}`, seed {config.seed}, commit {commit()}\n", flush=True)
    measure(config, args.batches, args.prompts, args.images, args.draws)
    print(f"{time.perf_counter() - started:.0f} seconds, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
