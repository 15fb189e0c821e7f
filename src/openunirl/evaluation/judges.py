"""Who judges pictures: a detector and a colour classifier under one name, and the label their numbers carry.

In: a name and weights. Out: a NamedJudge. torch and the worlds are imported only when a judge is asked for.
To add a judge: one function, one line in JUDGES, and its name among the detectors of images_command.ImagesArguments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openunirl.config import META_DETECTOR, OPENAI_CLIP
from openunirl.types import ColorClassifier, Detection, Detector

if TYPE_CHECKING:
    from openunirl.tasks.worlds import Judge

META_LABEL = "GenEval protocol, Meta weights"


@dataclass(frozen=True, kw_only=True)
class NamedJudge:
    """A judge that is yet to be loaded. Example: JUDGES["oracle"]("", "").load("cpu") -> (Oracle(), {})"""

    label: str
    """Whose verdict the accuracies are."""
    classes: tuple[str, ...]
    """Everything it can find."""
    colors: tuple[str, ...]
    """Everything it can call a colour."""
    check: Callable[[], None]
    """Before hours of work: configurations, and of weight files whether they are whole, but no number of them. Errors:
    as load's, but for weights that are not finite."""
    load: Callable[[Any], tuple[Judge, dict[str, str]]]
    """(device) -> the judge, and fingerprints of its weights. Errors: ValueError for weights that are not there,
    damaged, or of another network."""


def loaded_once(named: NamedJudge) -> NamedJudge:
    """The same judge, whose networks stay in memory with it after the first load."""
    return dataclasses.replace(named, load=functools.cache(named.load))


class PhotoJudge:
    """A Detector and a ColorClassifier as one Judge."""

    def __init__(self, detector: Detector, classifier: ColorClassifier):
        self.detector, self.classifier = detector, classifier

    def detect(self, images: Sequence[np.ndarray]) -> list[dict[str, list[Detection]]]:
        return self.detector.detect(images)

    def colors(self, image: np.ndarray, detections: Sequence[Detection], classname: str) -> list[str]:
        return self.classifier.colors(image, detections, classname)


def label(detector_weights: str, color_weights: str) -> str:
    """GenEval's protocol and whose weights: a folder's name says nothing about what is in it, so it is only quoted.
    transformers takes a local folder before the hub's id of the same name."""
    published = (detector_weights, color_weights) == (META_DETECTOR, OPENAI_CLIP)
    if published and not any(Path(name).is_dir() for name in (META_DETECTOR, OPENAI_CLIP)):
        return META_LABEL
    return f"GenEval protocol, weights {detector_weights} and {color_weights}"


def photo_judge(detector_weights: str, color_weights: str) -> NamedJudge:
    """Mask2Former and CLIP."""
    from openunirl.tasks.geneval import COLORS, GENEVAL_OBJECTS

    def check() -> None:
        from transformers import CLIPModel

        from openunirl.evaluation.color import read_parts
        from openunirl.evaluation.detectors import InstanceNet, check_detector
        from openunirl.evaluation.weights import check_whole

        check_detector(detector_weights)
        read_parts(color_weights)
        check_whole(InstanceNet, detector_weights)
        check_whole(CLIPModel, color_weights)

    def load(device: Any) -> tuple[Judge, dict[str, str]]:
        from openunirl.evaluation.color import ClipColors
        from openunirl.evaluation.detectors import Mask2FormerDetector
        from openunirl.generate import fingerprint_of

        detector, classifier = Mask2FormerDetector(detector_weights, device), ClipColors(color_weights, device)
        prints = {"detector": detector.net, "color": classifier.net}
        prints = {f"{name}_fingerprint": fingerprint_of(net.parameters()) for name, net in prints.items()}
        return PhotoJudge(detector, classifier), prints

    return NamedJudge(
        label=label(detector_weights, color_weights), classes=GENEVAL_OBJECTS, colors=COLORS, check=check, load=load
    )


def oracle(detector_weights: str, color_weights: str) -> NamedJudge:
    """Of the shapes world; it has no weights."""
    from openunirl.tasks import shapes_oracle

    del detector_weights, color_weights
    return NamedJudge(
        label="oracle",
        classes=shapes_oracle.SHAPES,
        colors=shapes_oracle.COLORS,
        check=lambda: None,
        load=lambda device: (shapes_oracle.Oracle(), {}),
    )


JUDGES: dict[str, Callable[[str, str], NamedJudge]] = {"mask2former": photo_judge, "oracle": oracle}
"""name -> (detector weights, colour weights) -> NamedJudge."""
