"""Codes that stand for the same thing are merged, so that a picture's tokens do not hang on its noise."""

import pytest
import torch
from torch.nn import functional as F

from openunirl.models.tiny import build
from openunirl.tasks import shapes


@pytest.fixture
def tokenizer():
    """A fresh VQ whose codes are pairs that lie close together, at the pictures' own latents."""
    vq = build("tiny-janus", shapes.vocabulary(), seed=2).image_tokenizer
    torch.manual_seed(0)
    weight = vq.quantize.embedding.weight
    with torch.no_grad():
        latents = vq.latents(torch.rand(4, 3, 64, 64)).flatten(2).transpose(1, 2).flatten(0, 1)
        near = F.normalize(latents + 1e-3 * torch.randn_like(latents), dim=-1)
        weight.copy_(3.0 * torch.cat([near, latents]))  # stored at any length
    return vq


def test_near_codes_become_one_and_pictures_keep_theirs(tokenizer):
    torch.manual_seed(0)
    pixels = torch.rand(4, 3, 64, 64)
    before = tokenizer.unit_codes()[tokenizer.tokenize(pixels)]
    assert tokenizer.tokenize(pixels).max() >= 256  # the second half lies nearest
    merged = tokenizer.merge_codes(pixels, above=0.9999)
    assert merged >= 256
    after = tokenizer.tokenize(pixels)
    assert after.max() < 256 and after.unique().numel() <= 512 - merged
    assert ((tokenizer.unit_codes()[after] * before).sum(-1) > 0.9995).all()
    assert tokenizer.merge_codes(pixels, above=0.9999) == merged  # nothing more to do
    assert torch.equal(tokenizer.tokenize(pixels), after)


def test_codes_that_lie_apart_stay(tokenizer):
    weight = tokenizer.quantize.embedding.weight.clone()
    assert tokenizer.merge_codes(torch.rand(2, 3, 64, 64), above=1.1) == 0
    assert torch.equal(tokenizer.quantize.embedding.weight, weight)


def test_any_family_settles():
    for family in ("tiny-showo", "tiny-janus"):
        model = build(family, shapes.vocabulary(), seed=2)
        model.settle_tokenizer(torch.rand(2, 3, 64, 64))
        assert model.tokenize(torch.rand(2, 3, 64, 64)).shape == (2, 64)
