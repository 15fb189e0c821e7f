"""A world of photographs with someone who judges them: Mask2Former and CLIP, and references from a folder.

    PhotosConfig -> JUDGES["mask2former"] -> World.judge
    a folder in GenEval's layout -> judge -> the pictures that are right -> World.found

In: a World without a judge, a PhotosConfig. Out: the same World with one. The networks are loaded once, in float32.

Source: UniRL (arXiv 2505.23380), its released cycle scripts, for references: pictures that the detector calls right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from openunirl.config import PhotosConfig
from openunirl.evaluation.geneval import judge_pictures
from openunirl.evaluation.image_folder import Picture, check_names, read_folder, read_picture
from openunirl.evaluation.judges import JUDGES
from openunirl.tasks.geneval import with_question
from openunirl.tasks.worlds import Found, World
from openunirl.types import Judge, Prompt

_DETECTOR = "mask2former"


def with_detector(world: World, photos: PhotosConfig, device: torch.device) -> World:
    """Errors: ValueError for weights or references that are not there, damaged, or of another kind."""
    assert photos.detector_weights is not None
    named = JUDGES[_DETECTOR](photos.detector_weights, photos.color_weights)
    pictures: list[Picture] = []
    if photos.references is not None:
        pictures = read_folder(Path(photos.references), partial=True)
        check_names(pictures, named.classes, named.colors, _DETECTOR)
    judge, fingerprints = named.load(device)
    return dataclasses.replace(
        world,
        label=named.label,
        judge=lambda: judge,
        judged_by=fingerprints,
        classes=frozenset(named.classes),
        colors=frozenset(named.colors),
        found=References(pictures=pictures, judge=judge),
    )


# -------------------------------------------------------------------------------------------------- references


@dataclass(frozen=True, kw_only=True)
class References:
    """Reference pictures, judged as far as they are needed, each once in a run.

    Example: References(pictures=read_folder(Path("DIR"), partial=True), judge=judge)(prompts, 480) -> [Found(...), ...]
    """

    pictures: Sequence[Picture]
    judge: Judge
    _right: dict[str, bool] = field(default_factory=dict, repr=False)

    def __call__(self, prompts: Sequence[Prompt], most: int) -> list[Found]:
        """At most so many right ones: first those of `prompts`, of each the first samples; then the others."""
        place = placed(prompts)
        asked = [(*place(each), each) for each in self.pictures]
        asked.sort(key=lambda one: (one[0] >= len(prompts), one[2].sample, one[0]))
        found: list[Found] = []
        for index, prompt, picture in asked:
            if len(found) == most:
                break
            if self._is_right(picture):
                found.append(Found(index=index, sample=picture.sample, prompt=prompt, file=picture.file))
        return sorted(found, key=lambda one: one.index)

    def _is_right(self, picture: Picture) -> bool:
        if picture.name not in self._right:
            try:
                (verdict,) = judge_pictures(self.judge, [picture.prompt.metadata()], [read_picture(picture.file)[1]])
            except ValueError as error:
                raise ValueError(f"{picture.file}: {error}") from None
            self._right[picture.name] = verdict.correct
        return self._right[picture.name]


def placed(prompts: Sequence[Prompt]) -> Callable[[Picture], tuple[int, Prompt]]:
    """A reference picture -> its number in the evaluation, and the prompt whose question it is asked: those of the
    evaluated prompt that it shows; else a number beyond them all, and its own prompt.

    Errors (of the result): ValueError for metadata of which nothing is asked, neither by itself nor by us.
    """
    places = {json.dumps(prompt.metadata(), sort_keys=True): i for i, prompt in reversed(list(enumerate(prompts)))}

    def place(picture: Picture) -> tuple[int, Prompt]:
        index = places.get(json.dumps(picture.prompt.metadata(), sort_keys=True))
        if index is not None:
            return index, prompts[index]
        try:
            return len(prompts) + picture.index, with_question(picture.prompt)
        except ValueError as error:
            raise ValueError(f"{picture.file.parent.parent / 'metadata.jsonl'}: {error}") from None

    return place
