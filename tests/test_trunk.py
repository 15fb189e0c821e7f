"""A last layer that is computed where it is read gives what a whole one gives there, gradients and caches included."""

import pytest
import torch

from openunirl.models.janus_net import JanusNet
from openunirl.models.layers import PrefixCache
from openunirl.models.prefix import Prefix
from openunirl.models.tiny import build
from openunirl.tasks import shapes

B, L, SEEN = 3, 7, 4
SELECTIONS = {
    "flat": torch.tensor([20, 0, 3, 3, 9]),
    "of each row": torch.tensor([[0, 6], [8, 7], [20, 20]]),
    "one row's": torch.tensor([[2]]),
}


@pytest.fixture(scope="module", params=["showo sdpa", "showo eager", "janus sdpa", "janus eager", "janus grouped"])
def net(request):
    family, attention = request.param.split()
    model = build(f"tiny-{family}", shapes.vocabulary(), seed=2)
    net = model.net
    if attention == "grouped":  # two heads share their keys and values
        model.config.text_config.num_key_value_heads //= 2
        net, attention = JanusNet(model.config), "sdpa"
    use_attention(net, attention)
    return net.double()


def use_attention(net, name):
    """Eager attention's softmax is in float32, whatever the net is in."""
    net.attn_implementation = name
    trunk = trunk_of(net)
    trunk.config._attn_implementation = name
    assert {layer.self_attn.config._attn_implementation for layer in trunk.layers} == {name}


def trunk_of(net):
    return net.showo.model if hasattr(net, "showo") else net.model["language_model"]


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


PADS_D = torch.tensor([2, 0, 1])


def behind(row_B, one_query):
    """A Prefix of three left-padded rows of SEEN positions, and own ids, mask and positions of L behind it."""
    ids_BL, mask, _ = given(len(row_B), False, one_query)
    offset_DP = torch.arange(SEEN)[None] - PADS_D[:, None]
    real_DP = offset_DP >= 0
    ids_DP = torch.randint(1, 40, (len(PADS_D), SEEN), generator=torch.Generator().manual_seed(2))
    see = torch.ones(SEEN, SEEN, dtype=torch.bool).tril() & real_DP[:, None] | torch.eye(SEEN, dtype=torch.bool)
    prefix = Prefix(ids_DP=ids_DP, positions_DP=offset_DP.clamp_min(0), mask=see[:, None], row_B=row_B)
    real_B11P = real_DP[row_B][:, None, None].expand(-1, -1, mask.shape[2], -1)
    positions_BL = (SEEN - PADS_D)[row_B][:, None] + torch.arange(L)
    return prefix, ids_BL, torch.cat([real_B11P, mask], dim=-1), positions_BL


def whole_rows(prefix, ids_BL, mask, positions_BL):
    """The same, each row with its prefix in front."""
    nobody = torch.zeros(len(ids_BL), 1, SEEN, L, dtype=torch.bool)
    before = torch.cat([prefix.mask[prefix.row_B], nobody], dim=-1)
    return (
        torch.cat([prefix.ids_DP[prefix.row_B], ids_BL], dim=1),
        torch.cat([before, mask.expand(-1, -1, L, -1)], dim=2),
        torch.cat([prefix.positions_DP[prefix.row_B], positions_BL], dim=1),
    )


@pytest.mark.parametrize("one_query", [False, True], ids=["a mask of each position", "one for all"])
@pytest.mark.parametrize("row_B", [[0, 2, 2, 1, 2], [2, 0, 1]], ids=["shared", "each its own"])
def test_logits_and_gradients_behind_a_prefix_are_those_of_whole_rows(net, row_B, one_query):
    prefix, ids_BL, mask, positions_BL = behind(torch.tensor(row_B), one_query)
    select = torch.tensor([len(row_B) * L - 1, 0, 3, 3, L])
    whole_ids, whole_mask, whole_positions = whole_rows(prefix, ids_BL, mask, positions_BL)
    own_BLV = net(whole_ids, whole_mask, positions_BL=whole_positions)[:, SEEN:]
    want = own_BLV.flatten(0, 1)[select]
    got = net(ids_BL, mask, positions_BL=positions_BL, select=select, prefix=prefix)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)
    close = {"atol": 1e-10, "rtol": 1e-7}
    if trunk_of(net).config._attn_implementation == "eager":
        close = {"atol": 1e-6, "rtol": 1e-5}  # rows that share a prefix round its gradient together
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), weights, allow_unused=True) for x in (got, want)),
                    strict=True):  # fmt: skip
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **close)


@torch.no_grad()
def test_a_shared_prefix_is_computed_once_and_its_last_layer_as_keys_and_values_only(net):
    trunk = trunk_of(net)
    asked, last = {}, len(trunk.layers) - 1
    hooks = [
        module.register_forward_hook(lambda *call, at=(number, name): asked.update({at: call[2].shape[:-1].numel()}))
        for number, layer in enumerate(trunk.layers)
        for name, module in layer.named_modules()
        if name.endswith("_proj") or name == "mlp"
    ]
    prefix, ids_BL, mask, positions_BL = behind(torch.tensor([0, 2, 2, 1, 2]), False)
    try:
        net(ids_BL, mask, positions_BL=positions_BL, select=torch.arange(4), prefix=prefix)
    finally:
        for hook in hooks:
            hook.remove()
    places = 3 * SEEN + 5 * L
    assert all(asked[number, "mlp"] == places for number in range(last)) and asked[last, "mlp"] == 4
    assert asked[last, "self_attn.k_proj"] == places and asked[last, "self_attn.q_proj"] == 5 * L


@torch.no_grad()
def test_a_pass_that_selects_nothing_asks_no_query_and_no_mlp_of_the_last_layer(net):
    """With or without a cache behind it; of the other layers everything is asked."""
    trunk = trunk_of(net)
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
