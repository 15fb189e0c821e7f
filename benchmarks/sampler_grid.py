"""How well a model draws under every sampler setting of the grid: timesteps x guidance x temperature.

    python benchmarks/sampler_grid.py MODEL [--split validation] [--images 300] [--seed 0]

MODEL is a folder or a bundled name. Prints a table, best first, with command, seed and commit.
"""

from __future__ import annotations

import argparse
import itertools
import sys

from openunirl.config import EvalConfig, ModelConfig
from openunirl.evaluation.geneval import summarize
from openunirl.evaluation.run import draw_and_judge
from openunirl.models.protocol import UnifiedModel, load_model
from openunirl.provenance import commit
from openunirl.tasks.worlds import WORLDS
from openunirl.types import ImageSampling

TIMESTEPS, GUIDANCE, TEMPERATURE = (8, 16), (1.0, 1.5, 2.0, 3.0), (0.7, 1.0)


def grid(model: UnifiedModel, split: str, images: int, seed: int) -> list[tuple[float, float, float, ImageSampling]]:
    """(accuracy, low, high, setting) for every setting, best first."""
    world, rows = WORLDS["shapes"](), []
    prompts = world.evaluation_prompts(split, images, seed)
    timesteps = TIMESTEPS[-1:] if model.draws_tokens_in_turn else TIMESTEPS  # not read where each token has a pass
    for steps, guidance, temperature in itertools.product(timesteps, GUIDANCE, TEMPERATURE):
        sampling = ImageSampling(num_timesteps=steps, guidance_scale=guidance, temperature=temperature)
        drawn, _ = draw_and_judge(model, world, prompts, EvalConfig(sampling=sampling), seed, ask_too=False)
        summary = summarize(drawn)
        rows.append((summary.overall, *summary.ci95, sampling))
    return sorted(rows, key=lambda row: -row[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--split", default="validation", choices=("validation", "heldout"))
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_model(ModelConfig(weights=args.model, attn_implementation="eager"))
    prompts = {p.prompt for p in WORLDS["shapes"]().evaluation_prompts(args.split, args.images, args.seed)}
    told = f"{args.images} images, {len(prompts)} distinct prompts, {args.split}"
    print(f"{' '.join(sys.argv)}   seed {args.seed}   commit {commit()}   {told}")
    print("generation  95 % interval    timesteps  guidance  temperature")
    for accuracy, low, high, s in grid(model, args.split, args.images, args.seed):
        print(
            f"{accuracy:10.3f}  {low:.3f} .. {high:.3f}  {s.num_timesteps:9}  {s.guidance_scale:8}  {s.temperature:11}"
        )


if __name__ == "__main__":
    main()
