"""Randomness that does not depend on batching: every number is a pure function of a key.

In: integer keys, one for each sample, made from (seed, step, prompt index, sample index). Out: uniforms in (0, 1).
The same image therefore comes out alone, in a batch, on one process or on eight. The generator is the 64-bit
finaliser of SplitMix64 (Steele et al., 2014) used as a counter-based hash, in int64 arithmetic that wraps.

Shapes: B samples, N positions, V codes.
"""

from __future__ import annotations

from typing import Protocol

import torch

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MULTIPLY_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical (unsigned) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64 finaliser: int64 -> int64, any shape."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


def key(*parts: int | torch.Tensor) -> torch.Tensor:
    """Folds integers (or broadcastable int64 tensors) into one int64 key, on the accelerator where a part lies there.
    Order matters; key(1, 2) != key(2, 1)."""
    devices = [part.device for part in parts if isinstance(part, torch.Tensor)]
    device = next((each for each in devices if each.type != "cpu"), torch.device("cpu"))
    folded = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        folded = mix(folded ^ mix(torch.as_tensor(part, dtype=torch.int64, device=device)))
    return folded


def uniforms(keys_B: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """[B] keys -> [B, count] float32 uniforms, strictly inside (0, 1). `stream` separates independent uses of a key."""
    return uniforms_at(keys_B, stream, torch.arange(count, dtype=torch.int64, device=keys_B.device)[None])


def uniforms_at(keys_B: torch.Tensor, stream: int, at_BN: torch.Tensor) -> torch.Tensor:
    """[B, N]: those numbers of `uniforms` that stand at the places at_BN, [B or 1, N]."""
    bits = mix(key(keys_B, stream)[:, None] ^ mix(at_BN.to(keys_B.device) + 1))
    return (_shift_right(bits, 41).float() + 0.5) * 2.0**-23


class Scoring:
    """The streams of an image's scoring seed (`Rollout.scoring_seeds_B`), all in one place: no two uses share one.

    Example: key(rollout.scoring_seeds_B, Scoring.FROZEN_JUDGE, 0)
    """

    STEPS = 1  # which steps of the trajectory are scored
    MASKS = 4  # of the first random mask; the d-th has MASKS + d, so nothing else lies between here and RELAXATION
    RELAXATION = 101  # Gumbel noise
    FROZEN_JUDGE = -1  # its answers; negative: whatever is added to a mask's, it does not get there
    SHUFFLED_IMAGES = -2  # the control: which image's rewards,
    SHUFFLED_ANSWERS = -3  # which answer's,
    SHUFFLED_TARGETS = -4  # and which question and gold answer


class Draws(Protocol):
    """A source of randomness for one batch of samples."""

    everywhere: bool
    """Whether it must draw at every position, known ones too, because each draw changes what follows."""

    def tokens(self, step: int, probs_BNV: torch.Tensor, at_BN: torch.Tensor | None = None) -> torch.Tensor:
        """One draw from each row of `probs_BNV` -> int64 [B, N]. at_BN: their positions, where they are not 0..N-1;
        never given to a source that draws everywhere."""
        ...

    def uniform(self, step: int, count: int) -> torch.Tensor:
        """[B, count] uniforms for this step."""
        ...


class KeyedDraws:
    """The default source: inverse-CDF sampling on keyed uniforms."""

    everywhere = False

    def __init__(self, keys_B: torch.Tensor) -> None:
        self.keys_B = keys_B

    def tokens(self, step: int, probs_BNV: torch.Tensor, at_BN: torch.Tensor | None = None) -> torch.Tensor:
        at_N = torch.arange(probs_BNV.shape[1], device=self.keys_B.device)
        u_BN = uniforms_at(self.keys_B, 2 * step, at_N[None] if at_BN is None else at_BN).to(probs_BNV.device)
        wide = torch.float32 if probs_BNV.device.type == "mps" else torch.float64  # MPS has no float64
        cdf_BNV = probs_BNV.to(wide).cumsum(-1)
        target_BN1 = (u_BN.to(wide) * cdf_BNV[..., -1])[..., None]
        # searchsorted never lands on a code of zero probability: its cdf equals the one before it.
        return torch.searchsorted(cdf_BNV, target_BN1, right=True)[..., 0].clamp_(max=probs_BNV.shape[-1] - 1)

    def uniform(self, step: int, count: int) -> torch.Tensor:
        return uniforms(self.keys_B, 2 * step + 1, count)


class GeneratorDraws:
    """The official samplers' draw order on one torch.Generator: a multinomial, then a uniform, at every step."""

    everywhere = True

    def __init__(self, generator: torch.Generator, batch: int) -> None:
        self.generator, self.batch = generator, batch

    def tokens(self, step: int, probs_BNV: torch.Tensor, at_BN: torch.Tensor | None = None) -> torch.Tensor:
        assert at_BN is None, "torch's generator draws for all positions or for none"
        flat = probs_BNV.reshape(-1, probs_BNV.shape[-1])
        return torch.multinomial(flat, 1, generator=self.generator)[:, 0].view(probs_BNV.shape[:2])

    def uniform(self, step: int, count: int) -> torch.Tensor:
        return torch.zeros(self.batch, count, device=self.generator.device).uniform_(0, 1, generator=self.generator)
