"""A training step's passes, forward and backward: ours against plain ones and the floor, in time and in peak memory.

    python benchmarks/training_step.py [--images 4] [--guidance 5] [--repeats 3] [--compile] [--short]

A pass scores the tokens of guided images (Show-o: those under a random mask, and, its worst case, all of them at once;
Janus: all of them), of several prompts or all of one, or sampled answers: to two questions on each image, or four to
one question. The plain passes (plain_passes.py) are what a paper's code does. All sides must give the same gradients,
within 1e-5 of their norm, and each weight's within 1e-4. "recomputed" is ours with --train.gradient-checkpointing,
"compiled" (--compile) with --train.compile; it compiles before the clock starts.
Memory is what the allocator saw at the worst moment, above the weights and their gradients (memory.py); --repeats 0
measures nothing else. The floor is that of the products of each distinct text and of each distinct image behind one, of
what texts about one image begin with alike only once, without pads and without what no mask lets through, forward and
backward, at the rate of this run (floor.py); nothing is computed twice in it. Janus sees pixels, decoded before the
clock starts; its small vision tower is no part of the floor.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

import midsize
import plain_passes
from floor import Block, Pass, Product, Replay, causal, training
from memory import megabytes, peak
from openunirl.draws import key
from openunirl.models.janus import Janus
from openunirl.models.masked import MASKED, Estimator
from openunirl.models.showo import Showo
from openunirl.types import AnswerRollout, AnswerSampling, ImageQuestion, ImageRollout, Images, ImageSampling, ScorePass
from timing import header, median, parser, ratios, seconds, take_turns

CLOSEST = 1e-5  # of the norm of the whole gradient
EACH, TINY = 1e-4, 1e-3  # of each weight's, those below TINY of the whole taken for as large
ANSWER_TOKENS = 8

Model = Showo | Janus
Work = Callable[[], torch.Tensor]  # a loss


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pass of a step. `loss(model)` is our loss; `scored`: tokens whose log-prob it holds.

    Example: Case(title="Show-o, answers", model=showo, plain=..., loss=..., scored=64, floor=[Pass(...)])
    """

    title: str
    model: Model
    plain: Work
    loss: Callable[[Any], torch.Tensor]
    scored: int
    floor: Sequence[Pass]


def images_case(model: Model, prompts: list[str], guidance: float, estimator: Literal["remask", "full_mask"]) -> Case:
    """Images of random tokens: what they are changes neither time nor memory."""
    rollout, one = sampled_images(model, prompts, guidance, estimator)
    scored = int(one.scored_BN.sum())
    blocks = (showo_blocks if isinstance(model, Showo) else janus_blocks)(model, prompts, guidance != 1, one)
    m, width = sum(block.rows * block.read for block in blocks), midsize.HIDDEN
    head = Product(m=m, k=width, n=model.num_codes)
    return Case(
        title=f"{name_of(model)}, {len(prompts)} images of {model.num_image_tokens} tokens, guidance {guidance:g}"
        + (f", {estimator}" if isinstance(model, Showo) else "")
        + (", one prompt" if len(set(prompts)) == 1 < len(prompts) else ""),
        model=model,
        plain=lambda: plain_passes.images_loss(model, rollout, one),
        loss=lambda ours: -ours.score_images(rollout, one).logprobs_BN.sum() / scored,
        scored=scored,
        floor=training(
            midsize.decoder(model), blocks,
            (head,) if isinstance(model, Showo) else (Product(m=m, k=width, n=width), head),
        ),
    )  # fmt: skip


def showo_blocks(model: Showo, prompts: list[str], guided: bool, one: ScorePass) -> list[Block]:
    """Distinct texts, which no image changes, and distinct images behind theirs: where nothing is shown, one a text."""
    texts = [*dict.fromkeys(prompts), *[""] * guided]
    lengths = (model.prompting.t2i_prefix(texts) != model.prompting.vocab.pad).sum(1).tolist()
    rows = len(prompts) * (1 + guided) if one.shown_BN.any() else len(texts)
    mean, num = sum(lengths) // len(texts), model.num_image_tokens
    read = int(one.scored_BN.sum()) // len(prompts)
    return [
        Block(rows=len(texts), positions=mean, keys=causal(mean), read=0),
        Block(rows=rows, positions=num + 2, keys=mean + num + 2, read=read),
    ]


def janus_blocks(model: Janus, prompts: list[str], guided: bool, _: ScorePass) -> list[Block]:
    """Distinct texts, whose last position gives the first token, and each image's tokens but the last."""
    lengths = [len(model.prompting.t2i(prompt)) for prompt in dict.fromkeys(prompts)]
    lengths += sorted(set(lengths)) if guided else []
    mean, num = sum(lengths) // len(lengths), model.num_image_tokens - 1
    return [
        Block(rows=len(lengths), positions=mean, keys=causal(mean), read=1),
        Block(rows=len(prompts) * (1 + guided), positions=num, keys=mean + causal(num), read=num),
    ]


def sampled_images(
    model: Model, prompts: list[str], guidance: float, estimator: Literal["remask", "full_mask"], seed: int = 0
) -> tuple[ImageRollout, ScorePass]:
    shape = (len(prompts), model.num_image_tokens)
    rollout = ImageRollout(
        prompts=tuple(prompts),
        tokens_BN=torch.randint(model.num_codes, shape, generator=torch.Generator().manual_seed(seed)),
        reveal_step_BN=torch.zeros(shape, dtype=torch.int64),
        logprobs_BN=torch.zeros(shape),
        sampling=ImageSampling(guidance_scale=guidance, num_timesteps=2),
    )
    assert MASKED not in rollout.tokens_BN.unique()
    return rollout, model.scoring_passes(rollout, Estimator(name=estimator), key(seed, torch.arange(len(prompts))))[0]


def answers_case(model: Model, prompts: list[str], seed: int, *, questions: int = 2, each: int = 1) -> Case:
    """`each` answers to each of `questions` questions on each image."""
    images = sampled_images(model, prompts, 1.0, "full_mask")[0].images
    if isinstance(model, Janus):
        images = Images(pixels_BCHW=model.decode(images))
    asked, sampled = sampled_answers(model, images, seed, questions, each)
    ids = [row[m].tolist() for row, m in zip(sampled.tokens_QT, sampled.mask_QT, strict=True)]
    scored, prompting, read, fed = sum(map(len, ids)), model.prompting, set(), set()
    for one, answer in zip(asked, ids, strict=True):
        question = prompting.question(one.question)
        text = (one.image, *question, *answer)
        read |= {text[: 1 + i] for i in range(len(question), len(text) - 1)}  # what each scored token follows
        fed |= {text[: 2 + i] for i in range(len(text) - 2)}  # no last token is fed
    rows, prefix = len(images), midsize.image_prefix(model)
    mean = len(fed) // rows // questions  # a question and its answers, side by side
    head = Product(m=len(read), k=midsize.HIDDEN, n=prompting.vocab.text_size)
    return Case(
        title=f"{name_of(model)}, {len(asked)} answers of up to {ANSWER_TOKENS} tokens on {rows} images"
        + (f", {each} to a question" if each > 1 else ""),
        model=model,
        plain=lambda: plain_passes.answers_loss(model, images, asked, ids),
        loss=lambda ours: -ours.score_answers(images, asked, sampled).logprobs_QT.sum() / scored,
        scored=scored,
        floor=training(
            midsize.decoder(model),
            [
                Block(
                    rows=rows, positions=prefix, read=0,
                    keys=prefix if isinstance(model, Showo) else causal(prefix),
                ),
                Block(
                    rows=rows * questions, positions=mean, keys=prefix + sum(len(text) - 1 for text in fed) // len(fed),
                    read=len(read) // rows // questions,
                ),
            ],
            (head,),
        ),
    )  # fmt: skip


def sampled_answers(
    model: Model, images: Images, seed: int, questions: int, each: int
) -> tuple[list[ImageQuestion], AnswerRollout]:
    texts = [text for text in midsize.questions(questions) for _ in range(each)]
    asked = [ImageQuestion(image=b, question=text) for b in range(len(images)) for text in texts]
    sampling = AnswerSampling(max_new_tokens=ANSWER_TOKENS, temperature=1.0)
    return asked, model.sample_answers(images, asked, key(seed, torch.arange(len(asked))), sampling)


def name_of(model: Model) -> str:
    return "Show-o" if isinstance(model, Showo) else "Janus"


# ------------------------------------------------------------------------------------------------- both sides


def apart(want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> tuple[float, float, str]:
    """Distance of two gradients, as a share of the first one's norm; the largest such share of a weight's own (or,
    where that is more, of TINY of the whole: what should be 0 is rounding's), and that weight."""
    zero = torch.zeros(())

    def norm(gradient: torch.Tensor) -> float:
        return float(gradient.double().norm())

    whole = math.hypot(*map(norm, want.values()))
    gaps = {name: norm(want.get(name, zero) - got.get(name, zero)) for name in want.keys() | got.keys()}
    shares = {name: gap / max(norm(want.get(name, zero)), TINY * whole) for name, gap in gaps.items()}
    worst = max(shares, key=shares.__getitem__)
    return math.hypot(*gaps.values()) / whole, shares[worst], worst


def compare(case: Case, repeats: int, compiling: bool) -> None:
    """Prints the table of a pass; ends the script where gradients differ."""
    ours = {"ours": case.model, "recomputed": copy.deepcopy(case.model)}
    ours["recomputed"].recompute_activations()
    if compiling:
        ours["compiled"] = copy.deepcopy(case.model)
        ours["compiled"].compile_layers()
        case.loss(ours["compiled"]).backward()
    sides = {"plain": (case.model, case.plain)}
    sides |= {name: (model, lambda model=model: case.loss(model)) for name, model in ours.items()}
    print(f"\n{case.title}")
    peaks, want = {}, {}
    for name, (side, work) in sides.items():
        for parameter in side.net.parameters():  # gradients of earlier parts are there
            parameter.grad = torch.zeros_like(parameter)
        peaks[name] = peak(lambda work=work: work().backward(), case.model.device)
        got = {n: p.grad for n, p in side.net.named_parameters() if p.grad is not None}
        side.net.zero_grad()
        if not want:
            want = got
            continue
        gap, largest, worst = apart(want, got)
        print(
            f"gradients of {name} lie {gap:.1e} of their norm from the plain ones', {worst}'s {largest:.1e} of its own"
        )
        assert gap <= CLOSEST and largest <= EACH, f"{name} is another loss"
    del want, got

    def step(side: Model, work: Work) -> None:
        side.net.zero_grad()
        work().backward()

    replay = Replay(case.floor, repeats=1)
    tasks: dict[str, Callable[[], object]] = {n: lambda s=s, w=w: step(s, w) for n, (s, w) in sides.items()}
    taken = take_turns(tasks | {"floor": replay.measure}, repeats, case.model.device)
    taken.pop("floor")
    floor = replay.floor() if repeats else None
    columns = f"{'wall s':>8} {'CPU s':>8}   {'times faster':<24} {'of floor':>8}"
    print(f"{'':<12} {'scored':>6} {columns} {'peak':>10} of plain")
    for name, times in taken.items():
        told = "not timed"
        if floor is not None:
            faster, mid = sorted(ratios(taken["plain"], times)), median(times)
            spread = f"{statistics.median(faster):6.2f} [{faster[0]:.2f} .. {faster[-1]:.2f}]"
            told = f"{mid.wall:8.3f} {mid.cpu:8.3f}   {spread:<24} {floor.seconds / seconds(mid):8.0%}"
        share = peaks[name] / peaks["plain"]
        print(f"{name:<12} {case.scored:6} {told:<53} {megabytes(peaks[name]):>10} {share:8.2f}")
    if floor is not None:
        print(f"{'floor':<12} {case.scored:6} {floor.seconds:8.3f} s: {floor}\n{replay.table()}")


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--images", type=int, default=4)
    options.add_argument("--guidance", type=float, default=5.0)
    options.add_argument("--compile", action="store_true", help="add a compiled side; takes minutes")
    args = options.parse_args()
    header(args.seed)
    images, repeats, side = (1, min(2, args.repeats), 8) if args.short else (args.images, args.repeats, 16)
    prompts = midsize.prompts(images)
    few, group = prompts[: -(-images // 2)], midsize.prompts(2)[1:] * max(2, images)
    showo = midsize.showo(side=side, seed=args.seed)
    compare(images_case(showo, prompts, args.guidance, "remask"), repeats, args.compile)
    compare(images_case(showo, prompts, args.guidance, "full_mask"), repeats, args.compile)
    compare(images_case(showo, group, args.guidance, "remask"), repeats, args.compile)
    compare(answers_case(showo, prompts, args.seed), repeats, args.compile)
    compare(answers_case(showo, few, args.seed, questions=1, each=4), repeats, args.compile)
    del showo
    janus = midsize.janus(side=side, seed=args.seed)
    for name in janus.unlearned:
        janus.net.get_submodule(name).requires_grad_(False)
    compare(images_case(janus, prompts, args.guidance, "full_mask"), repeats, args.compile)
    compare(images_case(janus, group, args.guidance, "full_mask"), repeats, args.compile)
    compare(answers_case(janus, prompts, args.seed), repeats, args.compile)
    compare(answers_case(janus, few, args.seed, questions=1, each=4), repeats, args.compile)


if __name__ == "__main__":
    main()
