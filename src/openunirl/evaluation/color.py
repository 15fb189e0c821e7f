"""Names the colour of detected objects: CLIP, asked as GenEval asks it.

    picture, detections, class name -> crops, background grey -> CLIP -> nearest of 10 colour prompts -> color names

In: pictures and Detections, a CLIP checkpoint in transformers' layout (GenEval: OpenAI's ViT-L/14). Out: one of COLORS
for each detection. float32 and without TF32.

Sources: GenEval (Ghosh et al. 2023, arXiv 2310.11513); clip-benchmark 1.4 (templates averaged after normalising);
open_clip 2.20 (resize and crop).

Departures:
1. float32; officially CUDA's float16 autocast, so that near ties may differ.
2. Resize and crop are written out: transformers' CLIP processor crops one pixel elsewhere where the margin is odd.

Shapes: K detections, C colours, M templates, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from openunirl.evaluation.weights import full_precision, load_whole, pretrained, read_config
from openunirl.tasks.geneval import COLORS
from openunirl.types import Detection

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BLANK = (0x99, 0x99, 0x99)  # what is not the object
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)

_APART = 1e-3
"""Logits of which the largest and the smallest are nearer tell no colour: float32 alone moves them by 1e-5."""


def square(picture: Image.Image, side: int) -> Image.Image:
    """The short side becomes `side`, then the middle square is cut out: a long object loses its ends."""
    width, height = picture.size
    if width <= height:
        size = side, int(side * height / width)
    else:
        size = int(side * width / height), side
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)  # halves to the even number
    return picture.crop((left, top, left + side, top + side))


def cut_out(image: np.ndarray, detection: Detection) -> Image.Image:
    """The object's box of a uint8 RGB picture [H, W, 3], other things in it greyed out where there is a mask.

    ValueError for a box without area and for a mask of another size than the picture.
    """
    x0, y0, x1, y1 = (round(side) for side in detection.box)
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"{detection} has a box without area, so it has no color: leave such detections out")
    picture = Image.fromarray(image)
    if detection.mask is not None:
        if detection.mask.shape != image.shape[:2]:
            raise ValueError(f"a mask of shape {detection.mask.shape} for a picture of shape {image.shape}")
        picture = Image.composite(picture, Image.new("RGB", picture.size, BLANK), Image.fromarray(detection.mask))
    return picture.crop((x0, y0, x1, y1))


def to_clip(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Square pictures -> float32 [K, 3, side, side], normalised as CLIP was trained."""
    pixels_K3HW = torch.from_numpy(np.stack([np.array(each) for each in pictures])).permute(0, 3, 1, 2).float() / 255
    mean_311, std_311 = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels_K3HW - mean_311) / std_311


def read_parts(weights: str) -> tuple[Any, Any]:
    """The configuration and the tokenizer, without the network. Errors: ValueError for what is no CLIP, and for a
    tokenizer that is damaged or of another network."""
    config = read_config(weights, "clip")
    tokenizer = pretrained(AutoTokenizer, weights)
    known, wanted = len(tokenizer), config.text_config.vocab_size
    if known != wanted:  # without its files, transformers makes a tokenizer that knows no words
        raise ValueError(
            f"{weights}: the tokenizer knows {known} tokens and the network {wanted}; add the checkpoint's own "
            "vocab.json and merges.txt, or tokenizer.json"
        )
    highest = max(tokenizer.get_vocab().values())
    if highest >= wanted:
        raise ValueError(
            f"{weights}: the tokenizer has the id {highest}, and the network's end at {wanted - 1}; its vocab.json or "
            "tokenizer.json is damaged: download it again"
        )
    _check_words(tokenizer, weights)
    return config, tokenizer


def _tokens(tokenizer: Any, texts: Sequence[str], weights: str, **options: Any) -> Any:
    """tokenizer(texts). Errors: ValueError where it cannot, of damaged files that could be read."""
    try:
        return tokenizer(list(texts), **options)
    except Exception as error:  # whatever a value of another kind leads to
        raise ValueError(
            f"{weights}: the tokenizer cannot read {texts[0]!r} ({type(error).__name__}); its tokenizer_config.json or "
            "other files are damaged: download them again"
        ) from None


def _check_words(tokenizer: Any, weights: str) -> None:
    """Errors: ValueError where a colour that is one token of the vocabulary is read as several: merges.txt was cut
    off, say in a download, and the network would be asked about pieces it hardly knows."""
    vocabulary = tokenizer.get_vocab()
    for color in COLORS:
        whole = vocabulary.get(f"{color}</w>")
        if whole is not None and _tokens(tokenizer, [color], weights, add_special_tokens=False).input_ids[0] != [whole]:
            raise ValueError(
                f"{weights}: the tokenizer splits {color!r}, which its vocabulary holds as one token; its "
                "merges.txt (or tokenizer.json) is damaged or cut off: download it again"
            )


class ClipColors:
    """The ColorClassifier for photographs. Example: ClipColors("path").colors(image, [detection], "bus") -> ["red"]"""

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        """`weights`: a folder or a hub id. ValueError where it holds anything but a whole CLIP with its tokenizer."""
        self.weights = weights
        config, self.tokenizer = read_parts(weights)
        self.net = load_whole(CLIPModel, weights).to(torch.device(device))
        self.side: int = config.vision_config.image_size
        self._known: dict[str, torch.Tensor] = {}

    def colors(self, image: np.ndarray, detections: Sequence[Detection], classname: str) -> list[str]:
        """One of COLORS for each detection of `classname` (spelt as GenEval does) in the uint8 RGB picture."""
        if not detections:
            return []
        pixels_K3HW = to_clip([square(cut_out(image, each), self.side) for each in detections])
        with torch.inference_mode(), full_precision():
            told = self.net.get_image_features(pixel_values=pixels_K3HW.to(self.net.device))
            logits_KC = 100 * F.normalize(_features(told), dim=-1) @ self.prototypes(classname).T
        if not logits_KC.isfinite().all():
            raise ValueError(f"the color classifier's scores for {classname!r} are not finite: its weights are damaged")
        if ((logits_KC.amax(1) - logits_KC.amin(1)) < _APART).any():
            raise ValueError(
                f"the color classifier's scores for {classname!r} are equal for all {len(COLORS)} colors: its weights "
                "are damaged"
            )
        return [COLORS[index] for index in logits_KC.argmax(1).tolist()]

    def prototypes(self, classname: str) -> torch.Tensor:
        """[C, D]: for each colour the normalised mean of its normalised prompts' features; kept for the next time."""
        if classname not in self._known:
            prompts = [template.format(color=color, name=classname) for color in COLORS for template in TEMPLATES]
            tokens = _tokens(self.tokenizer, prompts, self.weights, padding=True, return_tensors="pt")
            tokens = tokens.to(self.net.device)
            with torch.inference_mode(), full_precision():
                told = self.net.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
                features_CMD = F.normalize(_features(told), dim=-1).view(len(COLORS), len(TEMPLATES), -1)
                self._known[classname] = F.normalize(features_CMD.mean(1), dim=-1)
        return self._known[classname]


def _features(told: torch.Tensor | object) -> torch.Tensor:
    """transformers 5 returns an output object, 4 the projected features themselves."""
    features = told if isinstance(told, torch.Tensor) else told.pooler_output  # pyright: ignore[reportAttributeAccessIssue]
    return features
