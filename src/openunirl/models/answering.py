"""Answers, token by token: batched decoding over a shared image prefix, and scores of given answers.

In: a network called as net(ids, mask, positions_BL=, cache=, select=, rows=), a cache that holds each image's prefix,
and is used up. Out: AnswerRollout / AnswerScores. What one call asks of an image several times is read once. Questions
of different lengths are padded on the left; pads are masked and positions skip them, so padding changes nothing.

Shapes: Q questions, D distinct ones, T answer tokens, L prompt positions, V rows of the vocabulary, S answer tokens, U
positions that predict them, M tokens that follow one of those at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from openunirl.draws import KeyedDraws
from openunirl.models.chunked import Reduce
from openunirl.models.packing import Packed
from openunirl.models.policy import entropy, wide
from openunirl.models.static_cache import StaticCache
from openunirl.types import AnswerRollout, AnswerSampling, AnswerScores, ImageQuestion


def decode_answers(
    net: Callable[..., torch.Tensor],
    cache: StaticCache,
    *,
    questions: tuple[ImageQuestion, ...],
    prompt_ids: Sequence[list[int]],
    draws: KeyedDraws,
    sampling: AnswerSampling,
    rows: tuple[int, int],
    end: int,
    pad: int,
    text: Callable[[list[int]], str],
) -> AnswerRollout:
    """Draws (or, at temperature 0, takes the best) tokens of the vocabulary range `rows` until `end`."""
    device = draws.keys_B.device
    prefix, count = cache.get_seq_length(), len(prompt_ids)
    wanted = [(one.image, tuple(ids)) for one, ids in zip(questions, prompt_ids, strict=True)]
    place = {asked: number for number, asked in enumerate(dict.fromkeys(wanted))}
    longest = max(len(ids) for _, ids in place)
    ids_DL = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for _, ids in place], device=device)
    pads_D1 = torch.tensor([[longest - len(ids)] for _, ids in place], device=device)
    offset_DL = torch.arange(longest, device=device)[None] - pads_D1
    real_DL = torch.cat([offset_DL.new_ones(len(place), prefix, dtype=torch.bool), offset_DL >= 0], dim=1)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    causal = torch.cat([causal.new_ones(longest, prefix), causal], dim=1)
    positions_DL = prefix + offset_DL.clamp_min(0)
    cache.keep(torch.tensor([image for image, _ in place], device=device), prefix + longest + sampling.max_new_tokens)
    logits_Q1V = net(
        ids_DL,
        (real_DL[:, None, :] & causal)[:, None],
        positions_BL=positions_DL,
        cache=cache,
        select=torch.arange(1, len(place) + 1, device=device)[:, None] * longest - 1,
        rows=rows,
    )
    row_Q = torch.tensor([place[asked] for asked in wanted], device=device)
    real_QL, position_Q1 = real_DL.index_select(0, row_Q), positions_DL[:, -1:].index_select(0, row_Q)
    if len(place) < count:
        cache.keep(row_Q)
        logits_Q1V = logits_Q1V.index_select(0, row_Q)

    tokens_QT = torch.full((count, sampling.max_new_tokens), pad, device=device)
    logprobs_QT = torch.zeros(tokens_QT.shape, device=device)
    mask_QT = torch.zeros(tokens_QT.shape, dtype=torch.bool, device=device)
    active = torch.arange(count, device=device)
    for step in range(sampling.max_new_tokens):
        logits_QV = logits_Q1V[:, 0].float()
        if sampling.temperature not in (0.0, 1.0):
            logits_QV = logits_QV / sampling.temperature
        logp_QV = torch.log_softmax(logits_QV, dim=-1)
        if sampling.temperature:
            chosen_Q = KeyedDraws(draws.keys_B[active]).tokens(step, logp_QV.exp()[:, None])[:, 0]
        else:
            chosen_Q = logp_QV.argmax(-1)
        tokens_QT[active, step] = chosen_Q + rows[0]
        logprobs_QT[active, step] = logp_QV.gather(1, chosen_Q[:, None])[:, 0]
        mask_QT[active, step] = True
        going = (chosen_Q + rows[0] != end).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(active):
            cache.keep(going)
            active, real_QL = active[going], real_QL[going]
            position_Q1, chosen_Q = position_Q1[going], chosen_Q[going]
        if step + 1 == sampling.max_new_tokens:
            break
        real_QL = torch.cat([real_QL, real_QL.new_ones(len(active), 1)], dim=1)
        position_Q1 = position_Q1 + 1
        ids_Q1 = (chosen_Q + rows[0])[:, None]
        logits_Q1V = net(ids_Q1, real_QL[:, None, None], positions_BL=position_Q1, cache=cache, select=None, rows=rows)
    width = int(mask_QT.sum(1).max())
    return AnswerRollout(
        questions=questions,
        texts=tuple(text(row[m].tolist()) for row, m in zip(tokens_QT, mask_QT & (tokens_QT != end), strict=True)),
        tokens_QT=tokens_QT[:, :width],
        mask_QT=mask_QT[:, :width],
        logprobs_QT=logprobs_QT[:, :width],
    )


def answer_tokens(answers: AnswerRollout | Sequence[str], tokenize: Callable[[str], list[int]]) -> list[list[int]]:
    """Ids of each answer, end token included."""
    if isinstance(answers, AnswerRollout):
        return [row[m].tolist() for row, m in zip(answers.tokens_QT, answers.mask_QT, strict=True)]
    return [tokenize(answer) for answer in answers]


def score_tokens(
    score: Callable[[Reduce], tuple[torch.Tensor, ...]],
    ids: Sequence[list[int]],
    packed: Packed,
    width: int,
    temperature: float,
    device: torch.device,
) -> AnswerScores:
    """Tables [Q, width], at least float32, of the answers `ids`; `score` applies a reduction to the logits that are
    read."""
    wanted: list[dict[int, int]] = [{} for _ in packed.select_U]  # token -> which of M, for each of U
    tokens = [token for row in ids for token in row]
    which = [
        wanted[read].setdefault(token, len(wanted[read]))
        for read, token in zip(packed.read_S.tolist(), tokens, strict=True)
    ]
    most = max(map(len, wanted), default=1)
    chosen_UM = torch.tensor([[*row, *[0] * (most - len(row))] for row in wanted], dtype=torch.int64)
    chosen_UM = chosen_UM.view(-1, most).to(device)
    read_S, slot_S = packed.read_S.to(device), packed.slot_S.to(device)

    def reduce(logits_CV: torch.Tensor, index_C: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logp_CV = torch.log_softmax(wide(logits_CV) / (temperature or 1.0), dim=-1)
        return logp_CV.gather(1, chosen_UM.index_select(0, index_C)), entropy(logp_CV)

    def table(values_S: torch.Tensor) -> torch.Tensor:
        flat = torch.zeros(len(ids) * width, dtype=values_S.dtype, device=device)
        return flat.index_copy(0, slot_S, values_S).view(len(ids), width)

    logp_UM, entropy_U = score(reduce)
    entropy_S = entropy_U.index_select(0, read_S)
    return AnswerScores(
        logprobs_QT=table(logp_UM.flatten().index_select(0, read_S * most + torch.tensor(which, device=device))),
        entropy_QT=table(entropy_S),
        mask_QT=table(torch.ones_like(entropy_S)).bool(),
    )
