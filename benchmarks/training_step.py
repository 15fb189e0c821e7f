"""A training step's passes, forward and backward: ours against plain ones, in time and in peak memory.

    python benchmarks/training_step.py [--images 4] [--guidance 5] [--repeats 3] [--seed 0] [--short]

One pass scores the tokens of guided images (a random mask, Show-o; all of them, Janus), one scores sampled answers. The
plain passes, below, are what a paper's code does: every row in full with all its padding, all logits of the vocabulary
(Janus: of the head) at every position, a row for each question with its own image prefix. Both sides must give the same
gradients, within 1e-5 of their norm. "recomputed" is ours with --train.gradient-checkpointing. Memory is what the
allocator saw at the worst moment, above the weights and their gradients (benchmarks/memory.py); --repeats 0
measures nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

import midsize
from memory import megabytes, peak
from openunirl.draws import key
from openunirl.models.autoregressive import causal_mask, left_padded, positions
from openunirl.models.janus import Janus
from openunirl.models.masked import MASKED, Estimator
from openunirl.models.showo import Showo
from openunirl.types import AnswerSampling, ImageQuestion, ImageRollout, ImageSampling, ScorePass
from timing import header, median, parser, ratios, take_turns

CLOSEST = 1e-5  # of a gradient's norm
ANSWER_TOKENS = 8

Work = Callable[[], torch.Tensor]  # a loss


def guided(logits: torch.Tensor, scale: float) -> torch.Tensor:
    if scale == 1:
        return logits
    cond, uncond = logits.chunk(2)
    return uncond + scale * (cond - uncond)


def plain_showo_images(model: Showo, rollout: ImageRollout, one: ScorePass) -> torch.Tensor:
    prompting, vocab, scale = model.prompting, model.prompting.vocab, rollout.sampling.guidance_scale
    image_BN = torch.where(one.shown_BN, rollout.tokens_BN + vocab.code_offset, vocab.mask)
    ids_BL = prompting.t2i(rollout.prompts, image_BN)
    if scale != 1:
        ids_BL = torch.cat([ids_BL, prompting.t2i([""] * len(rollout.prompts), image_BN)])
    logits_BLV = guided(model.net(ids_BL, prompting.t2i_mask(ids_BL)).float(), scale)
    logits_BNV = logits_BLV[:, prompting.max_text_len + 2 : -1, vocab.code_offset : vocab.mask]
    logp_BNV = torch.log_softmax(logits_BNV, dim=-1)
    logp_BN = logp_BNV.gather(-1, rollout.tokens_BN[..., None])[..., 0]
    return -(logp_BN * one.scored_BN).sum() / one.scored_BN.sum()


def plain_janus_images(model: Janus, rollout: ImageRollout, one: ScorePass) -> torch.Tensor:
    prompting, scale, num = model.prompting, rollout.sampling.guidance_scale, model.num_image_tokens
    rows = [prompting.t2i(prompt) for prompt in rollout.prompts]
    if scale != 1:
        rows += [prompting.unconditional(len(row)) for row in rows]
    ids_RL, real_RL = left_padded(rows, prompting.vocab.pad)
    real_RL = torch.nn.functional.pad(real_RL, (0, num), value=True)
    codes_RN = rollout.tokens_BN.repeat(len(rows) // len(rollout.tokens_BN), 1)
    logits_RLV = model.net(
        ids_RL, causal_mask(real_RL), positions_BL=positions(real_RL), codes_BN=codes_RN, head="image"
    )
    logp_BLV = torch.log_softmax(guided(logits_RLV.float(), scale), dim=-1)[:, ids_RL.shape[1] - 1 : -1]
    return -logp_BLV.gather(-1, rollout.tokens_BN[..., None]).sum() / rollout.tokens_BN.numel()


def plain_showo_answers(model: Showo, rollout: ImageRollout, asked: list[ImageQuestion], ids: list[list[int]]) -> Work:
    """A row for each question, all of them padded to the longest; all logits of the text ids, everywhere."""
    prompting, vocab = model.prompting, model.prompting.vocab

    def work() -> torch.Tensor:
        prefix_BL = prompting.mmu_prefix(rollout.tokens_BN + vocab.code_offset)
        questions = [prompting.question(one.question) for one in asked]
        texts = [question + answer for question, answer in zip(questions, ids, strict=True)]
        longest, prefix = max(map(len, texts)), prefix_BL.shape[1]
        padded_QL = torch.tensor([text + [vocab.pad] * (longest - len(text)) for text in texts])
        rows_QL = torch.cat([prefix_BL[[one.image for one in asked]], padded_QL], dim=1)
        mask = torch.ones(prefix + longest, prefix + longest, dtype=torch.bool).tril()
        mask[:prefix, :prefix] = True
        logp_QLV = torch.log_softmax(model.net(rows_QL, mask[None, None]).float()[..., : vocab.text_size], dim=-1)
        total = torch.zeros(())
        for q, (question, answer) in enumerate(zip(questions, ids, strict=True)):
            at = prefix + len(question) - 1
            total = total - logp_QLV[q, torch.arange(at, at + len(answer)), torch.tensor(answer)].sum()
        return total / sum(map(len, ids))

    return work


def apart(want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> float:
    """Distance of two gradients, as a share of the first one's norm."""
    zero = torch.zeros(())
    names = want.keys() | got.keys()
    gap = sum(float((want.get(n, zero) - got.get(n, zero)).double().square().sum()) for n in names)
    return (gap / sum(float(g.double().square().sum()) for g in want.values())) ** 0.5


def compare(title: str, model: Showo | Janus, plain: Work, ours: Callable[[Showo | Janus], Work], repeats: int) -> None:
    recomputed = copy.deepcopy(model)
    recomputed.recompute_activations()
    sides = {"plain": (model, plain), "ours": (model, ours(model)), "recomputed": (recomputed, ours(recomputed))}
    print(f"\n{title}")
    peaks, want = {}, {}
    for name, (side, work) in sides.items():
        for parameter in side.net.parameters():  # gradients of earlier parts are there
            parameter.grad = torch.zeros_like(parameter)
        peaks[name] = peak(lambda work=work: work().backward())
        got = {n: p.grad for n, p in side.net.named_parameters() if p.grad is not None}
        side.net.zero_grad()
        if not want:
            want = got
            continue
        gap = apart(want, got)
        print(f"gradients of {name} lie {gap:.1e} of their norm from the plain ones'")
        assert gap <= CLOSEST, f"{name} is another loss"
    del want, got

    def step(side: Showo | Janus, work: Work) -> None:
        side.net.zero_grad()
        work().backward()

    taken = take_turns({n: lambda s=s, w=w: step(s, w) for n, (s, w) in sides.items()}, repeats)
    print(f"{'':<12} {'wall s':>8} {'CPU s':>8}   times faster             {'peak memory':>12}  of the plain")
    for name, times in taken.items():
        spread, wall, cpu = "not timed", 0.0, 0.0
        if times:
            faster, mid = sorted(ratios(taken["plain"], times)), median(times)
            spread, wall, cpu = (
                f"{faster[len(faster) // 2]:6.2f} [{faster[0]:.2f} .. {faster[-1]:.2f}]",
                mid.wall,
                mid.cpu,
            )
        share = peaks[name] / peaks["plain"]
        print(f"{name:<12} {wall:8.3f} {cpu:8.3f}   {spread:<24} {megabytes(peaks[name]):>12}  {share:6.2f}")


def our_images(rollout: ImageRollout, one: ScorePass) -> Callable[[Showo | Janus], Work]:
    def work(model: Showo | Janus) -> torch.Tensor:
        logp_BN = model.score_images(rollout, one).logprobs_BN
        return -logp_BN.sum() / one.scored_BN.sum()

    return lambda model: lambda: work(model)


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--images", type=int, default=4)
    options.add_argument("--guidance", type=float, default=5.0)
    args = options.parse_args()
    header(args.seed)
    images, repeats, side = (1, 1, 8) if args.short else (args.images, args.repeats, 16)
    prompts, seeds_B = midsize.prompts(images), key(args.seed, torch.arange(images))
    sampling = ImageSampling(guidance_scale=args.guidance, num_timesteps=2)
    generator = torch.Generator().manual_seed(args.seed)

    def rollout_of(model: Showo | Janus) -> tuple[ImageRollout, ScorePass]:
        """Random tokens: what they are changes neither time nor memory."""
        shape = (images, model.num_image_tokens)
        rollout = ImageRollout(
            prompts=tuple(prompts),
            tokens_BN=torch.randint(model.num_codes, shape, generator=generator),
            reveal_step_BN=torch.zeros(shape, dtype=torch.int64),
            logprobs_BN=torch.zeros(shape),
            sampling=sampling,
        )
        return rollout, model.scoring_passes(rollout, Estimator(name="remask"), seeds_B)[0]

    showo = midsize.showo(side=side, seed=args.seed)
    rollout, one = rollout_of(showo)
    assert MASKED not in rollout.tokens_BN.unique()
    told = f"{images} images of {showo.num_image_tokens} tokens, guidance {args.guidance:g}"
    compare(
        f"Show-o, {told}, {int(one.scored_BN.sum())} masked",
        showo, lambda: plain_showo_images(showo, rollout, one), our_images(rollout, one), repeats,
    )  # fmt: skip
    asked = [ImageQuestion(image=b, question=q) for b in range(images) for q in midsize.questions(2)]
    sampled = showo.sample_answers(
        rollout.images, asked, key(args.seed, torch.arange(len(asked))),
        AnswerSampling(max_new_tokens=ANSWER_TOKENS, temperature=1.0),
    )  # fmt: skip
    ids = [row[m].tolist() for row, m in zip(sampled.tokens_QT, sampled.mask_QT, strict=True)]

    def our_answers(model: Showo | Janus) -> Work:
        def work() -> torch.Tensor:
            scores = model.score_answers(rollout.images, asked, sampled)
            return -scores.logprobs_QT.sum() / scores.mask_QT.sum()

        return work

    compare(
        f"Show-o, {len(asked)} answers of {ANSWER_TOKENS} tokens on {images} images",
        showo, plain_showo_answers(showo, rollout, asked, ids), our_answers, repeats,
    )  # fmt: skip
    janus = midsize.janus(side=side, seed=args.seed)
    drawn, everything = rollout_of(janus)
    compare(
        f"Janus, {told}",
        janus, lambda: plain_janus_images(janus, drawn, everything), our_images(drawn, everything), repeats,
    )  # fmt: skip


if __name__ == "__main__":
    main()
