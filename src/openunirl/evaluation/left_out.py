"""What a folder in GenEval's layout holds beside the pictures that are scored, and what it lacks.

    folder, its Pictures -> left_out -> LeftOut (counts for the summary, sentences for the terminal)

In: a folder and what image_folder.read_folder found in it. Out: files and folders that look like pictures or prompts
and are not scored (0002.gif, extra.png, "00011 (copy)"), and how many prompts and samples --partial went without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from openunirl.evaluation.image_folder import FORMATS, Picture, numbered

_PICTURES = (*FORMATS, ".gif", ".tif", ".tiff", ".jfif", ".avif", ".heic")
_GRID = "grid"
"""GenEval's tools draw all pictures of a prompt into one of this name."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """dataclasses.asdict gives what goes into a summary.

    Example: LeftOut(ignored_files=1, ignored_folders=1, such_as=("00011 (copy)", "00000/samples/0002.gif"),
                     missing_prompts=0, missing_samples=1)
    """

    ignored_files: int
    ignored_folders: int
    such_as: Sequence[str]
    missing_prompts: int
    """Those without any picture."""
    missing_samples: int
    """Of the other prompts, so many fewer than the prompt with the most."""

    def ignored(self) -> str:
        """A sentence for the terminal; "" where nothing is."""
        rest = self.ignored_files + self.ignored_folders - len(self.such_as)
        kinds = f"{self.ignored_folders} folders and {self.ignored_files} files are not in GenEval's layout"
        more = f" and {rest} more" if rest else ""
        return f"{kinds}, and not scored: {', '.join(self.such_as)}{more}" if self.such_as else ""

    def missing(self) -> str:
        """A sentence for the terminal; "" where nothing is."""
        told = f"missing: {self.missing_prompts} prompts, and {self.missing_samples} samples of the others"
        return told if self.missing_prompts or self.missing_samples else ""


def left_out(folder: Path, pictures: Sequence[Picture], prompts: int | None = None) -> LeftOut:
    """prompts: how many there should be; None: as many as the last folder's number says."""
    places = numbered(folder)
    samples = Counter(picture.index for picture in pictures)
    wanted = max(places, default=-1) + 1 if prompts is None else prompts
    most = max(samples.values(), default=0)
    ignored = set(_like_pictures(folder, places.values())) - {picture.file for picture in pictures}
    found = sorted(ignored, key=lambda place: (not place.is_dir(), place))
    folders = sum(place.is_dir() for place in found)
    return LeftOut(
        ignored_files=len(found) - folders,
        ignored_folders=folders,
        such_as=tuple(place.relative_to(folder).as_posix() for place in found[:3]),
        missing_prompts=wanted - len(samples),
        missing_samples=sum(most - number for number in samples.values()),
    )


def _like_pictures(folder: Path, prompt_folders: Iterable[Path]) -> Iterator[Path]:
    """Whatever could be meant as a picture or as a prompt's folder; what is hidden could not."""
    known = set(prompt_folders)
    yield from (each for each in _visible(folder) if each not in known and _is_meant(each))
    for place in known:
        yield from (each for each in _visible(place) if each.name != "samples" and _is_meant(each))
        if (place / "samples").is_dir():
            yield from _visible(place / "samples")


def _is_meant(place: Path) -> bool:
    """Whether it is a picture, or a folder with a prompt or pictures in it."""
    if place.is_dir():
        return any(each.name in ("samples", "metadata.jsonl") or _is_picture(each) for each in _visible(place))
    return _is_picture(place)


def _is_picture(place: Path) -> bool:
    return place.suffix.lower() in _PICTURES and place.stem != _GRID


def _visible(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if not each.name.startswith(".")]
