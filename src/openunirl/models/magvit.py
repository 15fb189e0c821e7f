"""MAGVIT-v2 image tokenizer with lookup-free quantization (LFQ), as Show-o uses it.

    PIL image -> preprocess -> pixels_BCHW -> encode -> tokens_BN -> decode -> pixels_BCHW -> to_uint8
                                                 onehots_BNV -> decode_onehots -'

In: RGB pixels in -1..1. Out: tokens in [0, 2^bits), row-major over the grid, and pixels in the network's own -1..1
(not clamped). Key names are those of `showlab/magvitv2`, so an official state dict loads unchanged.

Source: Yu et al., MAGVIT-v2 (arXiv 2310.05737), section 3.1; network and constants from Show-o (arXiv 2408.12528).
Departures from the official class, which is one fixed size: 1. sizes are configurable and read from the state dict;
attention is stated per level, not as a list of resolutions; 2. the straight-through output is exactly +-1; the official
sum z + (q - z) is so only up to rounding; 3. `decode_onehots` is UniRL's (arXiv 2505.23380), not Show-o's; 4. pixel
sizes that the down-sampling does not divide are refused, where the official network drops the border.

Shapes: B images, C channels (of pixels or features), H x W pixels, h x w = N tokens, K bits, V = 2^K codes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class MagvitConfig:
    """Sizes of the tokenizer; the defaults are the checkpoint `showlab/magvitv2`. Level 0 is the full resolution.

    The encoder's first convolution has `encoder_ch` channels, its level i `encoder_ch * encoder_ch_mult[i]`.
    `encoder_attn_levels` names the levels with an attention block after each residual block; `encoder_mid_attn` is the
    one in the middle. Every channel count must be a multiple of `norm_groups`, the groups of all group norms.
    Lists (as JSON gives them) are taken for tuples. Raises ValueError for sizes that make no network.

    Example (64 px -> 32x32 tokens of 9 bits): MagvitConfig(encoder_ch=32, encoder_ch_mult=(1, 2), decoder_ch=32,
        encoder_num_res_blocks=(1, 1), decoder_ch_mult=(1, 2), decoder_num_res_blocks=(1, 1), codebook_bits=9)
    """

    encoder_ch: int = 128
    encoder_ch_mult: tuple[int, ...] = (1, 2, 2, 4, 4)
    encoder_num_res_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    encoder_attn_levels: tuple[int, ...] = ()
    encoder_mid_attn: bool = True
    decoder_ch: int = 128
    decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_num_res_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)
    decoder_attn_levels: tuple[int, ...] = ()
    decoder_mid_attn: bool = True
    codebook_bits: int = 13
    image_channels: int = 3
    norm_groups: int = 32

    def __post_init__(self) -> None:
        for side in ("encoder", "decoder"):
            names = [f"{side}_{name}" for name in ("ch_mult", "num_res_blocks", "attn_levels")]
            mult, blocks, attn_levels = (tuple(getattr(self, name)) for name in names)
            for name, value in zip(names, (mult, blocks, attn_levels), strict=True):
                object.__setattr__(self, name, value)
            if not len(mult) == len(blocks) == self.num_levels or min(blocks, default=0) < 1:
                sizes = f"{side}_ch_mult={mult}, {side}_num_res_blocks={blocks}"
                raise ValueError(f"{sizes}: each of {self.num_levels} levels needs one of both, and at least one block")
            if not set(attn_levels) <= set(range(self.num_levels)):
                raise ValueError(f"{side}_attn_levels={attn_levels}: levels are 0..{self.num_levels - 1}")
        common = math.gcd(*(channels := (self.encoder_ch, *self.encoder_channels, *self.decoder_channels)))
        if not 1 <= self.codebook_bits <= 20:
            raise ValueError(f"codebook_bits={self.codebook_bits}: a table of all codes is made for 1 to 20 bits")
        if self.norm_groups < 1 or min(channels) < 1 or common % self.norm_groups:
            counts = sorted(set(channels))
            raise ValueError(f"norm_groups={self.norm_groups} must divide all channels {counts}: a divisor of {common}")

    @property
    def num_levels(self) -> int:
        return len(self.encoder_ch_mult)

    @property
    def encoder_channels(self) -> tuple[int, ...]:
        return tuple(self.encoder_ch * mult for mult in self.encoder_ch_mult)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return tuple(self.decoder_ch * mult for mult in self.decoder_ch_mult)

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a token."""
        return 2 ** (self.num_levels - 1)

    @property
    def codebook_size(self) -> int:
        return 2**self.codebook_bits

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], *, norm_groups: int = 32) -> MagvitConfig:
        """Reads every size from key names and shapes; only `norm_groups` leaves no trace there and has to be known.

        The decoder's base is the largest that fits its channel counts and the encoder's base: only products matter.
        Raises ValueError when keys are missing, left over or of another shape than the sizes imply.
        """

        def shape(key: str) -> torch.Size:
            if key not in state_dict or state_dict[key].ndim != 4:
                raise ValueError(f"no MAGVIT-v2 state dict: {key!r} is missing or not a convolution's weight")
            return state_dict[key].shape

        def count(prefix: str) -> int:
            return len({key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)})

        sizes: dict[str, Any] = {}
        encoder_ch, image_channels = shape("encoder.conv_in.weight")[:2]
        for side, stack in (("encoder", "encoder.down"), ("decoder", "decoder.up")):
            levels = range(max(1, count(f"{stack}.")))
            channels = [shape(f"{stack}.{level}.block.0.conv1.weight")[0] for level in levels]
            base = encoder_ch if side == "encoder" else math.gcd(encoder_ch, *channels)
            sizes[f"{side}_ch"] = base
            sizes[f"{side}_ch_mult"] = tuple(ch // base for ch in channels)
            sizes[f"{side}_num_res_blocks"] = tuple(count(f"{stack}.{level}.block.") for level in levels)
            sizes[f"{side}_attn_levels"] = tuple(level for level in levels if count(f"{stack}.{level}.attn."))
            sizes[f"{side}_mid_attn"] = any(key.startswith(f"{side}.mid.attn_1.") for key in state_dict)
        sizes |= {"codebook_bits": shape("encoder.quant_conv.weight")[0], "image_channels": image_channels}
        config = cls(norm_groups=norm_groups, **sizes)
        with torch.device("meta"):
            model = Magvit(config)
        try:
            model.load_state_dict(state_dict, assign=True)
        except RuntimeError as error:
            told = " ".join(" ".join(str(error).splitlines()[1:]).split())[:500]
            raise ValueError(f"keys or shapes do not fit the sizes that the others imply: {told}") from error
        return config


class ResBlock(nn.Module):
    """norm, swish, 3x3 convolution, twice, around a skip that is 1x1 convolved where channels change."""

    def __init__(self, in_ch: int, out_ch: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_ch, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_ch, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a skip."""

    def __init__(self, ch: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, ch, eps=NORM_EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(ch, ch, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


def _chain(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _middle(ch: int, attn: bool, groups: int) -> nn.Sequential:
    attention = {"attn_1": AttnBlock(ch, groups)} if attn else {}
    return _chain(block_1=ResBlock(ch, ch, groups), **attention, block_2=ResBlock(ch, ch, groups))


class Level(nn.Module):
    """The residual blocks of one resolution, then the step to the next one. Identities leave no keys."""

    def __init__(self, in_ch: int, ch: int, blocks: int, attn: bool, groups: int, *, down=False, up=False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(ch if i else in_ch, ch, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(ch, groups) if attn else nn.Identity() for _ in range(blocks))
        self.downsample = self.upsample = nn.Identity()
        if down:  # padded right and bottom only
            self.downsample = _chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(ch, ch, 3, stride=2))
        if up:
            self.upsample = _chain(nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(ch, ch, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """pixels_BCHW -> z_BKhw, before quantization."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        groups, bits, ins = config.norm_groups, config.codebook_bits, (config.encoder_ch, *config.encoder_channels)
        self.conv_in = nn.Conv2d(config.image_channels, config.encoder_ch, 3, padding=1)
        blocks, attn_levels = config.encoder_num_res_blocks, config.encoder_attn_levels
        self.down = nn.ModuleList(
            Level(ins[i], ch, blocks[i], i in attn_levels, groups, down=i < config.num_levels - 1)
            for i, ch in enumerate(config.encoder_channels)
        )
        self.mid = _middle(ins[-1], config.encoder_mid_attn, groups)
        self.norm_out = nn.GroupNorm(groups, ins[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(ins[-1], bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x = self.conv_in(pixels_BCHW.contiguous(memory_format=torch.channels_last))  # a tenth faster to train on a CPU
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x))))).contiguous()


class Decoder(nn.Module):
    """q_BKhw of +-1 (or in between) -> pixels_BCHW. `up` is indexed by level and runs from the last to 0."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        groups, bits, outs = config.norm_groups, config.codebook_bits, config.decoder_channels
        ins = (*outs[1:], outs[-1])
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, outs[-1], 3, padding=1)
        self.mid = _middle(outs[-1], config.decoder_mid_attn, groups)
        blocks, attn_levels = config.decoder_num_res_blocks, config.decoder_attn_levels
        self.up = nn.ModuleList(
            Level(ins[i], ch, blocks[i], i in attn_levels, groups, up=i > 0) for i, ch in enumerate(outs)
        )
        self.norm_out = nn.GroupNorm(groups, outs[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(outs[0], config.image_channels, 3, padding=1)

    def forward(self, q_BKhw: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(q_BKhw.to(self.conv_in.weight.dtype))))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x))).contiguous()


class LookupFreeQuantizer(nn.Module):
    """One bit per channel: +1 where z > 0, else -1 (so 0 gives -1). Channel 0 is the most significant bit of a token.

    The two buffers follow from the number of bits; they are written with the weights, as the official files hold them,
    and on loading may be absent, but not different.
    """

    embedding: Tensor
    power_vals: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        for name, value in self._tables().items():
            self.register_buffer(name, value)
        self.register_load_state_dict_pre_hook(_complete_tables)

    def _tables(self) -> dict[str, Tensor]:
        powers_K = 2 ** torch.arange(self.bits - 1, -1, -1)
        set_VK = (torch.arange(2**self.bits)[:, None] & powers_K) > 0
        return {"embedding": set_VK.float() * 2 - 1, "power_vals": powers_K}

    def forward(self, z_BKhw: Tensor) -> Tensor:
        """Code vectors of +-1, [B, K, h, w]; the gradient passes to z unchanged (straight-through)."""
        return _straight_through(z_BKhw)

    def tokens(self, z_BKhw: Tensor) -> Tensor:
        """int64 tokens [B, h * w], row-major, of latents or code vectors."""
        return ((z_BKhw > 0) * self.power_vals[:, None, None]).sum(dim=1).flatten(1)

    def lookup(self, tokens_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Code vectors [B, K, h, w] of +-1. ValueError for what is no [B, N] of codes or does not fit the grid."""
        if tokens_BN.ndim != 2 or tokens_BN.is_floating_point():
            raise ValueError(f"tokens are integers [B, N]; got {tokens_BN.dtype} {tuple(tokens_BN.shape)}")
        low, high = (int(end) for end in tokens_BN.aminmax()) if tokens_BN.numel() else (0, 0)
        if low < 0 or high >= len(self.embedding):
            raise ValueError(f"tokens {low}..{high} exceed codes 0..{len(self.embedding) - 1}: mask or offset left?")
        return _to_grid(F.embedding(tokens_BN, self.embedding), grid)

    def soft_lookup(self, onehots_BNV: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Expected code vectors [B, K, h, w] under probabilities over codes; differentiable."""
        if onehots_BNV.ndim != 3 or onehots_BNV.shape[-1] != len(self.embedding):
            raise ValueError(f"one-hots are [B, N, {len(self.embedding)}]; got {tuple(onehots_BNV.shape)}")
        return _to_grid(onehots_BNV @ self.embedding.to(onehots_BNV.dtype), grid)


def _complete_tables(quantizer: LookupFreeQuantizer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, table in quantizer._tables().items():
        given = state_dict.setdefault(prefix + name, table)
        if given.shape == table.shape and not given.is_meta and not torch.equal(given.to(table), table):
            raise ValueError(f"{prefix}{name} is not the table of {quantizer.bits} bits, most significant bit first")


def _straight_through(z: Tensor) -> Tensor:
    return torch.where(z > 0, 1.0, -1.0).to(z.dtype) + (z - z.detach())


def _to_grid(codes_BNK: Tensor, grid: tuple[int, int] | None) -> Tensor:
    count = codes_BNK.shape[1]
    h, w = grid or (math.isqrt(count), math.isqrt(count))
    if h < 1 or w < 1 or h * w != count:
        raise ValueError(f"{count} tokens do not fill a grid of {h} x {w}; give grid=(rows, columns) that fits")
    return codes_BNK.unflatten(1, (h, w)).permute(0, 3, 1, 2)


def quantizer_losses(z_BKhw: Tensor, *, beta: float = 0.25, weight: float = 0.1) -> tuple[Tensor, Tensor]:
    """(quantizer_loss, entropy_loss): scalars to add to a reconstruction loss; each bit on its own, weights as Show-o.

    quantizer_loss draws z to its +-1: the value is (1 + beta) times the squared distance; since the second of its two
    terms sees z through the straight-through code vector, the gradient is (1 - beta) times that of the distance.
    entropy_loss (nats) wants each bit sure, P(bit) = softmax of -(z -+ 1)^2 = sigmoid(4 z), and all bits balanced.
    """
    z_MK = z_BKhw.movedim(1, -1).flatten(0, -2).float()
    q_MK = _straight_through(z_MK)
    commit = F.mse_loss(z_MK, q_MK.detach()) + beta * F.mse_loss(q_MK, z_MK.detach())
    logits_MK = 4 * z_MK
    # H(sigmoid(x)) = softplus(x) - x sigmoid(x): finite with finite gradients however sure the bit is.
    entropy = (F.softplus(logits_MK) - logits_MK * logits_MK.sigmoid()).mean()
    eps = torch.finfo(torch.float32).eps  # a bit that is sure everywhere would have an infinite gradient
    mean_K = logits_MK.sigmoid().mean(0).clamp(eps, 1 - eps)
    entropy_of_mean = (torch.special.entr(mean_K) + torch.special.entr(1 - mean_K)).mean()
    return weight * commit, weight * (entropy - entropy_of_mean)


class Magvit(nn.Module):
    """The tokenizer; official parameter names. `quantize(z)` is the straight-through quantizer.

    Example: magvit = Magvit.from_state_dict(load_file("magvitv2.safetensors")); tokens_BN = magvit.encode(pixels_BCHW)
    """

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = LookupFreeQuantizer(config.codebook_bits)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], *, norm_groups: int = 32) -> Magvit:
        """A float32 model on the CPU with a copy of the weights; errors as `MagvitConfig.from_state_dict`."""
        config = MagvitConfig.from_state_dict(state_dict, norm_groups=norm_groups)
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        model.load_state_dict(state_dict)
        return model

    def code_table(self) -> Tensor:
        """[V, K] of +-1: row v is the code vector of token v."""
        return self.quantize.embedding

    def encode_latents(self, pixels_BCHW: Tensor) -> Tensor:
        """z [B, K, h, w] before quantization, of pixels in -1..1. ValueError if sides are no multiple of the patch."""
        channels, patch = self.config.image_channels, self.config.patch_size
        if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1] != channels or any(s % patch for s in pixels_BCHW.shape[2:]):
            given = tuple(pixels_BCHW.shape)
            raise ValueError(f"pixels are [B, {channels}, H, W] with H and W multiples of {patch}; got {given}")
        return self.encoder(pixels_BCHW)

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """int64 tokens [B, N], row-major, of pixels in -1..1. Errors as `encode_latents`."""
        return self.quantize.tokens(self.encode_latents(pixels_BCHW))

    def decode(self, tokens_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Pixels [B, C, H, W], about -1..1. `grid` is (rows, columns), by default square; ValueError if unfit."""
        return self.decoder(self.quantize.lookup(tokens_BN, grid))

    def decode_onehots(self, onehots_BNV: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """As `decode`, of probabilities over codes (times the code table): differentiable, equal on one-hot rows."""
        return self.decoder(self.quantize.soft_lookup(onehots_BNV, grid))

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstructed pixels, z) for training: gradients reach the encoder through the quantizer."""
        z_BKhw = self.encode_latents(pixels_BCHW)
        return self.decoder(self.quantize(z_BKhw)), z_BKhw


def preprocess(image: Image.Image, size: int) -> Tensor:
    """PIL image of any mode -> float32 pixels [3, size, size] in -1..1: short side to `size` (bicubic), centre crop.

    Source: Show-o's image transform; roundings are those of torchvision's Resize and CenterCrop.
    """
    short = min(image.size)
    scaled = tuple(size if side == short else size * side // short for side in image.size)
    resized = image.convert("RGB").resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in scaled)
    pixels_HWC = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels_HWC / 255).sub(0.5).div(0.5).permute(2, 0, 1).contiguous()


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in -1..1, any layout -> uint8 0..255 of the same shape; cut off, not rounded, as Show-o does."""
    return (((pixels.detach().float() + 1) / 2).clamp(0, 1) * 255).to(torch.uint8)
