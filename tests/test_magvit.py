"""The image tokenizer on tiny random networks: sizes, quantizer, gradients, errors, image in and out."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from torch.nn.functional import one_hot

from openunirl.models.magvit import Magvit, MagvitConfig, preprocess, quantizer_losses, to_uint8

TINY = MagvitConfig(
    encoder_ch=16,
    encoder_ch_mult=(1, 2, 2, 2),
    encoder_num_res_blocks=(1, 2, 1, 1),
    decoder_ch=16,
    decoder_ch_mult=(1, 1, 2, 3),
    decoder_num_res_blocks=(1, 1, 2, 1),
    codebook_bits=9,
    norm_groups=8,
)
OTHER = MagvitConfig(
    encoder_ch=24,
    encoder_ch_mult=(2, 1, 3),
    encoder_num_res_blocks=(1, 1, 3),
    encoder_attn_levels=(0, 2),
    encoder_mid_attn=False,
    decoder_ch=12,
    decoder_ch_mult=(1, 2, 3),
    decoder_num_res_blocks=(2, 1, 1),
    decoder_attn_levels=(1,),
    codebook_bits=5,
    image_channels=1,
    norm_groups=4,
)


def build(config=TINY, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Magvit(config).eval()


def pixels(config=TINY, batch=2, rows=2, columns=2):
    shape = (batch, config.image_channels, rows * config.patch_size, columns * config.patch_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ----------------------------------------------------------------------------------------- sizes and files


def test_defaults_are_the_real_checkpoint():
    with torch.device("meta"):
        state_dict = Magvit(MagvitConfig()).state_dict()
    assert MagvitConfig.from_state_dict(state_dict) == MagvitConfig()
    assert MagvitConfig().patch_size == 16 and MagvitConfig().codebook_size == 8192
    assert state_dict["decoder.up.4.upsample.conv.weight"].shape == (512, 512, 3, 3)


@pytest.mark.parametrize("config", [TINY, OTHER], ids=["tiny", "other"])
def test_sizes_and_weights_survive_a_file(config):
    magvit = build(config)
    loaded = Magvit.from_state_dict(load(save(magvit.state_dict())), norm_groups=config.norm_groups).eval()
    assert loaded.config == config
    assert torch.equal(loaded.encode(pixels(config)), magvit.encode(pixels(config)))
    assert loaded.decode(torch.zeros(1, 6, dtype=torch.int64), (2, 3)).shape[2:] == pixels(config, columns=3).shape[2:]


def test_config_from_json_lists_equals_the_original():
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(OTHER).items()}
    assert MagvitConfig(**lists) == OTHER and hash(MagvitConfig(**lists)) == hash(OTHER)


def test_tables_may_be_absent_and_are_written_again():
    state_dict = build().state_dict()
    without = {key: value for key, value in state_dict.items() if not key.startswith("quantize.")}
    exported = Magvit.from_state_dict(without, norm_groups=8).state_dict()
    assert exported.keys() == state_dict.keys()
    assert all(torch.equal(exported[key], state_dict[key]) for key in state_dict)
    assert not any(key.startswith("quantize.") for key in without)


def test_loading_leaves_the_global_generator_alone():
    state_dict, before = build().state_dict(), torch.get_rng_state()
    Magvit.from_state_dict(state_dict, norm_groups=8)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "key",
    [
        "encoder.conv_in.weight",
        "encoder.down.1.block.0.conv1.weight",
        "encoder.quant_conv.weight",
        "encoder.mid.attn_1.q.bias",
        "decoder.up.2.block.1.norm1.bias",
        "decoder.up.1.upsample.conv.weight",
        "decoder.post_quant_conv.bias",
    ],
)
def test_a_missing_key_is_named(key):
    state_dict = build().state_dict()
    del state_dict[key]
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        MagvitConfig.from_state_dict(state_dict, norm_groups=8)


def test_wrong_state_dicts():
    state_dict = build().state_dict()
    with pytest.raises(ValueError, match="missing"):
        MagvitConfig.from_state_dict({})
    with pytest.raises(ValueError, match="missing"):
        MagvitConfig.from_state_dict({f"vq_model.{key}": value for key, value in state_dict.items()})
    with pytest.raises(ValueError, match=r"loss\.discriminator"):
        MagvitConfig.from_state_dict({**state_dict, "loss.discriminator": torch.zeros(1)}, norm_groups=8)
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.weight"):
        wrong = state_dict["decoder.conv_out.weight"][:2]
        MagvitConfig.from_state_dict({**state_dict, "decoder.conv_out.weight": wrong}, norm_groups=8)
    with pytest.raises(ValueError, match="norm_groups=32"):
        MagvitConfig.from_state_dict(state_dict)
    with pytest.raises(ValueError, match="most significant bit first"):
        least_first = state_dict["quantize.embedding"].flip(1)
        MagvitConfig.from_state_dict({**state_dict, "quantize.embedding": least_first}, norm_groups=8)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"norm_groups": 5}, "norm_groups=5"),
        ({"decoder_ch_mult": (1, 1)}, "decoder_ch_mult"),
        ({"encoder_num_res_blocks": (1, 0, 1, 1)}, "at least one block"),
        ({"encoder_attn_levels": (4,)}, "encoder_attn_levels"),
    ],
)
def test_sizes_that_make_no_network(wrong, told):
    with pytest.raises(ValueError, match=told):
        MagvitConfig(**{**asdict(TINY), **wrong})


# ---------------------------------------------------------------------------------------------- quantizer


def test_bits_by_hand():
    quantize = build(MagvitConfig(**{**asdict(TINY), "codebook_bits": 3})).quantize
    z_BKhw = torch.tensor([[0.5, -1.0], [0.0, 2.0], [3.0, -0.1]]).reshape(1, 3, 1, 2)
    assert quantize.tokens(z_BKhw).tolist() == [[0b101, 0b010]]
    assert quantize(z_BKhw).flatten(2).tolist() == [[[1, -1], [-1, 1], [1, -1]]]
    assert quantize.embedding.tolist()[6] == [1, 1, -1]


def test_tokens_are_row_major():
    magvit = build()
    tokens_BN = torch.arange(6)[None]
    code_BKhw = magvit.quantize.lookup(tokens_BN, (2, 3))
    assert torch.equal(code_BKhw[0, :, 1, 0], magvit.code_table()[3])
    assert torch.equal(magvit.quantize.tokens(code_BKhw), tokens_BN)


def test_gradient_passes_the_quantizer_to_the_encoder():
    magvit = build()
    z_BKhw = torch.randn(1, 9, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.arange(36.0).reshape(1, 9, 2, 2)
    (magvit.quantize(z_BKhw) * weights).sum().backward()
    assert torch.equal(z_BKhw.grad, weights)
    reconstructed, _ = magvit(pixels())
    reconstructed.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in magvit.encoder.parameters() if p.ndim == 4)


def test_quantizer_losses_by_hand():
    z_BKhw = torch.tensor([0.5, -2.0]).reshape(1, 1, 1, 2).requires_grad_()
    quantizer_loss, entropy_loss = quantizer_losses(z_BKhw)
    assert quantizer_loss.item() == pytest.approx(0.1 * 1.25 * (0.25 + 1.0) / 2, rel=1e-6)
    probs = [math.exp(-((z - 1) ** 2)) / (math.exp(-((z - 1) ** 2)) + math.exp(-((z + 1) ** 2))) for z in (0.5, -2.0)]

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    expected = sum(map(entropy, probs)) / 2 - entropy(sum(probs) / 2)
    assert entropy_loss.item() == pytest.approx(0.1 * expected, rel=1e-4)
    # d/dz of the mean of (z - q)^2 is (z - q) for two values; (1 - beta) of it remains.
    (gradient,) = torch.autograd.grad(quantizer_loss, z_BKhw)
    torch.testing.assert_close(gradient.flatten(), 0.1 * 0.75 * torch.tensor([-0.5, -1.0]))


@pytest.mark.parametrize("value", [0.0, 50.0, -1e4])
def test_quantizer_losses_stay_finite(value):
    z_BKhw = torch.full((2, 3, 2, 2), value, requires_grad=True)
    losses = quantizer_losses(z_BKhw)
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses) and z_BKhw.grad.isfinite().all()


def test_losses_train_from_nothing():
    magvit, target = build(), pixels(batch=4)
    optimizer = torch.optim.Adam(magvit.parameters(), lr=2e-3)
    errors = []
    for _ in range(30):
        reconstructed, z_BKhw = magvit(target)
        errors.append((reconstructed - target).square().mean())
        optimizer.zero_grad()
        (errors[-1] + sum(quantizer_losses(z_BKhw))).backward()
        optimizer.step()
    assert errors[-1] < 0.9 * errors[0]


# ------------------------------------------------------------------------------------------------- decoding


def test_soft_decode_equals_decode_on_onehots_and_is_differentiable():
    magvit = build()
    tokens_BN = torch.randint(512, (2, 6), generator=torch.Generator().manual_seed(2))
    onehots_BNV = one_hot(tokens_BN, 512).float().requires_grad_()
    soft = magvit.decode_onehots(onehots_BNV, (3, 2))
    assert torch.equal(soft, magvit.decode(tokens_BN, (3, 2)))
    soft.square().sum().backward()
    assert onehots_BNV.grad.isfinite().all() and (onehots_BNV.grad.abs().sum(-1) > 0).all()


def test_half_precision_network_takes_tokens_and_probabilities():
    magvit = build().to(torch.bfloat16)
    tokens_BN = torch.tensor([[0, 511, 3, 77]])
    assert magvit.decode(tokens_BN).dtype == torch.bfloat16
    assert torch.equal(magvit.decode_onehots(one_hot(tokens_BN, 512).float()), magvit.decode(tokens_BN))


@pytest.mark.parametrize(("count", "grid"), [(6, None), (6, (2, 2)), (4, (-2, -2)), (0, None)])
def test_wrong_grid(count, grid):
    with pytest.raises(ValueError, match=f"{count} tokens"):
        build().decode(torch.zeros(1, count, dtype=torch.int64), grid)
    with pytest.raises(ValueError, match=f"{count} tokens"):
        build().decode_onehots(torch.zeros(1, count, 512), grid)


def test_wrong_tokens_and_pixels():
    magvit = build()
    for wrong in (512, -1):
        with pytest.raises(ValueError, match=r"codes 0\.\.511"):
            magvit.decode(torch.tensor([[0, 0, 0, wrong]]))
    with pytest.raises(ValueError, match=r"\[B, N\]"):
        magvit.decode(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[B, N, 512\]"):
        magvit.decode_onehots(torch.zeros(1, 4, 513))
    with pytest.raises(ValueError, match="multiples of 8"):
        magvit.encode(torch.zeros(1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        magvit.encode(torch.zeros(1, 1, 16, 16))


# --------------------------------------------------------------------------------------------- image in, out


def test_to_uint8_cuts_off():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(values.bfloat16()).dtype == torch.uint8


def test_preprocess_and_back_is_exact_at_the_right_size():
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels_CHW = preprocess(Image.fromarray(picture), 8)
    assert pixels_CHW.shape == (3, 8, 8) and pixels_CHW.dtype == torch.float32
    # Truncation after float arithmetic may lose one step, as in the official code; never more.
    difference = picture.astype(int) - to_uint8(pixels_CHW).permute(1, 2, 0).numpy()
    assert difference.min() >= 0 and difference.max() <= 1


@pytest.mark.parametrize(("width", "height"), [(31, 12), (12, 31), (20, 20)])
def test_preprocess_scales_the_short_side_and_crops_the_centre(width, height):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
    size = 8
    scale = {12: (20, 8), 20: (8, 8)}[min(width, height)]  # 8 * 31 // 12 = 20
    scaled = picture.resize(scale if width >= height else scale[::-1], Image.Resampling.BICUBIC)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    expected = np.asarray(scaled)[top : top + size, left : left + size].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(preprocess(picture, size).permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_preprocess_takes_any_mode():
    assert preprocess(Image.new("L", (9, 5), 255), 4).eq(1).all()
    assert preprocess(Image.new("RGBA", (5, 9), (0, 0, 0, 10)), 4).eq(-1).all()
