"""Show-o drawing images: our sampler against a plain one, and against the floor.

    python benchmarks/showo_sampling.py [--images 4] [--timesteps 8] [--guidance 5] [--repeats 3] [--seed 0] [--short]

The plain network passes, below, are what a paper's code does: at every step all text and image positions of both
halves of the batch, the mask built anew, all 58,498 logits everywhere. Both sides share the code that draws from the
logits and its random numbers, so they must draw the same images up to ties (a token's confidence may tie with the cut;
one token that differs changes what follows). "weights packed" is ours inside `packed_linears`.
"""

from __future__ import annotations

import math

import torch

import midsize
from floor import Decoder, Pass, Product, Replay
from openunirl.draws import KeyedDraws, key
from openunirl.models import masked
from openunirl.models.masked import MASKED
from openunirl.models.packed_linear import packed_linears
from openunirl.models.showo import Showo
from openunirl.types import ImageSampling
from timing import header, parser, report, take_turns


@torch.no_grad()
def plain(model: Showo, prompts: list[str], seeds_B: torch.Tensor, sampling: ImageSampling) -> torch.Tensor:
    """tokens_BN, without any of what ours leaves out."""
    prompting, vocab, scale = model.prompting, model.prompting.vocab, sampling.guidance_scale

    def logits_fn(tokens_BN: torch.Tensor) -> torch.Tensor:
        image_BN = torch.where(tokens_BN == MASKED, vocab.mask, tokens_BN + vocab.code_offset)
        ids_BL = prompting.t2i(prompts, image_BN)
        if scale != 1:
            ids_BL = torch.cat([ids_BL, prompting.t2i([""] * len(prompts), image_BN)])
        logits_BLV = model.net(ids_BL, prompting.t2i_mask(ids_BL))
        if scale != 1:
            cond, uncond = logits_BLV.chunk(2)
            logits_BLV = uncond + scale * (cond - uncond)
        return logits_BLV[:, prompting.max_text_len + 2 : -1, vocab.code_offset : vocab.mask]

    start_BN = torch.full((len(prompts), model.num_image_tokens), MASKED)
    return masked.sample(logits_fn, KeyedDraws(seeds_B), start_BN, sampling).tokens_BN


def floor_passes(model: Showo, prompts: list[str], sampling: ImageSampling) -> list[Pass]:
    """Every distinct text once; then, at every step, the image block of every row and code logits of its tokens."""
    decoder = Decoder(hidden=midsize.HIDDEN, layers=midsize.LAYERS, heads=midsize.HEADS, mlp=(midsize.SHOWO_MLP,))
    guided, prompting = sampling.guidance_scale != 1, model.prompting
    texts_BL = prompting.t2i_prefix([*dict.fromkeys(prompts), *[""] * guided])
    lengths = (texts_BL != prompting.vocab.pad).sum(1).tolist()
    rows, mean = len(prompts) * (1 + guided), math.ceil(sum(lengths) / len(lengths))
    block = model.num_image_tokens + 2
    head = Product(m=rows * model.num_image_tokens, k=midsize.HIDDEN, n=2**midsize.SHOWO_CODE_BITS)
    return [
        Pass(name="texts", products=decoder.products(len(lengths), mean, mean)),
        Pass(name="image", products=(*decoder.products(rows, block, mean + block), head), times=sampling.num_timesteps),
    ]


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--images", type=int, default=4)
    options.add_argument("--timesteps", type=int, default=8)
    options.add_argument("--guidance", type=float, default=5.0)
    args = options.parse_args()
    header(args.seed)
    images, timesteps = (1, 4) if args.short else (args.images, args.timesteps)
    model = midsize.showo(side=8 if args.short else 16, seed=args.seed)
    prompts, seeds_B = midsize.prompts(images), key(args.seed, torch.arange(images))
    sampling = ImageSampling(guidance_scale=args.guidance, num_timesteps=timesteps)

    def slow() -> torch.Tensor:
        return plain(model, prompts, seeds_B, sampling)

    def ours() -> torch.Tensor:
        return model.sample_images(prompts, seeds_B, sampling).tokens_BN

    @torch.no_grad()
    def packed() -> torch.Tensor:
        with packed_linears(model.net):
            return ours()

    print(f"{images} images of {model.num_image_tokens} tokens, {timesteps} steps, guidance {args.guidance:g}")
    want_BN = slow()
    for name, got_BN in (("ours", ours()), ("weights packed", packed())):
        print(f"equal tokens for equal random numbers, {name}: {(want_BN == got_BN).float().mean().item():.2%}")
    replay = Replay(floor_passes(model, prompts, sampling), repeats=1)
    tasks = {"plain": slow, "ours": ours, "ours, weights packed": packed}
    report(take_turns(tasks | {"floor": replay.measure}, 2 if args.short else args.repeats), replay)


if __name__ == "__main__":
    main()
