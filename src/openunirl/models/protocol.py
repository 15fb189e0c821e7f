"""The model boundary: everything above it is blind to the family.

A family implements `UnifiedModel`; `MODELS` says where each one is. The adapter is not an nn.Module: `net` holds all
that is trained, wrapped and sharded, and it is only ever called as `self.net(...)`.

Shapes: B images, Q questions, N image tokens, T answer tokens, V codes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import nn

from openunirl.config import LoraConfig, ModelConfig
from openunirl.models.checkpoints import read_config, resolve
from openunirl.models.masked import Estimator
from openunirl.presets import bundled
from openunirl.relaxation import Relaxation
from openunirl.types import (
    AnswerRollout,
    AnswerSampling,
    AnswerScores,
    ImageQuestion,
    ImageRollout,
    Images,
    ImageSampling,
    ImageScores,
    ScorePass,
)

MODELS = {
    "showo": "openunirl.models.showo:Showo",
    "janus": "openunirl.models.janus:Janus",
}

MODEL_TYPES = {"janus": "janus", "multi_modality": "janus"}
"""What config.json calls a family in transformers' layout and in its authors' own."""

Support = Literal["text", "full"]


@dataclass(frozen=True, kw_only=True)
class PretrainBatch:
    """What a family is trained on from nothing.

    `prompts` with `drawn` (one image each; seeds_B keys its masks; an empty prompt trains the unconditional branch;
    without any the drawing loss is 0);
    `asked` images with `questions` on them and their gold `answers`. With a `teacher`, the drawing loss is the
    cross-entropy to the frozen base's own guided, temperature-scaled policy instead of to the tokens (guidance
    distillation, arXiv 2210.03142): afterwards one unguided forward draws as two guided ones did.
    """

    prompts: tuple[str, ...]
    drawn: Images
    seeds_B: torch.Tensor
    asked: Images
    questions: tuple[ImageQuestion, ...]
    answers: tuple[str, ...]
    teacher: ImageSampling | None = None


class UnifiedModel(Protocol):
    """One set of weights that draws and answers."""

    net: nn.Module
    reference_net: nn.Module | None  # set by freeze_reference
    num_codes: int  # V
    num_image_tokens: int  # N
    base_moved: bool  # whether the frozen base is no longer the model that was loaded

    @property
    def trunk(self) -> str:
        """The dotted name, in `net`, of what holds the decoder's `layers`."""
        ...

    @property
    def draws_tokens_in_turn(self) -> bool:
        """Whether drawing takes a pass for each image token, and not for each of `num_timesteps`."""
        ...

    @property
    def image_tokenizer(self) -> nn.Module:
        """Frozen, save while `pretrain` trains it."""
        ...

    def sample_images(self, prompts: Sequence[str], seeds_B: torch.Tensor, sampling: ImageSampling) -> ImageRollout:
        """One image per prompt; equal prompts share their prefix. Errors: ValueError for a prompt that does not fit."""
        ...

    def scoring_passes(self, rollout: ImageRollout, estimator: Estimator, seeds_B: torch.Tensor) -> list[ScorePass]:
        """Masks, steps and weights, drawn once; reused by the policy, the old policy and the reference."""
        ...

    def score_images(
        self,
        rollout: ImageRollout,
        scoring_pass: ScorePass,
        *,
        logprob_guidance: bool = True,
        relax: Relaxation | None = None,
    ) -> ImageScores:
        """Log-probs and entropy of the scored tokens under the acting policy (guided, temperature-scaled); with `relax`
        also their relaxed one-hots."""
        ...

    def sample_answers(
        self, images: Images, questions: Sequence[ImageQuestion], seeds_Q: torch.Tensor, sampling: AnswerSampling
    ) -> AnswerRollout:
        """One answer per question; the questions on one image share its prefix."""
        ...

    def score_answers(
        self,
        images: Images,
        questions: Sequence[ImageQuestion],
        answers: AnswerRollout | Sequence[str],
        *,
        support: Support = "text",
        temperature: float = 1.0,
    ) -> AnswerScores:
        """Log-probs of sampled answers, or of given texts (their end token included); over text ids or the
        vocabulary."""
        ...

    def freeze_unlearned(self) -> None:
        """Trains nothing that is not to be learned in self-improvement; what makes a frozen base does so by itself."""
        ...

    def freeze_reference(self, *, dtype: torch.dtype | None = None, rests_on: torch.device | None = None) -> None:
        """Makes the present weights the frozen base that `reference()` scores with: a copy, in its own dtype and with
        a device to rest on where these are given."""
        ...

    def sync_reference(self) -> None:
        """The policy's present weights become the frozen base's."""
        ...

    def blend_with_base(self, alpha: float, read_base: Callable[[], Any]) -> None:
        """The policy becomes the base plus `alpha` of what training added to it; `read_base` reads the model that
        training began with."""
        ...

    def save_reference(self, path: Path) -> None:
        """Writes the frozen base's weights, if the base has moved."""
        ...

    def load_reference(self, path: Path) -> None:
        """Reads what `save_reference` wrote there, if anything."""
        ...

    def add_adapters(self, config: LoraConfig, seed: int) -> None:
        """Freezes the present weights and trains adapters instead; the frozen base is the network without them."""
        ...

    def rest(self) -> None:
        """Sends the copy of the base to where it rests."""
        ...

    def compile_layers(self, backend: str = "inductor") -> None:
        """From here on torch.compile runs the decoder's layers, where no cache is filled."""
        ...

    def recompute_activations(self) -> None:
        """Gradient checkpointing of the decoder's layers."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside it the same calls score the frozen base."""
        ...

    def decode(self, images: Images) -> torch.Tensor:
        """[B, 3, H, W] float in 0..1."""
        ...

    def encode(self, pixels_BCHW: torch.Tensor) -> Images:
        """Pictures in 0..1, for understanding."""
        ...

    def tokenize(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Pictures in 0..1 -> int64 [B, N] codes: the targets of drawing."""
        ...

    def read_pictures(self, pictures: Sequence[Image.Image]) -> Images:
        """Pictures of any size and mode, scaled and cropped as the family's official code does, for understanding."""
        ...

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """ValueError naming the first prompt that does not fit the text length."""
        ...

    def check_sampling(self, sampling: ImageSampling) -> None:
        """ValueError for a sampling that cannot be followed."""
        ...

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        """The words that the text tokenizer has no ids for, in order of appearance."""
        ...

    def tokenizer_loss(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Training loss of the image tokenizer on pictures in 0..1."""
        ...

    def settle_tokenizer(self, pixels_BCHW: torch.Tensor) -> None:
        """Once, at the end of its training: makes codes stable on pictures like these, where the family can."""
        ...

    def pretrain_loss(self, batch: PretrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(drawing loss, answering loss), means over tokens."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> UnifiedModel:
        """Moves the network and the image tokenizer; `dtype` is then the network's."""
        ...

    def load_weights(self, path: Path) -> None:
        """Replaces what is trained by what is in a folder that `save` wrote."""
        ...

    def save(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """Writes a folder that `load_model` reads, adapters merged."""
        ...


def load_model(source: ModelConfig | str | Path) -> UnifiedModel:
    """Loads a bundled model by name, or any checkpoint: ours is one folder, an official one names its parts apart.

    Errors: ValueError for a source that is not there, of an unknown family, or whose weights do not fit.
    """
    source = source if isinstance(source, ModelConfig) else ModelConfig(weights=str(source))
    path = resolve(bundled(source.weights) or source.weights)
    config = read_config(path)
    named = config.get("family") or MODEL_TYPES.get(str(config.get("model_type", "")))
    family = source.family or named or str(config.get("_class_name", "")).lower() or None
    if not isinstance(family, str) or family not in MODELS:
        raise ValueError(
            f"{source.weights}: unknown model family {family!r:.80}; say which with --model.family "
            f"({', '.join(MODELS)})"
        )
    module, _, name = MODELS[family].partition(":")
    return getattr(importlib.import_module(module), name).load(path, source)
