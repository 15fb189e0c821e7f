"""experience -> loss: two methods x two couplings (METHOD 4), each a generator of parts to back-propagate one by one.

In: an Experience. Out: scalars whose sum is the loss; each holds one forward, so that only one forward's activations
live at a time. The caller back-propagates a part before it asks for the next.

| LOSSES                | answer tokens                        | image tokens                                          |
|---|---|---|
| grpo                  | clipped objective, image detached    | clipped objective                                     |
| grpo, end to end      | clipped objective on the relaxed y   | clipped objective, and the answers' gradient at y;    |
|                       |                                      | with `reward_coef`, the soft reward's own as well     |
| sft                   | gold answers, image detached         | the model's own images that were judged right         |
| sft, end to end       | gold answers on the relaxed y        | the answers' gradient at y                            |

End to end, y is a leaf that holds the sampled one-hots: back-propagating the answers' part leaves their gradient in
y.grad, and each scoring pass is then replayed with it. The sum equals the gradient of one graph, exactly, because y's
value does not depend on its relaxation (tests/test_objectives.py).

Source: UniRL (arXiv 2505.23380); METHOD 3 and 4. Departures: 1. the image half sums over an estimator's scoring passes,
weighted (METHOD 2), and so does the relaxed gradient: with fewer passes than the trajectory has, it is an unbiased
estimate; 2. `image_coef` weights all that trains drawing, the relaxed gradient included; 3. in SFT the likelihood is a
mean over an answer's or image's tokens.

Shapes: B images, N image tokens, V codes, Q answers, T answer tokens; S rows and L columns of either table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from openunirl.config import LossConfig
from openunirl.experience import Experience, counted, onehots, split
from openunirl.losses import (
    Stats,
    Totals,
    clipped_loss,
    kl_k3,
    mean_log_ratio,
    normalise,
    sample_mean,
    sequence_share,
)
from openunirl.models.masked import RANDOM_MASKS
from openunirl.models.protocol import UnifiedModel
from openunirl.relaxation import Relaxation
from openunirl.types import Images, ImageScores


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What every part of a loss is made with: settings, global denominators, and where to count.

    Example: Terms(config=LossConfig(), image_totals=Totals(...), answer_totals=Totals(...), temperature=1.0,
    stats=Stats())
    """

    config: LossConfig
    image_totals: Totals
    answer_totals: Totals
    temperature: float
    stats: Stats
    judges: Mapping[str, float] = field(default_factory=dict)
    """Sources of a soft reward and their weights (RewardConfig.soft_judges)."""


def loss_parts(model: UnifiedModel, experience: Experience, *, parts: int, terms: Terms) -> Iterator[torch.Tensor]:
    """The configured objective, `parts` slices of the batch one after the other."""
    objective = LOSSES[terms.config.method, terms.config.end_to_end]
    for chunk in split(experience, parts):
        yield from objective(model, chunk, terms)


# ------------------------------------------------------------------------------------------- the four objectives


def grpo(model: UnifiedModel, chunk: Experience, terms: Terms) -> Iterator[torch.Tensor]:
    rest_KB = _ratios_elsewhere(model, chunk, terms)
    for k in range(len(chunk.passes)):
        scores = _score(model, chunk, k, terms)
        yield terms.config.image_coef * _clipped_images(chunk, k, scores, rest_KB, terms)
    if terms.config.answer_coef:
        yield terms.config.answer_coef * _clipped_answers(model, chunk, chunk.rollout.images.images, terms)


def grpo_end_to_end(model: UnifiedModel, chunk: Experience, terms: Terms) -> Iterator[torch.Tensor]:
    y_BNV = onehots(model, chunk.rollout).requires_grad_()
    if terms.config.answer_coef:
        yield terms.config.answer_coef * _clipped_answers(model, chunk, Images(onehots_BNV=y_BNV), terms)
        _demand_gradient(y_BNV)
    if terms.config.reward_coef:
        _follow_reward(model, chunk, y_BNV, terms)
    rest_KB = _ratios_elsewhere(model, chunk, terms)
    for k in range(len(chunk.passes)):
        scores = _score(model, chunk, k, terms, chunk.relaxation(k))
        loss = _clipped_images(chunk, k, scores, rest_KB, terms)
        yield terms.config.image_coef * (loss + _replayed(chunk, k, scores, y_BNV.grad, terms))


def sft(model: UnifiedModel, chunk: Experience, terms: Terms) -> Iterator[torch.Tensor]:
    chunk = counted(chunk, terms.config)
    for k in range(len(chunk.passes)):
        yield terms.config.image_coef * _kept_images(chunk, k, _score(model, chunk, k, terms), terms)
    if terms.config.answer_coef:
        yield terms.config.answer_coef * _gold_answers(model, chunk, chunk.rollout.images.images, terms)


def sft_end_to_end(model: UnifiedModel, chunk: Experience, terms: Terms) -> Iterator[torch.Tensor]:
    chunk = counted(chunk, terms.config)
    y_BNV = onehots(model, chunk.rollout).requires_grad_()
    yield terms.config.answer_coef * _gold_answers(model, chunk, Images(onehots_BNV=y_BNV), terms)
    _demand_gradient(y_BNV)
    for k in range(len(chunk.passes)):
        scores = _score(model, chunk, k, terms, chunk.relaxation(k))
        yield terms.config.image_coef * _replayed(chunk, k, scores, y_BNV.grad, terms)


def count_kept(advantages_B: torch.Tensor, config: LossConfig, stats: Stats) -> None:
    """Once a step: the share of its images that are to be imitated, where the objective imitates any."""
    if LOSSES[config.method, config.end_to_end] is sft:
        stats.add("sft/kept_share", (advantages_B > 0).float(), torch.ones_like(advantages_B))


Objective = Callable[[UnifiedModel, Experience, Terms], Iterator[torch.Tensor]]

LOSSES: dict[tuple[str, bool], Objective] = {
    ("grpo", False): grpo,
    ("grpo", True): grpo_end_to_end,
    ("sft", False): sft,
    ("sft", True): sft_end_to_end,
}
"""(method, end_to_end) -> objective."""


# ------------------------------------------------------------------------------------------------- their terms


def _clipped_images(
    chunk: Experience, k: int, scores: ImageScores, rest_KB: torch.Tensor | None, terms: Terms
) -> torch.Tensor:
    """Clipped objective and KL of the image tokens that pass k scores."""
    weight_BN = _weight(chunk, k, terms)
    return _clipped(
        "image", scores.logprobs_BN, chunk.old_images[k] if chunk.old_images else None, chunk.reference_images[k],
        chunk.advantages_B, scores.entropy_BN, weight_BN, _lengths(weight_BN), terms.image_totals, terms,
        rest_S=None if rest_KB is None else rest_KB[k],
    )  # fmt: skip


def _clipped_answers(model: UnifiedModel, chunk: Experience, images: Images, terms: Terms) -> torch.Tensor:
    """Clipped objective and KL of the sampled answers."""
    asked = chunk.rollout.answers
    assert chunk.reference_answers is not None, "gather_experience scores answers where answer_coef is not 0"
    scores = model.score_answers(images, asked.questions, asked, temperature=terms.temperature)
    weight_QT = scores.mask_QT.to(scores.logprobs_QT.dtype)
    return _clipped(
        "answer", scores.logprobs_QT, chunk.old_answers, chunk.reference_answers, chunk.advantages_Q,
        scores.entropy_QT, weight_QT, weight_QT.sum(1), terms.answer_totals, terms,
    )  # fmt: skip


def _clipped(
    name: str,
    logp_SL: torch.Tensor,
    old_SL: torch.Tensor | None,
    reference_SL: torch.Tensor,
    advantages_S: torch.Tensor,
    entropy_SL: torch.Tensor,
    weight_SL: torch.Tensor,
    length_S: torch.Tensor,
    totals: Totals,
    terms: Terms,
    *,
    rest_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rest_S`: the sequence's mean log-ratio in the other passes."""
    config = terms.config
    old_SL = logp_SL.detach() if old_SL is None else old_SL
    advantages_S, weight_SL, length_S = (x.to(logp_SL) for x in (advantages_S, weight_SL, length_S))
    if config.importance_sampling_level == "sequence":
        ratio_S = mean_log_ratio(logp_SL, old_SL, weight_SL, length_S)
        ratio_S = ratio_S if rest_S is None else ratio_S + rest_S
        loss_SL, clips = clipped_loss(ratio_S[:, None], advantages_S, config)
        loss_SL = sequence_share(loss_SL, weight_SL, length_S)
        counted_SL = (weight_SL.sum(1) / length_S.clamp_min(1))[:, None]  # sequences, by the part that this pass holds
    else:
        loss_SL, clips = clipped_loss(logp_SL - old_SL, advantages_S, config)
        counted_SL = weight_SL
    kl_SL = kl_k3(logp_SL, reference_SL)
    terms.stats.add(f"{name}/kl", kl_SL, weight_SL)
    terms.stats.add(f"{name}/entropy", entropy_SL, weight_SL)
    for clip, values in clips.items():
        for told in (clip, f"{name}/{clip}"):  # both halves together, and apart: an answer has far fewer tokens
            terms.stats.add(told, values, counted_SL)
    return normalise(loss_SL + config.beta * kl_SL, weight_SL, length_S, config, totals)


@torch.no_grad()
def _ratios_elsewhere(model: UnifiedModel, chunk: Experience, terms: Terms) -> torch.Tensor | None:
    """[K, B]: for each pass, the mean log-ratio of an image's tokens in the other passes. Needed only for one ratio per
    image whose tokens several passes score, after the first inner step."""
    if terms.config.importance_sampling_level == "token" or chunk.old_images is None or len(chunk.passes) < 2:
        return None
    own = []
    for k, old_BN in enumerate(chunk.old_images):
        weight_BN = _weight(chunk, k, terms)
        own.append(mean_log_ratio(_score(model, chunk, k, terms).logprobs_BN, old_BN, weight_BN, _lengths(weight_BN)))
    own_KB = torch.stack(own)
    return own_KB.sum(0) - own_KB


def _kept_images(chunk: Experience, k: int, scores: ImageScores, terms: Terms) -> torch.Tensor:
    """-log pi(u | p) of the tokens that pass k scores, on images that were judged right (advantage 0: it was not)."""
    weight_BN = _weight(chunk, k, terms)
    kept_BN = weight_BN * chunk.advantages_B.to(weight_BN)[:, None]
    terms.stats.add("image/nll", -scores.logprobs_BN, kept_BN)
    terms.stats.add("image/entropy", scores.entropy_BN, kept_BN)
    return sample_mean(-scores.logprobs_BN, kept_BN, _lengths(weight_BN), terms.image_totals)


def _gold_answers(model: UnifiedModel, chunk: Experience, images: Images, terms: Terms) -> torch.Tensor:
    """-log pi(a* | image, q) over the full vocabulary."""
    scores = model.score_answers(images, chunk.rollout.answers.questions, chunk.rollout.gold, support="full")
    weight_QT = scores.mask_QT.to(scores.logprobs_QT.dtype)
    terms.stats.add("answer/nll", -scores.logprobs_QT, weight_QT)
    terms.stats.add("answer/entropy", scores.entropy_QT, weight_QT)
    counted_QT = weight_QT * chunk.advantages_Q.to(weight_QT)[:, None]  # 0 where the answer is not to be learned
    return sample_mean(-scores.logprobs_QT, counted_QT, weight_QT.sum(1), terms.answer_totals)


def _follow_reward(model: UnifiedModel, chunk: Experience, y_BNV: torch.Tensor, terms: Terms) -> None:
    """Adds to y.grad what raises the judges' log-probability of the gold answers; the judges' weights get nothing."""
    targets = chunk.targets
    assert targets is not None and terms.judges, "reward_coef needs a soft reward (validate.check)"
    for source, weight in terms.judges.items():
        with model.reference() if source == "frozen" else nullcontext():
            scores = model.score_answers(Images(onehots_BNV=y_BNV), targets.questions, targets.gold)
        weight_QT = scores.mask_QT.to(scores.logprobs_QT.dtype)
        terms.stats.add("reward/gold_logprob", scores.logprobs_QT, weight_QT)
        loss = sample_mean(-scores.logprobs_QT, weight_QT, weight_QT.sum(1), terms.answer_totals)
        (gradient_BNV,) = torch.autograd.grad(terms.config.reward_coef * weight * loss, y_BNV)
        y_BNV.grad = gradient_BNV if y_BNV.grad is None else y_BNV.grad + gradient_BNV


def _demand_gradient(y_BNV: torch.Tensor) -> None:
    """Errors: RuntimeError where the answers' part, which reaches y, was not back-propagated: drawing would miss it."""
    if y_BNV.grad is None:
        raise RuntimeError("the answers' gradient is missing at y: back-propagate a part before asking for the next")


def _replayed(
    chunk: Experience, k: int, scores: ImageScores, gradient_BNV: torch.Tensor | None, terms: Terms
) -> torch.Tensor:
    """Exactly 0, with the gradient that the answers left at y, passed on to the tokens that pass k relaxed."""
    if scores.onehots_BNV is None or gradient_BNV is None:  # no answer was scored (answer_coef 0)
        return scores.logprobs_BN.new_zeros(())
    pulled = (_weight(chunk, k, terms) * (scores.onehots_BNV * gradient_BNV).sum(-1)).sum()
    return pulled - pulled.detach()


def _score(
    model: UnifiedModel, chunk: Experience, k: int, terms: Terms, relax: Relaxation | None = None
) -> ImageScores:
    guided = terms.config.logprob_guidance
    return model.score_images(chunk.rollout.images, chunk.passes[k], logprob_guidance=guided, relax=relax)


def _weight(chunk: Experience, k: int, terms: Terms) -> torch.Tensor:
    """[B, N]: weight of each token of pass k in the sum over the image; several random masks are averaged."""
    one = chunk.passes[k]
    weight_BN = one.weight_BN * one.scored_BN
    return weight_BN / len(chunk.passes) if terms.config.estimator in RANDOM_MASKS else weight_BN


def _lengths(weight_BN: torch.Tensor) -> torch.Tensor:
    return torch.full((len(weight_BN),), float(weight_BN.shape[1]), device=weight_BN.device)
