"""Show-o drawing images: our sampler against a plain one, and against the floor.

    python benchmarks/showo_sampling.py [--images 4] [--timesteps 8] [--guidance 5] [--repeats 3] [--seed 0] [--short]

The plain network passes, below, are what a paper's code does: at every step all text and image positions of both
halves of the batch, the mask built anew, all 58,498 logits everywhere, a draw at every position. Both sides share the
code that draws from logits and its random numbers, so they must draw the same images up to ties (a token's confidence
may tie with the cut; one token that differs changes what follows); a share of equal tokens under 99 % ends the script.
Ours packs its weights (openunirl.models.packed_linear); "ours, not packed" is the same sampler with that switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import midsize
from floor import Pass, Product, Replay, causal
from openunirl.draws import KeyedDraws, key
from openunirl.models import masked
from openunirl.models.masked import MASKED
from openunirl.models.showo import Showo
from openunirl.types import ImageRollout, ImageSampling
from timing import header, parser, report, take_turns


class DrawsEverywhere(KeyedDraws):
    """The same numbers, drawn for tokens that are known, too."""

    everywhere = True


@torch.no_grad()
def plain(model: Showo, prompts: list[str], seeds_B: torch.Tensor, sampling: ImageSampling) -> torch.Tensor:
    """tokens_BN, without any of what ours leaves out."""
    prompting, vocab, scale = model.prompting, model.prompting.vocab, sampling.guidance_scale

    def logits_fn(step: int, tokens_BN: torch.Tensor, at_BK: torch.Tensor | None) -> torch.Tensor:
        assert at_BK is None
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
    return masked.sample(logits_fn, DrawsEverywhere(seeds_B), start_BN, sampling).tokens_BN


def floor_passes(model: Showo, prompts: list[str], rollout: ImageRollout) -> list[Pass]:
    """Every distinct text once, and with it the first step, at which all images of a text are the same: masked. Then,
    at every later step, the image block of every row. Code logits, and in the last layer all but keys and values, of
    the tokens that are still masked there: those of reveal step r are at r later steps."""
    decoder = midsize.decoder(model)
    guided, prompting, later = rollout.sampling.guidance_scale != 1, model.prompting, rollout.sampling.num_timesteps - 1
    texts_BL = prompting.t2i_prefix([*dict.fromkeys(prompts), *[""] * guided])
    lengths = (texts_BL != prompting.vocab.pad).sum(1).tolist()
    rows, mean = len(prompts) * (1 + guided), math.ceil(sum(lengths) / len(lengths))
    num, still = model.num_image_tokens, round(rollout.reveal_step_BN.sum(1).float().mean().item() / max(later, 1))
    first, head = (
        Product(m=m, k=midsize.HIDDEN, n=2**midsize.SHOWO_CODE_BITS) for m in (len(lengths) * num, rows * still)
    )
    block, seen = num + 2, mean + num + 2
    passes = [
        Pass(name="texts", products=decoder.products(len(lengths), mean, causal(mean), read=0)),
        Pass(name="first step", products=(*decoder.products(len(lengths), block, seen, read=num), first)),
        Pass(name="later step", products=(*decoder.products(rows, block, seen, read=still), head), times=later),
    ]
    return passes if later else passes[:2]


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

    def ours() -> ImageRollout:
        return model.sample_images(prompts, seeds_B, sampling)

    def unpacked() -> ImageRollout:
        return midsize.not_packed(ours)

    print(f"{images} images of {model.num_image_tokens} tokens, {timesteps} steps, guidance {args.guidance:g}")
    want_BN, got = slow(), ours()
    for name, tokens_BN in (("ours", got.tokens_BN), ("ours, not packed", unpacked().tokens_BN)):
        midsize.check_equal(name, (want_BN == tokens_BN).float().mean().item())
    replay = Replay(floor_passes(model, prompts, got), repeats=1)
    tasks: dict[str, Callable[[], object]] = {"plain": slow, "ours": ours, "ours, not packed": unpacked}
    report(take_turns(tasks | {"floor": replay.measure}, 2 if args.short else args.repeats, model.device), replay)


if __name__ == "__main__":
    main()
