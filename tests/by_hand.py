"""The objectives written down once more, as one graph over all passes, from the net's raw logits: nothing of
models/policy.py, of the estimators' weights or of an Experience is used."""

import math

import torch
from torch.nn import functional as F

from openunirl.draws import Scoring, key, uniforms
from openunirl.losses import kl_k3
from openunirl.models.masked import MASKED, Estimator
from openunirl.relaxation import conditional_gumbel, plain_gumbel
from openunirl.types import Images


def loss_by_hand(model, rollout, config, advantages, tau):
    """Scalar; GRPO at its first inner step, where every ratio is 1."""
    drawn, asked, (advantages_B, advantages_Q) = rollout.images, rollout.answers, advantages
    num, codes = drawn.tokens_BN.shape[1], model.num_codes
    onehots_BNV = F.one_hot(drawn.tokens_BN, codes).double()
    y_BNV, image_loss = onehots_BNV, torch.zeros((), dtype=torch.float64)
    for k, one in enumerate(passes_of(model, rollout, config)):
        at_S = one.scored_BN.flatten().nonzero()[:, 0]
        weight_S = weight_by_hand(model, drawn, config, one.scored_BN).flatten()[at_S].double()
        token_S, row_S = drawn.tokens_BN.flatten()[at_S], at_S // num
        logp_SV = policy(model, drawn, one, config)
        logp_S = logp_SV.gather(1, token_S[:, None])[:, 0]
        if config.method == "grpo":
            with model.reference(), torch.no_grad():
                base_S = policy(model, drawn, one, config).gather(1, token_S[:, None])[:, 0]
            loss_S = -(logp_S - logp_S.detach()).exp() * advantages_B[row_S] + config.beta * kl_k3(logp_S, base_S)
        else:
            loss_S = -logp_S * advantages_B[row_S] * (not config.end_to_end)
        image_loss = image_loss + (loss_S * weight_S).sum() / drawn.tokens_BN.numel()
        if config.end_to_end:
            seeds_B = key(rollout.scoring_seeds_B, Scoring.RELAXATION, k)
            noise_SV = noise(config, seeds_B, at_S, num, logp_SV.detach(), token_S)
            soft_SV = ((logp_SV + noise_SV) / tau).softmax(-1)
            pulled_SV = config.image_coef * weight_S[:, None] * (soft_SV - soft_SV.detach())
            y_BNV = y_BNV.reshape(-1, codes).index_add(0, at_S, pulled_SV).view_as(y_BNV)
    assert torch.equal(y_BNV, onehots_BNV)
    answer_loss = torch.zeros(())
    if config.answer_coef:
        images = Images(onehots_BNV=y_BNV) if config.end_to_end else drawn.images
        if config.method == "grpo":
            scores = model.score_answers(images, asked.questions, asked)
            with model.reference(), torch.no_grad():
                base_QT = model.score_answers(images, asked.questions, asked).logprobs_QT
            token_QT = -(scores.logprobs_QT - scores.logprobs_QT.detach()).exp() * advantages_Q[:, None]
            token_QT = token_QT + config.beta * kl_k3(scores.logprobs_QT, base_QT)
        else:
            scores = model.score_answers(images, asked.questions, rollout.gold, support="full")
            token_QT = -scores.logprobs_QT * advantages_Q[:, None]
        answer_loss = ((token_QT * scores.mask_QT).sum(1) / scores.mask_QT.sum(1)).mean()
    return config.image_coef * image_loss + config.answer_coef * answer_loss


def passes_of(model, rollout, config):
    """Which tokens each pass shows and scores."""
    estimator = Estimator(
        name=config.estimator, num_scored_steps=config.num_scored_steps, num_draws=config.num_draws,
        mask_time=config.mask_time,
    )  # fmt: skip
    return model.scoring_passes(rollout.images, estimator, rollout.scoring_seeds_B)


def weight_by_hand(model, drawn, config, scored_BN):
    """[B, N]: a token's share in its image's sum, by the estimator's definition."""
    ones_BN, steps = torch.ones(scored_BN.shape), drawn.sampling.num_timesteps
    if model.draws_tokens_in_turn:
        return ones_BN
    if config.estimator == "trajectory":
        return ones_BN * steps / (config.num_scored_steps or steps)
    if config.estimator == "remask":
        return ones_BN * ones_BN.shape[1] / scored_BN.sum(1, keepdim=True) / config.num_draws
    angle = config.mask_time * math.pi / 2
    return ones_BN * angle / math.sin(angle) / config.num_draws


def policy(model, drawn, one, config):
    """Log-probs [S, V] of the scored tokens' places: guided and divided by the temperature here."""
    cond_SV = raw_logits(model, drawn, one, drawn.prompts)
    if config.logprob_guidance:
        uncond_SV = raw_logits(model, drawn, one, None)
        cond_SV = uncond_SV + drawn.sampling.guidance_scale * (cond_SV - uncond_SV)
    return (cond_SV / drawn.sampling.temperature).log_softmax(-1)


def raw_logits(model, drawn, one, prompts):
    """Of one branch; without prompts, the unconditional one."""
    if model.draws_tokens_in_turn:
        rows = [model.prompting.t2i(prompt) for prompt in drawn.prompts]
        rows = rows if prompts else [model.prompting.unconditional(len(row)) for row in rows]
        return model._drawn_logits(rows, drawn.tokens_BN)
    shown_BN = drawn.tokens_BN.masked_fill(~one.shown_BN, MASKED)
    at_S = one.scored_BN.flatten().nonzero()[:, 0]
    return model._masked_logits(prompts or ("",) * len(shown_BN), shown_BN, at_S, 1.0)


def noise(config, seeds_B, at_S, num, logp_SV, token_S):
    """The Gumbel noise of the tokens at the flat places at_S of B*num."""
    keys_S, codes = key(seeds_B[at_S // num], at_S % num), logp_SV.shape[1]
    if config.relaxation.noise == "plain":
        return plain_gumbel(uniforms(keys_S, 0, codes).double())
    return conditional_gumbel(logp_SV, token_S, uniforms(keys_S, 0, codes + 1).double())
