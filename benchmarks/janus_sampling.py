"""Janus drawing images: our loop against transformers' own generate(generation_mode="image"), and against the floor.

    python benchmarks/janus_sampling.py [--images 4] [--guidance 5] [--repeats 5] [--seed 0] [--short]

Same weights (shared in memory), prompts of different lengths, guidance and random numbers; top-k, which transformers
switches on silently, is off in both. The two must draw the same images: a share of equal tokens under 99 % ends the
script. The first row of ours reads torch's generator as transformers does; the second takes its own keyed draws, which
is what a training run does.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from transformers import JanusForConditionalGeneration

import midsize
from floor import Pass, Product, Replay, causal, steps
from openunirl.draws import GeneratorDraws, key
from openunirl.models.autoregressive import left_padded
from openunirl.models.janus import Janus
from openunirl.types import ImageSampling
from timing import header, parser, report, take_turns


def theirs_of(model: Janus) -> Any:
    """transformers' class around the same tensors."""
    with torch.device("meta"):
        theirs: Any = JanusForConditionalGeneration._from_config(model.config, attn_implementation="sdpa")
    frozen = {f"model.vqmodel.{name}": value for name, value in model.image_tokenizer.state_dict().items()}
    theirs.load_state_dict(model.net.state_dict() | frozen, strict=False, assign=True)
    for name, buffer in model.net.named_buffers():  # some of them are in no state dict
        module, _, last = name.rpartition(".")
        setattr(theirs.get_submodule(module), last, buffer)
    stray = [name for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()) if tensor.is_meta]
    assert not stray, f"tensors that were not shared: {stray[:3]}"
    vocab, settings = model.prompting.vocab, theirs.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = vocab.bos, vocab.eos, vocab.pad
    settings.generation_kwargs = {"boi_token_id": vocab.boi}
    return theirs.eval()


def floor_passes(model: Janus, prompts: list[str], guided: bool) -> list[Pass]:
    """What no exact sampler with a cache can do without: every distinct row once, then one position a step and
    row. Of a prompt's last layer, keys and values, and the rest at its last position."""
    decoder = midsize.decoder(model)
    lengths = [len(model.prompting.t2i(prompt)) for prompt in dict.fromkeys(prompts)]
    lengths += sorted(set(lengths)) if guided else []
    rows, width, codes = len(prompts) * (1 + guided), midsize.HIDDEN, midsize.JANUS_CODES
    before: tuple[Product, ...] = (Product(m=rows, k=8, n=width), Product(m=rows, k=width, n=width))
    head = (Product(m=rows, k=width, n=width), Product(m=rows, k=width, n=codes))
    mean = math.floor(statistics.mean(lengths))
    prefill = decoder.products(len(lengths), mean, causal(mean), read=1)
    first = tuple(Product(m=len(lengths), k=p.k, n=p.n) for p in head)
    return [
        Pass(name="prompts", products=prefill + first),
        *steps(decoder, rows, mean + 1, model.num_image_tokens - 1, before + head, parts=3),
    ]


def main() -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--images", type=int, default=4)
    options.add_argument("--guidance", type=float, default=5.0)
    args = options.parse_args()
    header(args.seed)
    model = midsize.janus(side=8 if args.short else 16, seed=args.seed)
    theirs, prompts = theirs_of(model), midsize.prompts(args.images)
    ids_BL, real_BL = left_padded([model.prompting.t2i(prompt) for prompt in prompts], model.prompting.vocab.pad)
    sampling, seeds_B = ImageSampling(guidance_scale=args.guidance), key(args.seed, torch.arange(args.images))

    def transformers() -> torch.Tensor:
        torch.manual_seed(args.seed)
        return theirs.generate(
            ids_BL, attention_mask=real_BL.long(), generation_mode="image", do_sample=True, top_k=0,
            guidance_scale=args.guidance,
        )  # fmt: skip

    def ours() -> torch.Tensor:
        draws = GeneratorDraws(torch.Generator().manual_seed(args.seed), args.images)
        return model.sample_images(prompts, seeds_B, sampling, draws).tokens_BN

    def keyed() -> torch.Tensor:
        return model.sample_images(prompts, seeds_B, sampling).tokens_BN

    want_BN, got_BN = transformers(), ours()
    equal = (want_BN == got_BN).float().mean().item()
    lengths = sorted({len(model.prompting.t2i(prompt)) for prompt in prompts})
    print(
        f"{args.images} images of {model.num_image_tokens} tokens, guidance {args.guidance:g}, prompts of {lengths} ids"
    )
    midsize.check_equal("ours", equal)
    keyed()
    replay = Replay(floor_passes(model, prompts, args.guidance != 1))
    tasks = {"transformers' generate": transformers, "ours": ours, "ours, keyed draws": keyed}
    report(take_turns(tasks | {"floor": replay.measure}, 2 if args.short else args.repeats, model.device), replay)


if __name__ == "__main__":
    main()
