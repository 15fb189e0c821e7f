"""A folder of pictures in GenEval's layout, read with suspicion.

    DIR/00000/metadata.jsonl, DIR/00000/samples/0000.png, ... -> read_folder -> Pictures, by prompt and sample
    a picture's bytes                                         -> decode      -> uint8 RGB [H, W, 3]

In: a folder that any model's tool made; on request GenEval's prompt file. Out: what there is to score, or a ValueError
that names what is missing or does not match.

Source: GenEval (Ghosh et al. 2023, arXiv 2310.11513), the layout its tools read. Departures: 1. officially a missing
picture, folder or metadata line just lowers n; 2. other formats than PNG are read, too (JPEG's losses are the owner's).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from openunirl.tasks.records import read_jsonl, read_prompts, read_record
from openunirl.types import Prompt

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_PNG = b"\x89PNG\r\n\x1a\n"
NARROWEST = 1000
"""A picture whose sides differ by more than this factor is a mistake."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture and the prompt it was drawn for.

    Example: Picture(index=0, sample=0, name="00000/samples/0000.png", file=Path("DIR/00000/samples/0000.png"),
                     prompt=Prompt(...))
    """

    index: int
    sample: int
    name: str
    """Path within the folder, with slashes: its key in results.jsonl."""
    file: Path
    prompt: Prompt
    further_keys: tuple[str, ...] = ()
    """What its metadata holds besides GenEval's fields, and is left out."""


def read_folder(folder: Path, *, prompt_file: Path | None = None, partial: bool = False) -> list[Picture]:
    """All pictures, by prompt and sample.

    With `prompt_file`, folder 00012 belongs to its line 13 (the first is 00000): the folder's own metadata must agree,
    and may be missing. Unless `partial`, every number from 0 to the last one is there, for prompts and for samples, and
    every prompt has equally many samples.

    Errors: ValueError that names the folder or file and the likely cause; OSError as the file system raises it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    places = numbered(folder)
    if not places:
        inner = next((child.name for child in sorted(folder.iterdir()) if child.is_dir() and numbered(child)), None)
        hint = f"; did you mean {folder / inner}?" if inner else ""
        raise ValueError(
            f"{folder} is not in GenEval's layout (00000/metadata.jsonl, 00000/samples/0000.png, ...){hint}"
        )
    wanted = read_prompts(prompt_file) if prompt_file is not None else None
    if wanted is not None:
        _check_numbers(places, wanted, folder, prompt_file, partial)
    elif not partial:
        _check_complete(sorted(places), folder, "prompt folder")
    pictures: list[Picture] = []
    for index, place in sorted(places.items()):
        prompt, further = _prompt(place, None if wanted is None else wanted[index], f"{prompt_file}:{index + 1}")
        samples = _samples(place)
        if not samples:
            if partial:
                continue
            raise ValueError(f"{place / 'samples'} holds no numbered picture: finish drawing, or score with --partial")
        if not partial:
            _check_complete(sorted(samples), place / "samples", "picture")
        pictures += [
            Picture(
                index=index,
                sample=sample,
                name=file.relative_to(folder).as_posix(),
                file=file,
                prompt=prompt,
                further_keys=tuple(further),
            )
            for sample, file in sorted(samples.items())
        ]
    if not pictures:
        raise ValueError(f"{folder} holds prompt folders and no picture in any of them")
    if not partial:
        _check_even(pictures, folder)
    return pictures


def holds_pictures(folder: Path) -> bool:
    """Whether it is in GenEval's layout, or holds pictures and no model's config.json beside them."""
    flat = any(file.suffix.lower() in FORMATS for file in folder.iterdir())
    return any((place / "samples").is_dir() for place in numbered(folder).values()) or (
        flat and not (folder / "config.json").exists()
    )


def numbered(folder: Path) -> dict[int, Path]:
    """number -> prompt folder. Errors: ValueError for two folders of one number, such as 7 and 00007."""
    found: dict[int, Path] = {}
    for place in sorted(folder.iterdir()):
        if re.fullmatch(r"[0-9]+", place.name) and place.is_dir():
            number = int(place.name)
            if number in found:
                raise ValueError(f"{found[number]} and {place} have the same number: remove one of them")
            found[number] = place
    return found


def _samples(place: Path) -> dict[int, Path]:
    """number -> picture. Errors: ValueError for two pictures of one number, and where none is named by a number."""
    samples = place / "samples"
    if not samples.is_dir():
        return {}
    found: dict[int, Path] = {}
    others: list[str] = []
    for file in sorted(samples.iterdir()):
        if file.suffix.lower() not in FORMATS or file.name.startswith("."):
            continue
        if not re.fullmatch(r"[0-9]+", file.stem):
            others.append(file.name)
            continue
        number = int(file.stem)
        if number in found:
            raise ValueError(f"{found[number]} and {file.name} have the same number: remove one of them")
        found[number] = file
    if others and not found:
        raise ValueError(
            f"{samples} holds {others[0]}, which is not named by a number: name pictures 0000.png, 0001.png"
        )
    return found


def _prompt(place: Path, wanted: Prompt | None, wanted_place: str) -> tuple[Prompt, list[str]]:
    """The folder's metadata, compared with the prompt file's line where there is one; and its further keys."""
    file = place / "metadata.jsonl"
    if not file.is_file():
        if wanted is not None:
            return wanted, []
        raise ValueError(f"{file} is missing, so nothing says what the pictures should show: give --prompt-file FILE")
    rows = read_jsonl(file)
    if len(rows) != 1:
        raise ValueError(f"{file} holds {len(rows)} lines; it should hold one, the prompt of this folder's pictures")
    if not {"tag", "include"} & rows[0].keys() and "prompt" in rows[0] and wanted is None:
        raise ValueError(
            f"{file} holds a prompt and not what the picture should show (tag, include): give --prompt-file FILE, or "
            "draw from a file of GenEval's records"
        )
    if wanted is not None and rows[0].get("prompt") != wanted.prompt:
        raise ValueError(
            f"{file} is of {rows[0].get('prompt')!r}, and {wanted_place} of {wanted.prompt!r}: the pictures were drawn "
            "from another prompt file, or in another order"
        )
    if wanted is not None and not {"tag", "include"} & rows[0].keys():
        return wanted, []
    prompt, further = read_record(file)
    if wanted is not None and prompt.metadata() != wanted.metadata():
        raise ValueError(f"{file} asks for something else than {wanted_place}, under the same prompt: use one of them")
    return prompt, further


def told_of_further_keys(pictures: Sequence[Picture]) -> str:
    """A sentence; "" where there are none."""
    of = {picture.index: picture.further_keys for picture in pictures if picture.further_keys}
    names = list(dict.fromkeys(key for keys in of.values() for key in keys))
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    told = f"{len(of)} metadata files hold further keys, which are ignored: {', '.join(names[:3])}{rest}"
    return told if of else ""


# ------------------------------------------------------------------------------------------ what may be missing


def _check_numbers(
    numbered: Collection[int], wanted: Sequence[Prompt], folder: Path, prompt_file: Path | None, partial: bool
) -> None:
    beyond = sorted(number for number in numbered if number >= len(wanted))
    if beyond:
        raise ValueError(
            f"{folder / f'{beyond[0]:05d}'} has no line in {prompt_file}, which holds {len(wanted)}: is it another's?"
        )
    missing = sorted(set(range(len(wanted))) - set(numbered))
    if missing and not partial:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} prompts of {prompt_file}, the first is "
            f"{missing[0]:05d}: finish drawing, or score what is there with --partial"
        )


def _check_complete(numbers: Sequence[int], folder: Path, what: str) -> None:
    """Every number from 0 to the last; `numbers` are sorted and distinct, and the last may be a time of day."""
    missing = numbers[-1] + 1 - len(numbers)
    if missing:
        first = next(place for place, number in enumerate(numbers) if place != number)
        raise ValueError(
            f"{folder} lacks {what} {first} ({missing} missing, numbers go up to {numbers[-1]}): finish "
            "drawing, or score what is there with --partial"
        )


def _check_even(pictures: Sequence[Picture], folder: Path) -> None:
    """Every prompt has equally many samples."""
    samples = Counter(picture.index for picture in pictures)
    usual = Counter(samples.values()).most_common(1)[0][0]
    odd = [index for index, number in samples.items() if number != usual]
    if odd:
        raise ValueError(
            f"{folder / f'{odd[0]:05d}'} holds {samples[odd[0]]} pictures and most prompts {usual} ({len(odd)} differ)"
            ": finish drawing, or score what is there with --partial"
        )


def check_names(pictures: Sequence[Picture], classes: Collection[str], colors: Collection[str], judge: str) -> None:
    """Errors: ValueError for a class or colour that the judge has no name for, and so would never find."""
    for picture in pictures:
        name = unknown_name(picture.prompt, classes, colors)
        if name is not None:
            raise ValueError(
                f"{picture.file.parent.parent / 'metadata.jsonl'} asks for {name!r}, which the detector "
                f"{judge} does not know ({', '.join(list(classes)[:3])}, ...): choose these pictures' --detector"
            )


def unknown_name(prompt: Prompt, classes: Collection[str], colors: Collection[str]) -> str | None:
    """The first class or colour that a prompt asks for and that is none of these."""
    for clause in (*prompt.include, *prompt.exclude):
        for name, known in ((clause["class"], classes), (clause.get("color"), colors)):
            if name is not None and name not in known:
                return name
    return None


# -------------------------------------------------------------------------------------------------- the pixels


def read_picture(file: Path) -> tuple[str, np.ndarray]:
    """(16 hex digits of the file's content, uint8 RGB [H, W, 3]). Errors: ValueError that says what is wrong."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from None
    return digest(content), decode(content)


def digest(content: bytes) -> str:
    """16 hex digits."""
    return hashlib.sha256(content).hexdigest()[:16]


def decode(content: bytes) -> np.ndarray:
    """uint8 RGB [H, W, 3], turned as EXIF says. Errors: ValueError that says what is wrong, without a name.

    A PNG's checksums are compared, which Pillow leaves out when it reads pixels: a flipped bit would be scored.
    """
    if not content:
        raise ValueError("the file is empty")
    try:
        if content.startswith(_PNG):
            with Image.open(io.BytesIO(content)) as picture:
                picture.verify()
        with Image.open(io.BytesIO(content)) as picture:
            mode, (width, height) = picture.mode, picture.size
            deep = mode in ("I", "F") or mode.startswith("I;")
            pixels_HW3 = None if deep else np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        told = "no known picture format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise ValueError(f"damaged, or no picture: {told or type(error).__name__}") from None
    if pixels_HW3 is None:
        raise ValueError(f"more than 8 bits a channel (mode {mode}): convert it to 8 bits first")
    if max(width, height) > NARROWEST * min(width, height):
        raise ValueError(f"{width}x{height} pixels are too narrow for a picture")
    return pixels_HW3


def all_equal(pictures: Sequence[Picture]) -> bool:
    """Whether two or more pictures can be read and show the same; stops at the first that differs."""
    first, readable = None, 0
    for picture in pictures:
        try:
            _, pixels_HW3 = read_picture(picture.file)
        except ValueError:
            continue
        readable += 1
        if first is None:
            first = pixels_HW3
        elif not np.array_equal(first, pixels_HW3):
            return False
    return readable > 1
