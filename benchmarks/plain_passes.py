"""A training step's passes as a paper's code makes them: what training_step.py compares ours with.

In: a model, sampled images, answers. Out: losses, differentiable in the net's weights. Every row in full with all its
padding, all logits of the vocabulary (Janus' images: of the head) at every position, a row for each question with its
own image prefix.

Shapes: B images, Q questions, R rows, N image tokens, L positions, V logits.
"""

from __future__ import annotations

import torch

from openunirl.models.autoregressive import causal_mask, left_padded, positions
from openunirl.models.janus import Janus
from openunirl.models.showo import Showo
from openunirl.types import ImageQuestion, ImageRollout, Images, ScorePass


def images_loss(model: Showo | Janus, rollout: ImageRollout, one: ScorePass) -> torch.Tensor:
    """Mean negative log-prob of the tokens that the pass scores, under the guided policy."""
    if isinstance(model, Showo):
        return _showo_images(model, rollout, one)
    return _janus_images(model, rollout)


def _guided(logits: torch.Tensor, scale: float) -> torch.Tensor:
    if scale == 1:
        return logits
    cond, uncond = logits.chunk(2)
    return uncond + scale * (cond - uncond)


def _showo_images(model: Showo, rollout: ImageRollout, one: ScorePass) -> torch.Tensor:
    prompting, vocab, scale = model.prompting, model.prompting.vocab, rollout.sampling.guidance_scale
    image_BN = torch.where(one.shown_BN, rollout.tokens_BN + vocab.code_offset, vocab.mask)
    ids_BL = prompting.t2i(rollout.prompts, image_BN)
    if scale != 1:
        ids_BL = torch.cat([ids_BL, prompting.t2i([""] * len(rollout.prompts), image_BN)])
    logits_BLV = _guided(model.net(ids_BL, prompting.t2i_mask(ids_BL)).float(), scale)
    logits_BNV = logits_BLV[:, prompting.max_text_len + 2 : -1, vocab.code_offset : vocab.mask]
    logp_BNV = torch.log_softmax(logits_BNV, dim=-1)
    logp_BN = logp_BNV.gather(-1, rollout.tokens_BN[..., None])[..., 0]
    return -(logp_BN * one.scored_BN).sum() / one.scored_BN.sum()


def _janus_images(model: Janus, rollout: ImageRollout) -> torch.Tensor:
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
    logp_BLV = torch.log_softmax(_guided(logits_RLV.float(), scale), dim=-1)[:, ids_RL.shape[1] - 1 : -1]
    return -logp_BLV.gather(-1, rollout.tokens_BN[..., None]).sum() / rollout.tokens_BN.numel()


def answers_loss(
    model: Showo | Janus, images: Images, asked: list[ImageQuestion], answers: list[list[int]]
) -> torch.Tensor:
    """Mean negative log-prob of the answers' ids: a row for each question, all rows padded to the longest; all logits,
    everywhere."""
    vocab = model.prompting.vocab
    questions = [model.prompting.question(one.question) for one in asked]
    texts = [question + answer for question, answer in zip(questions, answers, strict=True)]
    longest = max(map(len, texts))
    padded_QL = torch.tensor([text + [vocab.pad] * (longest - len(text)) for text in texts])
    own = images.select(torch.tensor([one.image for one in asked]))
    prefix, logits_QLV = (_showo_logits if isinstance(model, Showo) else _janus_logits)(model, own, padded_QL)
    logp_QLV = torch.log_softmax(logits_QLV.float()[..., : vocab.text_size], dim=-1)
    total = torch.zeros(())
    for q, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        at = prefix + len(question) - 1
        total = total - logp_QLV[q, torch.arange(at, at + len(answer)), torch.tensor(answer)].sum()
    return total / sum(map(len, answers))


def _showo_logits(model: Showo, images: Images, text_QL: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Length of the image prefix, and the logits of prefix and text."""
    assert images.tokens_BN is not None
    prefix_QL = model.prompting.mmu_prefix(images.tokens_BN + model.prompting.vocab.code_offset)
    ids_QL, prefix = torch.cat([prefix_QL, text_QL], dim=1), prefix_QL.shape[1]
    mask = torch.ones(ids_QL.shape[1], ids_QL.shape[1], dtype=torch.bool).tril()
    mask[:prefix, :prefix] = True
    return prefix, model.net(ids_QL, mask[None, None])


def _janus_logits(model: Janus, images: Images, text_QL: torch.Tensor) -> tuple[int, torch.Tensor]:
    prefix = model.prompting.image_prefix
    ids_QL = torch.cat([torch.tensor([prefix]).expand(len(text_QL), -1), text_QL], dim=1)
    logits_QLV = model.net(
        ids_QL,
        causal_mask(torch.ones_like(ids_QL[:1], dtype=torch.bool)),
        positions_BL=torch.arange(ids_QL.shape[1])[None],
        pixels_BCHW=images.pixels_BCHW,
        pixels_start=model.prompting.pixels_start,
    )
    banned = torch.tensor(model.prompting.vocab.image_ids)
    return len(prefix), logits_QLV.index_fill(-1, banned, torch.finfo(logits_QLV.dtype).min)
