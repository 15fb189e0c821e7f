"""Finds COCO's 80 things in photographs: Mask2Former, run as GenEval's mmdet runs it.

    uint8 [H, W, 3] -> prepare -> pixels_3HW -> Mask2Former -> class_QC, mask_Qhw -> instances -> name -> Detections

In: pictures, a Mask2Former checkpoint in transformers' layout (80 classes in COCO's order). Out: for each picture the
Detections before any threshold. Everything is float32 and without TF32, so that a verdict does not depend on the GPU.

Sources: mmdet 2.28 (its Mask2Former config's test pipeline and instance post-processing), which GenEval (Ghosh et al.
2023, arXiv 2310.11513) calls; Mask2Former (Cheng et al. 2022, arXiv 2112.01527) as transformers has it.

Departures:
1. Classes are mapped by index: the checkpoint's own names differ from GenEval's in nine places ("tv remote": "remote").
2. transformers' image processor and post_process_instance_segmentation are not used: they stretch instead of pad, score
   masks at 384x384 and drop what GenEval needs.
3. Enlarging and shrinking is torch's bilinear without antialias, rounded: within one grey level of cv2's.
4. Equal scores come in the order of queries and classes; mmdet leaves their order open.
5. Meta's weights are not mmdet's own training of the same network: scores near a threshold differ.

Shapes: H, W pixels of a picture, h, w of a mask logit map; B pictures; Q queries, C classes; K instances; U queries
that have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerModel
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

from openunirl.evaluation.weights import full_precision, load_whole, read_config
from openunirl.tasks.geneval import GENEVAL_OBJECTS
from openunirl.types import Detection

SHORT_SIDE, LONG_SIDE = 800, 1333  # the short side becomes 800, unless the long one would exceed 1333
MULTIPLE = 32  # the network's coarsest stride
GREY = 128.0  # of the padding, before normalisation
MEAN = (123.675, 116.28, 103.53)  # ImageNet's, RGB
STD = (58.395, 57.12, 57.375)
MOST = 100  # instances of a picture

_PIXELS_AT_ONCE = 1 << 26  # of enlarged mask logits: 256 MB

Size = tuple[int, int]
"""(height, width)."""


# ---------------------------------------------------------------------------------------------- before the network


def resized(size: Size) -> Size:
    """The size at which the network sees a picture, padding not counted. Example: resized((512, 512)) -> (800, 800).

    ValueError for a picture so narrow that nothing would be left of its short side.
    """
    scale = min(LONG_SIDE / max(size), SHORT_SIDE / min(size))
    height, width = (int(side * scale + 0.5) for side in size)
    if not height or not width:
        raise ValueError(f"a picture of {size[1]}x{size[0]} pixels is too narrow for the detector: crop it")
    return height, width


def padded(size: Size) -> Size:
    """The next multiples of 32. Example: padded((800, 1242)) -> (800, 1248)."""
    height, width = (-(-side // MULTIPLE) * MULTIPLE for side in size)
    return height, width


def prepare(image: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 RGB [H, W, 3] -> float32 [3, h, w]: resized, padded right and below with grey, normalised."""
    inner = resized((image.shape[0], image.shape[1]))
    pixels_13HW = torch.tensor(image, device=device).permute(2, 0, 1)[None].float()
    pixels_13HW = F.interpolate(pixels_13HW, inner, mode="bilinear", align_corners=False).round()
    height, width = padded(inner)
    pixels_13HW = F.pad(pixels_13HW, (0, width - inner[1], 0, height - inner[0]), value=GREY)
    mean_311, std_311 = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels_13HW[0] - mean_311) / std_311


# ----------------------------------------------------------------------------------------------- after the network


@dataclass(frozen=True, kw_only=True)
class Instances:
    """The K instances of one picture, best score first. Boxes are (x0, y0, x1, y1) in pixels, exclusive end; the mask
    of instance k is masks_UHW[mask_K[k]].

    Example: Instances(class_K=[0], score_K=[0.9], box_K4=[[0, 0, 2, 2]], query_K=[7], mask_K=[0], masks_UHW=[...])
    """

    class_K: np.ndarray
    score_K: np.ndarray
    box_K4: np.ndarray
    query_K: np.ndarray
    mask_K: np.ndarray
    masks_UHW: np.ndarray = field(repr=False)


def instances(
    class_QC: torch.Tensor, mask_Qhw: torch.Tensor, *, inner: Size, original: Size, most: int = MOST
) -> Instances:
    """mmdet's instance post-processing.

    class_QC: logits over the classes and, last, "no object"; mask_Qhw: mask logits of the padded picture, at any size;
    `inner`: the resized picture without padding; `original`: the picture itself.
    A pair of query and class is an instance if its probability is among the `most` highest: one query may yield
    several, or none. score = probability * mean mask probability within the mask.
    """
    probability_QC = class_QC.softmax(-1)[:, :-1]
    classes = probability_QC.shape[1]
    pair_K = probability_QC.flatten().argsort(descending=True, stable=True)[:most]
    query_K, class_K = pair_K // classes, pair_K % classes
    query_U, mask_K = query_K.unique(return_inverse=True)
    masks_UHW, quality_U, box_U4 = _masks(mask_Qhw[query_U], inner, original)
    score_K = probability_QC.flatten()[pair_K] * quality_U[mask_K]
    found = [x.cpu().numpy() for x in (class_K, score_K, box_U4[mask_K], query_K, mask_K)]
    order_K = np.lexsort((found[0], found[3], -found[1]))
    class_k, score_k, box_k4, query_k, mask_k = (x[order_K] for x in found)
    return Instances(
        class_K=class_k,
        score_K=score_k,
        box_K4=box_k4,
        query_K=query_k,
        mask_K=mask_k,
        masks_UHW=masks_UHW.cpu().numpy(),
    )


def _masks(mask_Uhw: torch.Tensor, inner: Size, original: Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks bool [U, H, W] of the original picture, their quality [U] and boxes [U, 4]; a few at a time."""
    outer = padded(inner)
    at_once = max(1, _PIXELS_AT_ONCE // max(outer[0] * outer[1], original[0] * original[1]))
    parts = []
    for part_Uhw in mask_Uhw.split(at_once):
        logits_U1HW = F.interpolate(part_Uhw[:, None], outer, mode="bilinear", align_corners=False)
        logits_U1HW = logits_U1HW[..., : inner[0], : inner[1]]
        logits_UHW = F.interpolate(logits_U1HW, original, mode="bilinear", align_corners=False)[:, 0]
        inside_UHW = logits_UHW > 0
        inside_U = inside_UHW.sum((1, 2))
        quality_U = (logits_UHW.sigmoid() * inside_UHW).sum((1, 2)) / (inside_U + 1e-6)
        parts.append((inside_UHW, quality_U, boxes(inside_UHW)))
    masks_UHW, quality_U, box_U4 = (torch.cat(column) for column in zip(*parts, strict=True))
    return masks_UHW, quality_U, box_U4


def boxes(masks_UHW: torch.Tensor) -> torch.Tensor:
    """(x0, y0, x1, y1), exclusive end, of bool masks: float32 [U, 4]; zeros for an empty mask."""
    sides = []
    for used in (masks_UHW.any(1), masks_UHW.any(2)):
        first_U, from_end_U = used.int().argmax(1), used.flip(1).int().argmax(1)
        sides.append((first_U, (used.shape[1] - from_end_U) * used.any(1)))
    (x0, x1), (y0, y1) = sides
    return torch.stack((x0, y0, x1, y1), 1).float()


# ---------------------------------------------------------------------------------------------------- the network


class InstanceNet(Mask2FormerPreTrainedModel):
    """transformers' Mask2FormerForUniversalSegmentation without its training loss, which needs scipy; the same weight
    names. Returns (class_BQC, mask_BQhw)."""

    _keys_to_ignore_on_load_unexpected = [r"criterion\..*"]  # noqa: RUF012

    def __init__(self, config: Mask2FormerConfig):
        parts: Any = (config, config.backbone_config)
        for part in parts:
            part.return_dict = True  # `forward` asks by name, whatever a file says
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, len(config.id2label or ()) + 1)
        self.post_init()

    def forward(self, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(pixel_values=pixels_B3HW, output_hidden_states=True, return_dict=True)
        last_QBD = out.transformer_decoder_intermediate_states[-1]
        return self.class_predictor(last_QBD.transpose(0, 1)), out.masks_queries_logits[-1]


def check_detector(weights: str) -> None:
    """Reads the configuration only. Errors: ValueError where it is no Mask2Former of 80 classes."""
    classes = read_config(weights, "mask2former").num_labels
    if classes != len(GENEVAL_OBJECTS):
        raise ValueError(
            f"{weights} is of {classes} classes, not of COCO's {len(GENEVAL_OBJECTS)} things: take an instance "
            "segmentation checkpoint trained on COCO"
        )


class Mask2FormerDetector:
    """The Detector for photographs. Example: Mask2FormerDetector("path/to/checkpoint").detect([picture])[0]["dog"]"""

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        """`weights`: a folder or a hub id. ValueError where it holds anything but a whole Mask2Former of 80 classes."""
        check_detector(weights)
        self.net = load_whole(InstanceNet, weights).to(torch.device(device))

    @property
    def device(self) -> torch.device:
        return self.net.device

    def detect(self, images: Sequence[np.ndarray]) -> list[dict[str, list[Detection]]]:
        """uint8 RGB pictures [H, W, 3] -> for each class name -> Detections, best score first, before any threshold.

        Pictures of one padded size share a forward, so that none is padded more than it would be alone.
        """
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"picture of shape {image.shape} and type {image.dtype}; pass uint8 RGB [H, W, 3]")
        places: dict[Size, list[int]] = {}
        for place, image in enumerate(images):
            places.setdefault(padded(resized((image.shape[0], image.shape[1]))), []).append(place)
        found: list[dict[str, list[Detection]]] = [{} for _ in images]
        with torch.inference_mode(), full_precision():
            for group in places.values():
                class_BQC, mask_BQhw = self.net(torch.stack([prepare(images[i], self.device) for i in group]))
                for place, class_QC, mask_Qhw in zip(group, class_BQC, mask_BQhw, strict=True):
                    original = (images[place].shape[0], images[place].shape[1])
                    told = instances(class_QC, mask_Qhw, inner=resized(original), original=original)
                    found[place] = by_class(told)
        return found


def by_class(told: Instances) -> dict[str, list[Detection]]:
    """GenEval's class name -> Detections, best score first; instances of one query share a mask."""
    found: dict[str, list[Detection]] = {}
    for index, score, box, mask in zip(told.class_K, told.score_K, told.box_K4, told.mask_K, strict=True):
        x0, y0, x1, y1 = box.tolist()
        detection = Detection(box=(x0, y0, x1, y1), score=float(score), mask=told.masks_UHW[mask])
        found.setdefault(GENEVAL_OBJECTS[index], []).append(detection)
    return found
