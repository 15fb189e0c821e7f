"""A group's images scored behind one prefix, against each behind its own: time and memory of a training pass.

    python benchmarks/common_prefix.py [--images 8] [--guidance 1] [--repeats 5] [--short]

Forward and backward of the tokens of images of one prompt, with random weights: the tiny models (64 tokens an image)
and those of midsize.py (256). "each its own" is the same code with whole rows (openunirl.models.prefix), which is what
it does where no two images share a prompt. Both must give the same gradients. Times by turns; memory is what the
allocator saw at the worst moment, above the weights and their gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from unittest import mock

import midsize
from memory import megabytes, peak
from openunirl.models.janus import Janus
from openunirl.models.prefix import Prefix
from openunirl.models.showo import Showo
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from timing import header, median, parser, ratios, seconds, take_turns
from training_step import CLOSEST, apart, sampled_images


def compare(name: str, model: Showo | Janus, images: int, guidance: float, repeats: int) -> None:
    prompt = midsize.PROMPTS[1]
    rollout, one = sampled_images(model, [prompt] * images, guidance, "remask")

    def shared() -> None:
        model.score_images(rollout, one).logprobs_BN.sum().backward()

    def own() -> None:
        with mock.patch.object(Prefix, "shared", False):
            shared()

    def anew(work: Callable[[], None]) -> None:
        model.net.zero_grad()
        work()

    sides: dict[str, Callable[[], None]] = {"each its own": own, "shared": shared}
    gradients, peaks = [], {}
    for side, work in sides.items():
        anew(work)
        gradients.append({n: p.grad.clone() for n, p in model.net.named_parameters() if p.grad is not None})
        peaks[side] = peak(work, model.device)  # gradients of earlier parts are there
    gap = apart(*gradients)[0]
    assert gap <= CLOSEST, f"{name}: gradients lie {gap:.1e} of their norm apart"
    taken = take_turns({side: partial(anew, work) for side, work in sides.items()}, repeats, model.device)
    faster = sorted(ratios(taken["each its own"], taken["shared"]))
    print(
        f"{name:<12} {images} images of {model.num_image_tokens} tokens, guidance {guidance:g}: "
        + ", ".join(f"{side} {seconds(median(times)):.3f} s {megabytes(peaks[side])}" for side, times in taken.items())
        + f"; {statistics.median(faster):.2f} [{faster[0]:.2f} .. {faster[-1]:.2f}] times faster, "
        + f"gradients {gap:.0e} of their norm apart"
    )


def main() -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--images", type=int, default=8)
    options.add_argument("--guidance", type=float, default=1.0)
    args = options.parse_args()
    assert args.images > 1, f"--images {args.images}: a group has two at least"
    header(args.seed)
    images, repeats = (2, 2) if args.short else (args.images, args.repeats)
    for name in ("tiny-showo", "tiny-janus"):
        compare(name, build(name, shapes.vocabulary(), seed=args.seed), images, args.guidance, repeats * 4)
    for name in ("showo", "janus"):
        model = getattr(midsize, name)(side=8 if args.short else 16, seed=args.seed)
        compare(name, model, images, args.guidance, repeats)


if __name__ == "__main__":
    main()
