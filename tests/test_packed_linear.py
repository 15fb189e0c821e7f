"""Packed layers give what plain ones give, only inside the context, and only where they can."""

import pytest
import torch
from torch import nn

from openunirl.draws import key
from openunirl.models import packed_linear
from openunirl.models.layers import RowsLinear
from openunirl.models.packed_linear import available, packed_linears
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from openunirl.types import ImageSampling


@pytest.fixture(autouse=True)
def pack_everything(monkeypatch):
    monkeypatch.setattr(packed_linear, "SMALLEST", 0)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(64, 96), "head": RowsLinear(96, 200, bias=False)})


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, (50, 200), (0, 1)])
def test_products_are_equal_up_to_rounding(net, rows):
    inputs = [torch.randn(3, 5, 64), torch.randn(7, 64), torch.randn(2, 64, 4).transpose(1, 2), torch.zeros(0, 64)]
    want = [net["head"](net["first"](x), rows) for x in inputs]
    with packed_linears(net):
        for _ in range(2):  # packs, then finds it packed
            for x, y in zip(inputs, want, strict=True):
                torch.testing.assert_close(net["head"](net["first"](x), rows), y, atol=2e-6, rtol=0)


@torch.no_grad()
def test_the_context_ends_even_after_an_error_and_nests(net):
    x = torch.randn(2, 64)
    want = net["first"](x)
    with pytest.raises(RuntimeError), packed_linears(net):
        with packed_linears(net):
            net["first"](x)
        assert ("forward" in vars(net["first"])) == available()
        net["first"](torch.randn(2, 3))
    assert "forward" not in vars(net["first"])
    assert torch.equal(net["first"](x), want)
    net["first"].weight.zero_()
    with packed_linears(net):
        torch.testing.assert_close(net["first"](x), net["first"].bias.expand(2, -1))  # a new context packs anew


@torch.no_grad()
def test_other_dtypes_and_autocast_keep_the_plain_layer(net):
    net.double()
    x = torch.randn(2, 64, dtype=torch.float64)
    want = net["first"](x)
    with packed_linears(net):
        assert torch.equal(net["first"](x), want)
    net.float()
    with torch.autocast("cpu", torch.bfloat16), packed_linears(net):
        assert net["first"](x.float()).dtype == torch.bfloat16


@torch.no_grad()
def test_a_packed_sampler_draws_the_same_images(monkeypatch):
    model = build("tiny-janus", shapes.vocabulary(), seed=3)
    prompts, seeds = ["a photo of a circle", "a photo of a red circle left of a blue square"], key(0, torch.arange(2))
    got = model.sample_images(prompts, seeds, ImageSampling(guidance_scale=3.0))
    again = model.score_images(got, model.scoring_passes(got, None, None)[0])  # type: ignore[arg-type]
    torch.testing.assert_close(again.logprobs_BN, got.logprobs_BN, atol=1e-4, rtol=0)
    monkeypatch.setattr(packed_linear, "SMALLEST", 2**60)
    want = model.sample_images(prompts, seeds, ImageSampling(guidance_scale=3.0))
    assert torch.equal(got.tokens_BN, want.tokens_BN)


def test_gradients_are_refused(net):
    with pytest.raises(AssertionError, match="no gradient"), packed_linears(net):
        pass
