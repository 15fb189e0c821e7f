"""Show-o answering: our batched decoding against a plain one, per answer, and against the floor.

    python benchmarks/answering.py [--answers 8] [--new-tokens 32] [--plain-answers 1] [--repeats 3] [--short]

Every question has its own image. The plain decoding, below, is what a paper's code does: one answer at a time, the
whole sequence anew for every token, all 58,498 logits at all positions. It answers the first `--plain-answers`
questions (it is slow), and times are per answer. Both are greedy over text ids, and must give the same answers.
Ours packs its weights (openunirl.models.packed_linear); "ours, not packed" is the same decoding with that switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import midsize
from floor import Decoder, Pass, Product, Replay, steps
from openunirl.draws import key
from openunirl.models.showo import Showo
from openunirl.types import AnswerSampling, ImageQuestion, Images
from timing import header, parser, report, take_turns


@torch.no_grad()
def plain(model: Showo, tokens_N: torch.Tensor, question: str, new_tokens: int) -> list[int]:
    """One greedy answer, without any of what ours leaves out."""
    prompting, vocab = model.prompting, model.prompting.vocab
    ids = prompting.mmu_prefix(tokens_N[None] + vocab.code_offset)[0].tolist() + prompting.question(question)
    start = len(ids)
    while len(ids) < start + new_tokens and (len(ids) == start or ids[-1] != vocab.eos):
        ids_1L = torch.tensor([ids])
        logits_1LV = model.net(ids_1L, prompting.mmu_mask(ids_1L))
        ids.append(int(logits_1LV[0, -1, : vocab.text_size].argmax()))
    return ids[start:]


def floor_passes(model: Showo, asked: list[str], drawn: list[int]) -> list[Pass]:
    """Every image and question once, then one position a token; text logits where a token is drawn."""
    decoder = Decoder(hidden=midsize.HIDDEN, layers=midsize.LAYERS, heads=midsize.HEADS, mlp=(midsize.SHOWO_MLP,))
    count, prefix = len(asked), model.num_image_tokens + 3
    mean = math.ceil(sum(len(model.prompting.question(q)) for q in asked) / count)
    head = Product(m=count, k=midsize.HIDDEN, n=model.prompting.vocab.text_size)
    later = round(sum(drawn) / count) - 1
    return [
        Pass(name="images", products=decoder.products(count, prefix, prefix)),
        Pass(name="questions", products=(*decoder.products(count, mean, prefix + mean), head)),
        *(steps(decoder, count, prefix + mean + 1, later, (head,), parts=2) if later > 0 else []),
    ]


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--answers", type=int, default=8)
    options.add_argument("--new-tokens", type=int, default=32)
    options.add_argument("--plain-answers", type=int, default=1)
    args = options.parse_args()
    header(args.seed)
    new_tokens, count = 4 if args.short else args.new_tokens, args.answers
    model = midsize.showo(side=8 if args.short else 16, seed=args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    tokens_BN = torch.randint(2**midsize.SHOWO_CODE_BITS, (count, model.num_image_tokens), generator=generator)
    asked = midsize.questions(count)
    questions = [ImageQuestion(image=b, question=q) for b, q in enumerate(asked)]
    seeds_Q, sampling = key(args.seed, torch.arange(count)), AnswerSampling(max_new_tokens=new_tokens)

    def slow() -> list[list[int]]:
        return [plain(model, tokens_BN[b], asked[b], new_tokens) for b in range(args.plain_answers)]

    def ours() -> list[list[int]]:
        got = model.sample_answers(Images(tokens_BN=tokens_BN), questions, seeds_Q, sampling)
        return [row[mask].tolist() for row, mask in zip(got.tokens_QT, got.mask_QT, strict=True)]

    def unpacked() -> list[list[int]]:
        return midsize.not_packed(ours)

    print(f"{count} answers of at most {new_tokens} tokens on images of {model.num_image_tokens}; seconds per answer")
    want, got = slow(), ours()
    for name, answers in (("ours", got), ("ours, not packed", unpacked())):
        same = sum(a == b for a, b in zip(want, answers, strict=False))
        print(f"equal answers, {name}: {same} of {args.plain_answers}")
        assert same == args.plain_answers, f"{name} answers otherwise: {want[0]} became {answers[0]}"
    replay = Replay(floor_passes(model, asked, [len(ids) for ids in got]), repeats=1)
    tasks: dict[str, Callable[[], object]] = {"plain": slow, "ours": ours, "ours, not packed": unpacked}
    taken = take_turns(tasks | {"floor": replay.measure}, 2 if args.short else args.repeats)
    report(taken, replay, per={"plain": args.plain_answers, "ours": count, "ours, not packed": count, "floor": count})


if __name__ == "__main__":
    main()
