"""A last layer that is computed where it is read gives what a whole one gives there, gradients and caches included."""

import pytest
import torch

from openunirl.models.layers import PrefixCache
from openunirl.models.tiny import build
from openunirl.tasks import shapes

B, L, SEEN = 3, 7, 4
SELECTIONS = {
    "flat": torch.tensor([20, 0, 3, 3, 9]),
    "of each row": torch.tensor([[0, 6], [8, 7], [20, 20]]),
    "one row's": torch.tensor([[2]]),
}


@pytest.fixture(scope="module", params=["showo sdpa", "showo eager", "janus sdpa"])
def net(request):
    family, attention = request.param.split()
    net = build(f"tiny-{family}", shapes.vocabulary(), seed=2).net
    if family == "showo":
        net.attn_implementation = attention
        net.showo.model.config._attn_implementation = attention
    return net.double()


def given(rows, one_mask, one_query):
    generator = torch.Generator().manual_seed(1)
    ids_BL = torch.randint(1, 40, (rows, L), generator=generator)
    mask = torch.ones(L, L, dtype=torch.bool).tril().expand(1 if one_mask else rows, 1, L, L).clone()
    if not one_mask:
        mask[:, :, 2:, 0] = torch.arange(rows)[:, None, None] % 2 == 0
    if one_query:
        mask = mask[:, :, -1:]
    positions_BL = torch.arange(L).expand(1 if one_mask else rows, L) + (0 if one_mask else torch.arange(rows)[:, None])
    return ids_BL, mask, positions_BL


@pytest.mark.parametrize("one_query", [False, True], ids=["a mask of each position", "one for all"])
@pytest.mark.parametrize("one_mask", [False, True], ids=["a mask of each row", "one for all"])
@pytest.mark.parametrize("name", list(SELECTIONS))
def test_selected_logits_and_gradients_are_those_of_all(net, name, one_mask, one_query):
    select = SELECTIONS[name]
    ids_BL, mask, positions_BL = given(1 if name == "one row's" else B, one_mask, one_query)
    whole_BLV = net(ids_BL, mask, positions_BL=positions_BL)
    want = whole_BLV.flatten(0, 1)[select.flatten()].view(*select.shape, -1)
    got = net(ids_BL, mask, positions_BL=positions_BL, select=select)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), weights, allow_unused=True) for x in (got, want)),
                    strict=True):  # fmt: skip
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-7)


@torch.no_grad()
def test_a_pass_that_selects_nothing_fills_the_cache_all_the_same(net):
    ids_BL, mask, positions_BL = given(B, False, False)
    whole, bare = PrefixCache(), PrefixCache()
    net(ids_BL, mask, positions_BL=positions_BL, cache=whole)
    nothing = net(ids_BL, mask, positions_BL=positions_BL, cache=bare, select=torch.zeros(0, 0, dtype=torch.int64))
    assert nothing.numel() == 0
    assert len(bare.layers) == len(whole.layers)
    for got, want in zip(bare.layers, whole.layers, strict=True):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@torch.no_grad()
def test_a_pass_that_selects_nothing_asks_no_query_and_no_mlp_of_the_last_layer(net):
    """With or without a cache behind it; of the other layers everything is asked."""
    trunk = net.showo.model if hasattr(net, "showo") else net.model["language_model"]
    asked = {}
    hooks = [
        module.register_forward_hook(lambda *call, at=(number, name): asked.update({at: call[2].shape[:-1].numel()}))
        for number, layer in enumerate(trunk.layers)
        for name, module in layer.named_modules()
        if name.endswith("_proj") or name == "mlp"
    ]
    try:
        ids_BL, mask, positions_BL = given(B, False, False)
        net(ids_BL, mask, positions_BL=positions_BL, cache=PrefixCache(), select=torch.zeros(0, 0, dtype=torch.int64))
    finally:
        for hook in hooks:
            hook.remove()
    last = len(trunk.layers) - 1
    spared = [at for at, rows in asked.items() if not rows] + [
        (last, "self_attn.q_proj") for _ in range((last, "self_attn.q_proj") not in asked)
    ]
    assert {number for number, _ in spared} == {last}
    assert {"self_attn.q_proj", "mlp"} <= {name for _, name in spared}
    assert asked[last, "self_attn.k_proj"] == asked[last, "self_attn.v_proj"] == B * L
    assert all(asked[number, "mlp"] == B * L for number in range(last))


@torch.no_grad()
def test_positions_that_are_not_told_follow_the_cache(net):
    """Show-o's; Janus always tells them."""
    if not hasattr(net, "showo"):
        return
    ids_BL, mask, _ = given(B, True, False)
    cache = PrefixCache()
    net(ids_BL[:, :SEEN], mask[:, :, :SEEN, :SEEN], cache=cache)
    rest = net(ids_BL[:, SEEN:], mask[:, :, SEEN:], cache=cache)
    torch.testing.assert_close(rest, net(ids_BL, mask)[:, SEEN:], atol=1e-12, rtol=1e-9)
