"""The image tokenizer of Janus: transformers' copy of LlamaGen's VQ-16, with unit-length codes in both directions.

In: pixels in 0..1, code ids, or one-hots over codes. Out: code ids, or pixels in 0..1. Stored weights stay as they are.
Source: LlamaGen (arXiv 2406.06525) for the quantiser and its losses; deepseek-ai/Janus for the unit length.

Departures from transformers' JanusVQVAE: 1. the nearest code is sought among unit-length codes, as officially (its own
search takes the stored length and picks other codes); 2. any picture whose sides are multiples of the patch size is
taken, not one fixed grid; 3. one-hots are decoded too, differentiably; 4. no adversarial and no perceptual loss.

Shapes: B images, N tokens (row-major), V codes, E code width, H height, W width; h, w the token grid.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from transformers import JanusVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

MERGED = 0.96  # cosine above which two codes are taken for one: oracle right on all of 600 reconstructions
COMMITMENT = 0.25  # weight of pulling latents to codes, against pulling codes to latents: LlamaGen's beta


class JanusVQ(JanusVQVAE):
    """State-dict keys are those of `model.vqmodel` in transformers' checkpoint."""

    def __init__(self, config: JanusVQVAEConfig) -> None:
        super().__init__(config)
        self.num_codes: int = config.num_embeddings
        self.patch_size: int = 2 ** (len(config.channel_multiplier) - 1)

    def unit_codes(self) -> torch.Tensor:
        """[V, E], each row of length 1."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def latents(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, E, h, w] of length 1 along E, before quantisation. Errors: ValueError for sides that make no grid."""
        height, width = pixels_BCHW.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"pictures of {height}x{width} pixels: both sides must be multiples of {self.patch_size}")
        return F.normalize(self.quant_conv(self.encoder(pixels_BCHW * 2 - 1)), dim=1)

    def tokenize(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Pictures in 0..1 -> int64 [B, N]."""
        latents_BEhw = self.latents(pixels_BCHW)
        # among vectors of length 1 the nearest is the one with the largest product
        return self._similarity(latents_BEhw).argmax(-1)

    def decode_tokens(self, tokens_BN: torch.Tensor) -> torch.Tensor:
        """Code ids of a square image -> pixels [B, 3, H, W] in 0..1."""
        return self._decode(F.embedding(tokens_BN, self.unit_codes()))

    def decode_onehots(self, onehots_BNV: torch.Tensor) -> torch.Tensor:
        """One-hots (or any mixture of codes) -> pixels in 0..1, differentiable. A channel that the decoder puts outside
        0..1 is cut off there, as in the picture that is seen, and passes no gradient on."""
        with torch.autocast(onehots_BNV.device.type, enabled=False):  # a one-hot must give its code unrounded
            codes_VE = self.unit_codes()
            codes_BNE = (onehots_BNV @ codes_VE.to(onehots_BNV.dtype)).to(codes_VE.dtype)
        return self._decode(codes_BNE)

    def loss(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """L1 and L2 of the reconstruction, plus codebook and commitment terms; straight-through past the quantiser."""
        latents_BEhw = self.latents(pixels_BCHW)
        grid = latents_BEhw.shape[2:]
        nearest_BN = self._similarity(latents_BEhw).argmax(-1)
        codes_BEhw = F.embedding(nearest_BN, self.unit_codes()).transpose(1, 2).unflatten(2, grid)
        passed_BEhw = latents_BEhw + (codes_BEhw - latents_BEhw).detach()
        error_BCHW = 2 * (self._pixels(passed_BEhw) - pixels_BCHW)  # pixels count from -1 to 1, as LlamaGen's do
        codebook = F.mse_loss(codes_BEhw, latents_BEhw.detach())
        commitment = F.mse_loss(latents_BEhw, codes_BEhw.detach())
        return error_BCHW.abs().mean() + error_BCHW.square().mean() + codebook + COMMITMENT * commitment

    @torch.no_grad()
    def merge_codes(self, pixels_BCHW: torch.Tensor, above: float = MERGED) -> int:
        """Gives codes that lie within a cosine of `above` of a more frequent one that one's vector; returns how many.

        Training leaves many codes for what is most frequent, here a background; which of them a picture gets is noise,
        that a model of tokens would have to learn. The first of equal codes is chosen, so the others fall idle.
        """
        codes_VE = self.unit_codes()
        uses = self.tokenize(pixels_BCHW).flatten().bincount(minlength=self.num_codes)
        similar: list[list[float]] = (codes_VE @ codes_VE.T).tolist()
        kept: list[int] = []
        stands_for = list(range(self.num_codes))
        for code in uses.argsort(descending=True, stable=True).tolist():
            nearest = max(kept, key=similar[code].__getitem__, default=code)
            if nearest != code and similar[code][nearest] > above:
                stands_for[code] = nearest
            else:
                kept.append(code)
        weight = self.quantize.embedding.weight
        weight.copy_(weight[stands_for].clone())
        return self.num_codes - len(kept)

    def _similarity(self, latents_BEhw: torch.Tensor) -> torch.Tensor:
        """[B, N, V], in full precision even inside autocast: codes lie closer together than bfloat16 can tell."""
        with torch.autocast(latents_BEhw.device.type, enabled=False):
            codes_VE = self.unit_codes()
            return latents_BEhw.flatten(2).transpose(1, 2).to(codes_VE.dtype) @ codes_VE.T

    def _decode(self, codes_BNE: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(codes_BNE.shape[1])
        if side * side != codes_BNE.shape[1]:
            raise ValueError(f"{codes_BNE.shape[1]} tokens make no square image")
        return self._pixels(codes_BNE.transpose(1, 2).unflatten(2, (side, side))).clamp(0, 1)

    def _pixels(self, codes_BEhw: torch.Tensor) -> torch.Tensor:
        return (self.decoder(self.post_quant_conv(codes_BEhw)).to(codes_BEhw.dtype) + 1) / 2
