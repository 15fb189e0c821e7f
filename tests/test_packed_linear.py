"""Packed layers give what plain ones give, only inside the context, and only where they can."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from openunirl.draws import key
from openunirl.models import janus, packed_linear, showo
from openunirl.models.layers import RowsLinear
from openunirl.models.packed_linear import available, packed_linears
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from openunirl.types import AnswerSampling, ImageQuestion, Images, ImageSampling


@pytest.fixture(autouse=True)
def pack_everything(monkeypatch):
    monkeypatch.setattr(packed_linear, "SMALLEST", 0)


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of pack and of packed_product."""
    counted = Counter()

    def counting(name, real):
        def call(*args):
            counted[name] += 1
            return real(*args)

        return call

    for name in ("pack", "packed_product"):
        monkeypatch.setattr(packed_linear, name, counting(name, getattr(packed_linear, name)))
    return counted


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(64, 96), "head": RowsLinear(96, 200, bias=False)})


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, (50, 200), (0, 1)])
def test_products_are_equal_up_to_rounding(net, rows, calls):
    inputs = [torch.randn(3, 5, 64), torch.randn(7, 64), torch.randn(2, 64, 4).transpose(1, 2), torch.zeros(0, 64)]
    want = [net["head"](net["first"](x), rows) for x in inputs]
    with packed_linears(net):
        for _ in range(2):  # packs, then finds it packed
            for x, y in zip(inputs, want, strict=True):
                torch.testing.assert_close(net["head"](net["first"](x), rows), y, atol=2e-6, rtol=0)
    assert calls == ({"pack": 2, "packed_product": 2 * 2 * 3} if available() else {})  # no rows, no product


@torch.no_grad()
def test_the_context_ends_even_after_an_error_and_nests(net):
    x = torch.randn(2, 64)
    want = net["first"](x)
    with pytest.raises(RuntimeError), packed_linears(net):
        with packed_linears(net):
            net["first"](x)
        assert "forward" in vars(net["first"])
        net["first"](torch.randn(2, 3))
    assert "forward" not in vars(net["first"])
    assert torch.equal(net["first"](x), want)
    net["first"].weight.zero_()
    with packed_linears(net):
        torch.testing.assert_close(net["first"](x), net["first"].bias.expand(2, -1))  # a new context packs anew


@torch.no_grad()
def test_other_dtypes_and_autocast_keep_the_plain_layer(net, calls):
    net.double()
    x = torch.randn(2, 64, dtype=torch.float64)
    want = net["first"](x)
    with packed_linears(net):
        assert torch.equal(net["first"](x), want)
    net.float()
    with torch.autocast("cpu", torch.bfloat16), packed_linears(net):
        assert net["first"](x.float()).dtype == torch.bfloat16
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, (50, 200)])
def test_autocast_inside_the_context_keeps_the_plain_layer(net, rows, calls):
    """accelerate enters it inside the prepared net's forward, after the sampler entered packed_linears."""
    x = torch.randn(7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        want = net["head"](net["first"](x), rows)
    with packed_linears(net):
        with torch.autocast("cpu", torch.bfloat16):
            got = net["head"](net["first"](x), rows)
        assert not calls
        assert net["first"](x).dtype == torch.float32  # packed again, once autocast has ended
    assert got.dtype == want.dtype == torch.bfloat16 and torch.equal(got, want)
    assert calls["packed_product"] == available()


class Casts(TorchDispatchMode):
    """Counts casts to bfloat16: of tensors in the shape of a weight, and of a cache's keys and values."""

    def __init__(self, net):
        super().__init__()
        self.shapes, self.weights, self.cached = {p.shape for p in net.parameters() if p.ndim == 2}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.weights += out.ndim == 2 and (out.shape in self.shapes or out.t().shape in self.shapes)
            self.cached += out.ndim == 4 and out.shape[2] > 40
        return out


@pytest.mark.parametrize("family", ["tiny-showo", "tiny-janus"])
@pytest.mark.parametrize("trained", [True, False])
def test_under_autocast_each_weight_is_cast_once_and_no_cached_key_at_all(family, trained, monkeypatch):
    """As accelerate does it: the net's forward alone is under autocast. Answers are the same to the bit."""
    model = build(family, shapes.vocabulary(), seed=3)
    model.net.requires_grad_(trained)
    monkeypatch.setattr(model.net, "forward", torch.autocast("cpu", torch.bfloat16)(model.net.forward))
    images = Images(tokens_BN=torch.zeros(2, model.num_image_tokens, dtype=torch.int64))
    asked = [ImageQuestion(image=b, question="what color is the circle?") for b in (0, 1)]

    def answers(count):
        sampling = AnswerSampling(max_new_tokens=count, temperature=1.0)
        with Casts(model.net) as casts:
            return model.sample_answers(images, asked, key(0, torch.arange(2)), sampling), casts

    (short, few), (got, many) = answers(2), answers(6)
    assert few.weights == many.weights > 0 and int(got.mask_QT.sum(1).max()) == 6 and int(short.mask_QT.sum()) == 4
    assert few.cached == many.cached
    for module in (showo, janus):
        monkeypatch.setattr(module, "packed_linears", lambda _: nullcontext())
    want, plain = answers(6)
    assert torch.equal(got.tokens_QT, want.tokens_QT) and torch.equal(got.logprobs_QT, want.logprobs_QT)
    assert plain.weights > many.weights


class Doubling(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@torch.no_grad()
def test_a_layer_with_a_forward_of_its_own_keeps_it(calls):
    net, x = nn.Sequential(Doubling(64, 96)), torch.randn(3, 64)
    want = net(x)
    with packed_linears(net):
        assert torch.equal(net(x), want)
    assert not calls


@torch.no_grad()
def test_the_context_ends_where_something_else_took_the_forward_away(net):
    with packed_linears(net):
        vars(net["first"]).pop("forward", None)
    assert "forward" not in vars(net["head"])


@torch.no_grad()
def test_a_packed_sampler_draws_the_same_images(monkeypatch, calls):
    model = build("tiny-janus", shapes.vocabulary(), seed=3)
    prompts, seeds = ["a photo of a circle", "a photo of a red circle left of a blue square"], key(0, torch.arange(2))
    got = model.sample_images(prompts, seeds, ImageSampling(guidance_scale=3.0))
    packed, products = calls["pack"], calls["packed_product"]
    assert products > packed > 0 or not available()
    again = model.score_images(got, model.scoring_passes(got, None, None)[0])  # type: ignore[arg-type]
    torch.testing.assert_close(again.logprobs_BN, got.logprobs_BN, atol=1e-4, rtol=0)
    monkeypatch.setattr(packed_linear, "SMALLEST", 2**60)
    want = model.sample_images(prompts, seeds, ImageSampling(guidance_scale=3.0))
    assert torch.equal(got.tokens_BN, want.tokens_BN) and (calls["pack"], calls["packed_product"]) == (packed, products)


def test_gradients_are_refused(net):
    with pytest.raises(AssertionError, match="no gradient"), packed_linears(net):
        pass
