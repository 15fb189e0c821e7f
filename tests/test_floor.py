"""The benchmarks' floor against counts by hand, and that their comparison of gradients sees a small weight."""

import pytest
import torch

import midsize
from floor import Attention, Block, Decoder, Product, causal, gradients
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from training_step import CLOSEST, EACH, apart, janus_blocks, sampled_images, showo_blocks


def test_a_layer_by_hand():
    decoder = Decoder(hidden=8, layers=2, heads=2, mlp=(16,))
    text, image = Block(rows=2, positions=3, keys=2, read=0), Block(rows=4, positions=5, keys=8, read=1)
    all_at, read = 2 * 3 + 4 * 5, 4 * 1
    weights, attention = 2 * all_at * 64 + read * (64 + 64 + 2 * 8 * 16), 2 * 4 * 2 * 1 * 8 * 4
    got = decoder.layer([text, image])
    assert sum(work.madds for work in got) == weights + attention
    assert sum(work.madds for work in gradients(got)) == 2 * (weights + attention)
    assert decoder.layer([text]) == (Product(m=6, k=8, n=8),) * 2  # keys and values
    assert [causal(n) for n in (1, 2, 3)] == [1, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_replayed_by_both_routines(backward, fused):
    work = Attention(rows=2, heads=2, queries=3, keys=5, size=4, backward=backward)
    made = work.call(False, fused)()
    shapes_of = [tuple(t.shape[-2:]) for t in (made if isinstance(made, list | tuple) else [made])]
    wanted = {
        (False, False): [(3, 5), (3, 4)],
        (False, True): [(3, 4)],
        (True, False): [(3, 4), (5, 4), (3, 5), (4, 5)],  # of the right side transposed
        (True, True): [(3, 4), (5, 4), (5, 4)],
    }
    assert shapes_of == wanted[backward, fused]


@pytest.mark.parametrize(("estimator", "rows"), [("full_mask", 3 + 1), ("remask", 4 + 4)])
def test_a_floor_counts_each_distinct_row_once(estimator, rows):
    prompts = [*midsize.prompts(3), midsize.prompts(1)[0]]
    model = build("tiny-showo", shapes.vocabulary(), seed=0)
    text, image = showo_blocks(model, prompts, True, sampled_images(model, prompts, 5.0, estimator)[1])
    assert (text.rows, text.read, image.rows) == (3 + 1, 0, rows)
    assert image.keys == text.positions + image.positions and image.positions == model.num_image_tokens + 2
    model = build("tiny-janus", shapes.vocabulary(), seed=0)
    text, image = janus_blocks(model, prompts, True, sampled_images(model, prompts, 5.0, "full_mask")[1])
    lengths = {len(model.prompting.t2i(prompt)) for prompt in prompts}
    assert (text.rows, image.rows, image.keys) == (3 + len(lengths), 8, text.positions + causal(image.positions))


def test_a_small_weights_gradient_is_compared_too():
    want = {"large": torch.full((10,), 1000.0), "small": torch.full((2,), 10.0), "zero": torch.zeros(2)}
    whole, largest, worst = apart(want, want | {"small": torch.full((2,), 10.01)})
    assert whole < CLOSEST and largest > EACH and worst == "small"
    assert apart(want, want | {"zero": torch.full((2,), 1e-5)})[1] < EACH  # rounding's
