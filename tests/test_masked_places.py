"""Logits and draws at masked tokens only give the images that logits and draws everywhere give."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from openunirl.draws import GeneratorDraws, KeyedDraws, key, uniforms, uniforms_at
from openunirl.models.masked import MASKED, Estimator, masked_counts, sample
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from openunirl.types import ImageSampling

B, N, V = 3, 16, 5
PROMPTS = ("a photo of a red circle", "a photo of two stars", "a photo of a red circle", "a photo of a red circle")


class Everywhere(KeyedDraws):
    everywhere = True


@dataclass
class Policy:
    """Logits that hang on what is shown, row by row and place by place, so that no bit hangs on which are asked."""

    sharpness: float

    def __post_init__(self):
        self.asked = []

    def __call__(self, step, tokens_BN, at_BK):
        self.asked.append(None if at_BK is None else at_BK.clone())
        if at_BK is not None:
            for row_N, at_K in zip(tokens_BN, at_BK, strict=True):
                assert set((row_N == MASKED).nonzero()[:, 0].tolist()) <= set(at_K.tolist())
        place = torch.arange(N)[None].expand(B, N) if at_BK is None else at_BK
        shown_B1 = (tokens_BN * (tokens_BN != MASKED)).sum(1, keepdim=True)
        code_V = torch.arange(V)
        return torch.sin(1.0 + place[..., None] * 0.7 + shown_B1[..., None] * 1.3 + code_V * 2.1) * self.sharpness


def drawn(draws, policy, start_BN=None, **sampling):
    start_BN = torch.full((B, N), MASKED) if start_BN is None else start_BN
    return sample(policy, draws(key(4, torch.arange(B))), start_BN, ImageSampling(**sampling))


def partly_given():
    start_BN = torch.full((B, N), MASKED)
    start_BN[0, 3:9], start_BN[2, :15] = 2, 1
    return start_BN


@pytest.mark.parametrize("start_BN", [None, partly_given()], ids=["all masked", "partly given"])
@pytest.mark.parametrize("sharpness", [1.0, 1e4])  # the latter: every probability is 0 or 1, all confidences tie
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_draws_at_masked_places_equal_draws_everywhere(start_BN, sharpness, noise):
    few, everywhere = Policy(sharpness), Policy(sharpness)
    given = {"num_timesteps": 6, "temperature": 0.9, "confidence_temperature": noise}
    got, want = drawn(KeyedDraws, few, start_BN, **given), drawn(Everywhere, everywhere, start_BN, **given)
    assert torch.equal(got.tokens_BN, want.tokens_BN)
    assert torch.equal(got.reveal_step_BN, want.reveal_step_BN)
    assert torch.equal(got.logprobs_BN, want.logprobs_BN)
    assert everywhere.asked == [None] * 6
    assert few.asked[0] is None and [at.shape[1] for at in few.asked[1:]] == masked_counts(N, 6)[1:]


def test_counts_by_hand():
    """cos(pi/8), cos(pi/4), cos(3 pi/8) of 64; and one token fewer at every step, down to the one that is left."""
    assert masked_counts(64, 4) == [64, 59, 45, 24]
    assert masked_counts(3, 6) == [3, 2, 1, 1, 1, 1]
    assert masked_counts(8, 4, "linear") == [8, 6, 4, 2]
    assert masked_counts(5, 1) == [5]


def test_numbers_at_places_are_those_of_all_places():
    keys_B = key(1, torch.arange(3))
    at_BK = torch.tensor([[4, 0], [1, 2], [7, 7]])
    assert torch.equal(uniforms_at(keys_B, 9, at_BK), uniforms(keys_B, 9, 8).gather(1, at_BK))
    probs_BNV = torch.rand(3, 8, V, generator=torch.Generator().manual_seed(0)).softmax(-1)
    whole_BN = KeyedDraws(keys_B).tokens(2, probs_BNV)
    picked_BKV = probs_BNV.gather(1, at_BK[..., None].expand(-1, -1, V))
    assert torch.equal(KeyedDraws(keys_B).tokens(2, picked_BKV, at_BK), whole_BN.gather(1, at_BK))


def test_a_generator_draws_for_all_places_or_none():
    with pytest.raises(AssertionError, match="for all positions"):
        GeneratorDraws(torch.Generator(), 1).tokens(0, torch.ones(1, 2, V) / V, torch.zeros(1, 2, dtype=torch.int64))


# --------------------------------------------------------------------------------------------- the whole model


class Watched(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, ids_BL, *args, select=None, **options):
        self.calls.append((*ids_BL.shape, None if select is None else tuple(select.shape)))
        return self.net(ids_BL, *args, select=select, **options)


@pytest.fixture(scope="module")
def model():
    model = build("tiny-showo", shapes.vocabulary(), seed=3)
    with torch.no_grad():
        for name, weight in model.net.named_parameters():
            if weight.ndim == 2:
                weight.mul_(3.0 if "head" in name else 1.5)
    return model


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_model_draws_the_same_images(model, scale):
    seeds_B, sampling = key(7, torch.arange(4)), ImageSampling(num_timesteps=5, guidance_scale=scale)
    got = model.sample_images(PROMPTS, seeds_B, sampling)
    want = model.sample_images(PROMPTS, seeds_B, sampling, Everywhere(seeds_B))
    assert torch.equal(got.tokens_BN, want.tokens_BN) and torch.equal(got.reveal_step_BN, want.reveal_step_BN)
    torch.testing.assert_close(got.logprobs_BN, want.logprobs_BN, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scale", "texts", "rows"), [(1.0, 2, 4), (2.5, 3, 8)])
def test_passes_hold_no_more_than_what_differs(model, scale, texts, rows, monkeypatch):
    """Texts once; the first step once a text; then every image, read at its masked tokens."""
    monkeypatch.setattr(model, "net", Watched(model.net))
    masks, mask = [], model.prompting.block_mask
    monkeypatch.setattr(model.prompting, "block_mask", lambda *given: masks.append(given) or mask(*given))
    model.sample_images(PROMPTS, key(7, torch.arange(4)), ImageSampling(num_timesteps=3, guidance_scale=scale))
    assert len(masks) == 2  # the first step's, and one for all later ones
    (filled, first, *later), block = model.net.calls, model.num_image_tokens + 2
    assert filled[0] == texts and filled[2] == (0, 0)
    assert first == (texts, block, None)
    assert later == [(rows, block, (rows, count)) for count in masked_counts(model.num_image_tokens, 3)[1:]]


@pytest.mark.parametrize(("name", "rows"), [("full_mask", 2 + 1), ("remask", 4 + 4)])
def test_scoring_computes_a_row_of_one_text_that_shows_the_same_once(name, rows, monkeypatch):
    """Of two distinct prompts and no text; gradients are those of images scored one by one."""
    model = build("tiny-showo", shapes.vocabulary(), seed=3)
    model.net.to(torch.float64)
    # eager attention's softmax rounds to float32
    model.net.attn_implementation = model.net.showo.model.config._attn_implementation = "sdpa"
    seeds_B, calls, forward = key(9, torch.arange(len(PROMPTS))), [], model.net.forward
    rollout = model.sample_images(PROMPTS, seeds_B, ImageSampling(num_timesteps=2, guidance_scale=2.0))
    (one,) = model.scoring_passes(rollout, Estimator(name=name), seeds_B)
    monkeypatch.setattr(model.net, "forward", lambda ids, *a, **k: calls.append(len(ids)) or forward(ids, *a, **k))
    together = model.score_images(rollout, one).logprobs_BN
    assert calls == [rows]
    together.sum().backward()
    grads = {name: weight.grad.clone() for name, weight in model.net.named_parameters() if weight.grad is not None}
    model.net.zero_grad()
    for b in range(len(PROMPTS)):
        at = slice(b, b + 1)
        tables = {n: getattr(rollout, n)[at] for n in ("tokens_BN", "reveal_step_BN", "logprobs_BN")}
        own = replace(one, shown_BN=one.shown_BN[at], scored_BN=one.scored_BN[at], weight_BN=one.weight_BN[at])
        scored = model.score_images(replace(rollout, prompts=PROMPTS[at], **tables), own).logprobs_BN
        torch.testing.assert_close(scored, together[at], atol=1e-6, rtol=0)
        scored.sum().backward()
    for name, weight in model.net.named_parameters():
        if weight.grad is not None:
            assert (weight.grad - grads[name]).norm() <= 1e-6 * grads[name].norm() + 1e-9, name


def test_tokens_of_the_models_own_in_a_text_move_nothing(model):
    """A text may hold `<|soi|>` and pads: both halves read it at the same places, and no text loses its beginning."""
    prompts = ["a <|soi|> circle", "[PAD] a photo of two red stars and a blue circle"]
    text_DL, _ = model.prompting.distinct_prefixes(prompts, guided=True)
    assert (text_DL == model.prompting.vocab.special("t2i")).sum(1).tolist() == [1, 1, 1]
    assert model.prompting.text_positions(text_DL)[0, -1] == model.prompting.max_text_len
    seeds_B = key(9, torch.arange(2))
    rollout = model.sample_images(prompts, seeds_B, ImageSampling(num_timesteps=3, guidance_scale=2.0))
    for one in model.scoring_passes(rollout, Estimator(), seeds_B):
        with torch.no_grad():
            scored_BN = model.score_images(rollout, one).logprobs_BN
        torch.testing.assert_close(scored_BN, rollout.logprobs_BN * one.scored_BN, atol=1e-4, rtol=0)
