"""Answering: our batched decoding against a plain one (Janus: and transformers' generate), per answer, and the floor.

    python benchmarks/answering.py [--family showo|janus] [--answers 8] [--each 1] [--new-tokens 32] [--plain-answers 1]
        [--repeats 3] [--short]

Every question has its own image and is asked `--each` times (greedy, so its answers are alike; the work is that of
sampled ones of equal length). The plain decoding, below, is what a paper's code does: one answer at a time, the
whole sequence anew for every token, all logits of the vocabulary (58,498; Janus: 102,400) at all positions. It answers
the first `--plain-answers` questions (it is slow), and times are per answer, all of one length. transformers' generate,
text mode, has all questions in one batch with its own cache. All are greedy over text ids and must give the same
answers: the script ends where they do not. Ours packs its weights (openunirl.models.packed_linear); "ours, not packed"
is the same decoding with that switched off. Janus sees pixels, decoded before the clock starts; its small vision tower
is no part of the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import midsize
from floor import Pass, Product, Replay, causal, steps
from janus_sampling import theirs_of
from openunirl.draws import key
from openunirl.models.autoregressive import causal_mask, left_padded
from openunirl.models.janus import Janus
from openunirl.models.showo import Showo
from openunirl.types import AnswerSampling, ImageQuestion, Images
from timing import header, parser, report, take_turns

Model = Showo | Janus


# ----------------------------------------------------------------------------------------------- without ours


@torch.no_grad()
def plain(model: Model, images: Images, asked: list[str], new_tokens: int) -> list[list[int]]:
    """Greedy answers one by one, without any of what ours leaves out."""
    vocab, answers = model.prompting.vocab, []
    for b, question in enumerate(asked):
        prefix_1L, logits_of = _seen(model, images.select(torch.tensor([b])))
        ids = prefix_1L[0].tolist() + model.prompting.question(question)
        start = len(ids)
        while len(ids) < start + new_tokens and (len(ids) == start or ids[-1] != vocab.eos):
            ids.append(int(logits_of(torch.tensor([ids]))[0, -1, : vocab.text_size].argmax()))
        answers.append(ids[start:])
    return answers


def _seen(model: Model, image: Images) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Ids of one image's prefix, and the net's logits [1, L, V] of that and what follows it."""
    if isinstance(model, Showo):
        assert image.tokens_BN is not None
        prefix_1L = model.prompting.mmu_prefix(image.tokens_BN + model.prompting.vocab.code_offset)
        return prefix_1L, lambda ids_1L: model.net(ids_1L, model.prompting.mmu_mask(ids_1L))
    banned = torch.tensor(model.prompting.vocab.image_ids)

    def logits_of(ids_1L: torch.Tensor) -> torch.Tensor:
        logits_1LV = model.net(
            ids_1L,
            causal_mask(torch.ones_like(ids_1L, dtype=torch.bool)),
            positions_BL=torch.arange(ids_1L.shape[1])[None],
            pixels_BCHW=image.pixels_BCHW,
            pixels_start=model.prompting.pixels_start,
        )
        return logits_1LV.index_fill_(-1, banned, -torch.inf)

    return torch.tensor([model.prompting.image_prefix]), logits_of


def transformers_generate(model: Janus, images: Images, asked: list[str], new_tokens: int) -> Callable[[], Any]:
    """The library's own batched decoding of the same weights."""
    theirs, vocab = theirs_of(model), model.prompting.vocab
    rows = [model.prompting.image_prefix + model.prompting.question(question) for question in asked]
    ids_QL, real_QL = left_padded(rows, vocab.pad)
    assert images.pixels_BCHW is not None
    pixels_BCHW = images.pixels_BCHW * 2 - 1

    def work() -> list[list[int]]:
        got_QL = theirs.generate(
            ids_QL, attention_mask=real_QL.long(), pixel_values=pixels_BCHW, generation_mode="text", do_sample=False,
            max_new_tokens=new_tokens, suppress_tokens=list(vocab.image_ids),
        )[:, ids_QL.shape[1] :]  # fmt: skip
        return [row[: row.index(vocab.eos) + 1] if vocab.eos in row else row for row in got_QL.tolist()]

    return work


# ------------------------------------------------------------------------------------------------- the floor


def floor_passes(model: Model, asked: list[str], drawn: list[int]) -> list[Pass]:
    """Every image and question (`asked` holds those that differ) once, then one position a token of each answer; text
    logits where a token is drawn. Of the last layer keys and values only, where no token is drawn."""
    count, decoder, prefix = len(asked), midsize.decoder(model), midsize.image_prefix(model)
    seen = prefix if isinstance(model, Showo) else causal(prefix)
    mean = sum(len(model.prompting.question(q)) for q in asked) // count
    first, head = (Product(m=rows, k=midsize.HIDDEN, n=model.prompting.vocab.text_size) for rows in (count, len(drawn)))
    later = round(sum(drawn) / len(drawn)) - 1
    return [
        Pass(name="images", products=decoder.products(count, prefix, seen, read=0)),
        Pass(name="questions", products=(*decoder.products(count, mean, prefix + causal(mean), read=1), first)),
        *(steps(decoder, len(drawn), prefix + mean + 1, later, (head,), parts=2) if later > 0 else []),
    ]


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--family", choices=("showo", "janus"), default="showo")
    options.add_argument("--answers", type=int, default=8)
    options.add_argument("--each", type=int, default=1, help="answers to each question")
    options.add_argument("--new-tokens", type=int, default=32)
    options.add_argument("--plain-answers", type=int, default=1)
    args = options.parse_args()
    header(args.seed)
    new_tokens, count = 4 if args.short else args.new_tokens, args.answers // args.each
    assert count * args.each == args.answers, f"--answers {args.answers} is no multiple of --each {args.each}"
    model: Model = getattr(midsize, args.family)(side=8 if args.short else 16, seed=args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images = Images(tokens_BN=torch.randint(model.num_codes, (count, model.num_image_tokens), generator=generator))
    if isinstance(model, Janus):
        images = Images(pixels_BCHW=model.decode(images))
    distinct = midsize.questions(count)
    questions = [ImageQuestion(image=b, question=q) for b, q in enumerate(distinct) for _ in range(args.each)]
    asked, seen = [one.question for one in questions], images.select(torch.tensor([one.image for one in questions]))
    seeds_Q, sampling = key(args.seed, torch.arange(len(asked))), AnswerSampling(max_new_tokens=new_tokens)

    def slow() -> list[list[int]]:
        return plain(model, seen, asked[: args.plain_answers], new_tokens)

    def ours() -> list[list[int]]:
        got = model.sample_answers(images, questions, seeds_Q, sampling)
        return [row[mask].tolist() for row, mask in zip(got.tokens_QT, got.mask_QT, strict=True)]

    tasks: dict[str, Callable[[], list[list[int]]]] = {"plain": slow}
    if isinstance(model, Janus):
        tasks["transformers' generate"] = transformers_generate(model, seen, asked, new_tokens)
    tasks |= {"ours": ours, "ours, not packed": lambda: midsize.not_packed(ours)}
    told = f"{len(asked)} answers of at most {new_tokens} tokens on {count} images of {model.num_image_tokens} tokens"
    print(f"{told}; seconds per answer")
    answers = {name: task() for name, task in tasks.items()}
    for name, got in answers.items():
        equal = [a == b for a, b in zip(answers["ours"], got, strict=False)]
        print(f"answers equal to ours, {name}: {sum(equal)} of {len(equal)}")
        assert equal and all(equal), f"{name} answers otherwise: {got} where ours are {answers['ours']}"
    lengths = {len(ids) for ids in answers["ours"]}
    assert args.plain_answers >= len(asked) or len(lengths) == 1, (
        f"answers of {sorted(lengths)} tokens: times per answer of some and of all compare nothing; take another "
        f"--seed, or --plain-answers {len(asked)}"
    )
    replay = Replay(floor_passes(model, distinct, [len(ids) for ids in answers["ours"]]), repeats=1)
    taken = take_turns(tasks | {"floor": replay.measure}, 2 if args.short else args.repeats, model.device)
    report(taken, replay, per={name: len(answers.get(name, asked)) for name in taken})


if __name__ == "__main__":
    main()
