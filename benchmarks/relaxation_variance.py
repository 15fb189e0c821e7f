"""Noise given the sampled token against plain noise in the straight-through Gumbel-softmax: variance of the gradient.

    python benchmarks/relaxation_variance.py                      # the toy and the bundled tiny model, 80 CPU seconds
    python benchmarks/relaxation_variance.py --model FOLDER --images 16 --draws 16

Two tables, seeds fixed:

* A toy where the truth is known: one token of `--codes` codes, a random quadratic loss of its one-hot, logits from a
  normal distribution. The exact gradient of the expected loss is enumerated. Over many (token, noise) draws: bias and
  standard deviation of the straight-through estimate relative to the exact gradient's norm, the root of their squares'
  sum, and the cosine of the estimate's mean with the exact gradient. Means over `--toys` toys.
* A model: images drawn from it, the gold answers' loss on the relaxed images, its gradient at the weights through the
  images alone. Per temperature and noise: the norm of the mean gradient over noise draws, the standard deviation around
  it from the noise alone (the images are held), and their ratio. The norm of a mean over few draws holds some of that
  deviation, too.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch.nn import functional as F

from openunirl.config import LossConfig, RelaxationConfig, RolloutConfig
from openunirl.draws import KeyedDraws, key
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals
from openunirl.models.protocol import UnifiedModel, load_model
from openunirl.objectives import Terms, loss_parts
from openunirl.provenance import commit
from openunirl.relaxation import Relaxation, relax_tokens
from openunirl.rollout import Rollout, roll_out
from openunirl.tasks import shapes
from openunirl.types import ImageSampling

NOISES = ("conditional", "plain")


def toy(seed: int, codes: int, noise: str, tau: float, draws: int) -> tuple[float, float, float, float]:
    """(bias, standard deviation, root mean square error) over the exact gradient's norm, and the cosine."""
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(codes, generator=generator).double()
    linear_V, square_VV = (torch.randn(*n, generator=generator).double() for n in ((codes,), (codes, codes)))

    def loss(y_SV: torch.Tensor) -> torch.Tensor:
        return y_SV @ linear_V + ((y_SV @ square_VV) * y_SV).sum(-1)

    leaf_V = logits_V.clone().requires_grad_()
    exact_V = torch.autograd.grad((leaf_V.softmax(0) * loss(torch.eye(codes).double())).sum(), leaf_V)[0]
    keys_S = key(seed, 31, torch.arange(draws))
    leaf_SV = logits_V.repeat(draws, 1).requires_grad_()
    logp_SV = leaf_SV.log_softmax(-1)
    chosen_S = KeyedDraws(keys_S).tokens(0, logp_SV.detach().exp()[:, None])[:, 0]
    relax = Relaxation(seeds_B=key(keys_S, 9), tau=tau, noise=noise)  # type: ignore[arg-type]
    y_SV = relax_tokens(logp_SV, chosen_S, torch.arange(draws), 1, relax)
    got_SV = torch.autograd.grad(loss(y_SV).sum(), leaf_SV)[0]
    size, bias_V = exact_V.norm(), got_SV.mean(0) - exact_V
    spread = got_SV.var(0).sum()
    cosine = torch.cosine_similarity(got_SV.mean(0), exact_V, dim=0)
    told = (bias_V.norm() / size, spread.sqrt() / size, (bias_V.square().sum() + spread).sqrt() / size, cosine)
    return tuple(float(x) for x in told)  # type: ignore[return-value]


def through_images(model: UnifiedModel, rollout: Rollout, noise: str, tau: float, draw: int) -> torch.Tensor:
    """The gold answers' gradient at the weights that comes through the relaxed images, flat."""
    config = LossConfig(
        method="sft", end_to_end=True, beta=0.0, num_scored_steps=0,
        relaxation=RelaxationConfig(noise=noise),  # type: ignore[arg-type]
    )  # fmt: skip
    count = len(rollout.images.prompts)
    noisy = Rollout(**{**vars(rollout), "scoring_seeds_B": key(rollout.scoring_seeds_B, draw)})
    ones = torch.ones(count), torch.ones(len(rollout.gold))
    experience = gather_experience(model, noisy, *ones, config, temperature=1.0, tau=tau)
    totals = Totals(samples=len(rollout.gold), tokens=1, max_length=1)
    terms = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    for i, part in enumerate(loss_parts(model, experience, parts=1, terms=terms)):
        part.backward()
        if i == 0:  # the answers' own part: only its gradient at the image is wanted
            model.net.zero_grad()
    return torch.cat([p.grad.flatten() for p in model.net.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-showo")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--tau", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--codes", type=int, default=16)
    parser.add_argument("--toys", type=int, default=50)
    args = parser.parse_args()
    print(f"`{' '.join(sys.argv)}`, commit {commit()}\n")
    print(f"A toy of {args.codes} codes, means over {args.toys} toys of 4,000 draws:\n")
    print("| tau | noise | bias | standard deviation | root mean square error | cosine of the mean |")
    print("|---|---|---|---|---|---|")
    for tau in args.tau:
        for noise in NOISES:
            rows = torch.tensor([toy(seed, args.codes, noise, tau, 4000) for seed in range(args.toys)])
            print(f"| {tau} | {noise} | " + " | ".join(f"{x:.3f}" for x in rows.mean(0).tolist()) + " |")

    model = load_model(args.model)
    model.freeze_reference()
    config = RolloutConfig(
        num_generations=1, sampling=ImageSampling(num_timesteps=8, guidance_scale=1.5), max_new_tokens=4
    )
    rollout = roll_out(model, shapes.prompts("train", args.images, 0), config, seed=0, step=1)
    print(f"\n{args.model}, {args.images} images, {args.draws} draws of noise each:\n")
    print("| tau | noise | norm of the mean | standard deviation | ratio | cosine of the two noises' means |")
    print("|---|---|---|---|---|---|")
    for tau in args.tau:
        tables = [torch.stack([through_images(model, rollout, n, tau, d) for d in range(args.draws)]) for n in NOISES]
        cosine = F.cosine_similarity(tables[0].mean(0), tables[1].mean(0), dim=0)
        for noise, table in zip(NOISES, tables, strict=True):
            mean, spread = float(table.mean(0).norm()), float(table.var(0).sum().sqrt())
            print(f"| {tau} | {noise} | {mean:.4f} | {spread:.4f} | {spread / mean:.2f} | {cosine:.3f} |", flush=True)


if __name__ == "__main__":
    main()
