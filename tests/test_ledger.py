"""The ledger against counts and bytes worked out by hand, and against torch's own record of memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from openunirl.ledger import Ledger

FLOAT = 4


def absent(ledger, *shape):
    return ledger.absent(torch.empty(shape, device="meta"))


def test_a_linear_layer_counts_one_product_forward_and_two_backward():
    ledger, layer = Ledger(), nn.Linear(8, 16)
    ledger.adopt(layer)
    with ledger:
        ledger.phase = "forward"
        out = layer(absent(ledger, 4, 8).requires_grad_())
        ledger.phase = "backward"
        out.sum().backward()
    assert ledger.phases["forward"].madds == 4 * 8 * 16
    assert ledger.phases["backward"].madds == 2 * 4 * 8 * 16


def test_an_input_without_gradient_saves_a_product():
    ledger, layer = Ledger(), nn.Linear(8, 16)
    ledger.adopt(layer)
    with ledger:
        layer(absent(ledger, 4, 8)).sum().backward()
    assert ledger.phases[""].madds == 2 * 4 * 8 * 16


def test_attention_counts_two_products_forward_and_five_backward():
    ledger = Ledger()
    mask = torch.ones(3, 1, 5, 7, dtype=torch.bool)
    with ledger:
        ledger.phase = "forward"
        query = absent(ledger, 3, 2, 5, 16).requires_grad_()
        out = F.scaled_dot_product_attention(query, absent(ledger, 3, 2, 7, 16), absent(ledger, 3, 2, 7, 16), mask)
        ledger.phase = "backward"
        out.sum().backward()
    once = 3 * 2 * 5 * 7 * 16
    assert ledger.phases["forward"].madds == 2 * once
    assert ledger.phases["backward"].madds == 5 * once


def test_a_convolution_counts_its_window_at_every_place():
    ledger, layer = Ledger(), nn.Conv2d(3, 8, 3, padding=1)
    ledger.adopt(layer)
    with ledger:
        ledger.phase = "forward"
        out = layer(absent(ledger, 2, 3, 10, 10))
        ledger.phase = "backward"
        out.sum().backward()
    once = 2 * 8 * 10 * 10 * 3 * 3 * 3
    assert ledger.phases["forward"].madds == once
    assert ledger.phases["backward"].madds == once  # the weight's gradient; the input wants none


def test_bytes_are_alive_as_long_as_anything_holds_them():
    ledger = Ledger()
    with ledger:
        one = absent(ledger, 10, 10)
        assert ledger.live == 400
        two = one * 2
        half = two[:5]  # a view: no bytes of its own
        assert ledger.live == 800
        del two
        assert ledger.live == 800
        del half
        assert ledger.live == 400
        three = one.exp() + 1  # exp's result lives until the sum is there
    del three
    assert ledger.live == 400
    assert ledger.phases[""].peak == 1200


def test_the_graph_keeps_what_backward_needs_and_nothing_else():
    ledger = Ledger()
    with ledger:
        weight = absent(ledger, 100).requires_grad_()
        kept = weight.exp().sum()  # exp keeps its result
        assert ledger.live == 2 * 400 + FLOAT
        kept.backward()
        del kept
    assert weight.grad is not None
    assert ledger.live == 2 * 400


def test_real_numbers_stay_real_and_decisions_are_made_up():
    ledger = Ledger()
    with ledger:
        logits = absent(ledger, 3, 50)
        assert torch.arange(4).tolist() == [0, 1, 2, 3]
        tokens = logits.argmax(-1)
        assert all(0 <= token < 50 for token in tokens.tolist())
        assert not bool((logits > 0).any())
        assert bool(logits.isfinite().all()) and not bool(logits.isnan().any())
        large = absent(ledger, 2000, 2000)
        assert bool(large.isfinite().all()) and not bool(large.isnan().any())
        assert float(logits.mean()) == 0.5


@pytest.mark.parametrize("family", ["showo", "janus"])
def test_a_networks_peak_is_that_of_torchs_allocator(family):
    import midsize
    from memory import peak
    from openunirl.models.tiny import build
    from openunirl.tasks import shapes
    from openunirl.types import ImageQuestion, Images

    model = build(f"tiny-{family}", shapes.vocabulary(), seed=0)
    images = Images(tokens_BN=torch.zeros(2, 64, dtype=torch.int64))
    questions = [ImageQuestion(image=b, question=midsize.QUESTIONS[0]) for b in range(2)]

    def work():
        scores = model.score_answers(images, questions, ["red", "red"])
        scores.logprobs_QT.sum().backward()

    measured = peak(work, model.device)
    model.net.zero_grad()
    ledger = Ledger()
    for net in (model.net, model.image_tokenizer):
        ledger.adopt(net)
    held = ledger.live
    with ledger:
        work()
    assert ledger.phases[""].peak - held == pytest.approx(measured, rel=0.02)
