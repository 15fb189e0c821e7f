"""The tokenizer against numbers of the official class (tests/golden/magvitv2); every size is read from the data."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from openunirl.models.magvit import Magvit, quantizer_losses

GOLDEN = Path(os.environ.get("OPENUNIRL_GOLDEN", Path(__file__).parents[1] / "golden")) / "magvitv2"


@pytest.fixture(scope="module")
def meta():
    return json.loads((GOLDEN / "meta.json").read_text())


@pytest.fixture(scope="module")
def state_dict():
    return load_file(GOLDEN / "state_dict.safetensors")


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def magvit(state_dict, meta):
    return Magvit.from_state_dict(state_dict, norm_groups=meta["group_norm"]["num_groups"]).eval()


def grid_of(magvit, pixels_BCHW):
    height, width = pixels_BCHW.shape[2:]
    return height // magvit.config.patch_size, width // magvit.config.patch_size


def test_sizes_are_those_of_the_official_constructor(magvit, meta):
    config = magvit.config
    for side, channels in (("encoder", config.encoder_channels), ("decoder", config.decoder_channels)):
        assert channels == tuple(meta[side]["ch"] * mult for mult in meta[side]["ch_mult"])
        assert getattr(config, f"{side}_num_res_blocks") == tuple(meta[side]["num_res_blocks"])
        assert getattr(config, f"{side}_mid_attn") and getattr(config, f"{side}_attn_levels") == ()
        assert config.codebook_bits == meta[side]["z_channels"] == meta["codebook_bits"]
    assert config.encoder_ch == meta["encoder"]["ch"]
    assert config.codebook_size == meta["codebook_size"]
    assert config.image_channels == meta["encoder"]["in_ch"] == meta["decoder"]["out_ch"]
    assert all(m.eps == meta["group_norm"]["eps"] for m in magvit.modules() if isinstance(m, torch.nn.GroupNorm))


def test_export_has_the_official_keys_and_values(magvit, state_dict):
    exported = magvit.state_dict()
    assert exported.keys() == state_dict.keys()
    for key, value in state_dict.items():
        assert torch.equal(exported[key], value.to(exported[key].dtype)), key
    assert exported["quantize.power_vals"].dtype == torch.int64


@torch.no_grad()
def test_encode(magvit, io):
    z_BKhw = magvit.encode_latents(io["pixel_values"])
    torch.testing.assert_close(z_BKhw, io["encoder_out_z"], atol=1e-4, rtol=0)
    torch.testing.assert_close(magvit.quantize(z_BKhw), io["quantized_z"], atol=1e-6, rtol=0)
    tokens_BN = magvit.encode(io["pixel_values"])
    assert tokens_BN.dtype == torch.int64 and torch.equal(tokens_BN, io["indices"])


@torch.no_grad()
def test_decode(magvit, io):
    torch.testing.assert_close(magvit.decode(io["indices"]), io["decoded"], atol=1e-4, rtol=0)
    onehots_BNV = one_hot(io["indices"], magvit.config.codebook_size).float()
    torch.testing.assert_close(magvit.decode_onehots(onehots_BNV), io["decoded"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_decode_rectangle(magvit, io):
    grid = grid_of(magvit, io["rect.decoded"])
    assert grid[0] != grid[1]
    torch.testing.assert_close(magvit.decode(io["rect.indices"], grid), io["rect.decoded"], atol=1e-4, rtol=0)


def test_bit_order(magvit, io):
    entries_BKhw, tokens_BN = io["codebook_probe.entries"], io["codebook_probe.indices"]
    assert torch.equal(magvit.quantize.lookup(tokens_BN, tuple(entries_BKhw.shape[2:])), entries_BKhw)
    assert torch.equal(magvit.quantize.tokens(entries_BKhw), tokens_BN)
    assert torch.equal(magvit.code_table()[tokens_BN[0]], entries_BKhw[0].flatten(1).T)


def test_zero_latents_give_the_all_zero_code(magvit, io):
    z_BKhw = torch.zeros(io["zero_z.indices"].shape[0], magvit.config.codebook_bits, *io["zero_z.indices"].shape[2:])
    assert torch.equal(magvit.quantize.tokens(z_BKhw), io["zero_z.indices"].flatten(1))


def test_quantizer_losses(io):
    quantizer_loss, entropy_loss = quantizer_losses(io["encoder_out_z"])
    torch.testing.assert_close(quantizer_loss, io["quantizer_loss"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(entropy_loss, io["entropy_loss"], atol=1e-6, rtol=1e-5)


def test_every_recorded_tensor_is_checked(io):
    checked = {"codebook_probe.entries", "codebook_probe.indices", "decoded", "encoder_out_z", "entropy_loss"}
    checked |= {"indices", "pixel_values", "quantized_z", "quantizer_loss", "rect.decoded", "rect.indices"}
    assert io.keys() == checked | {"zero_z.indices"}
