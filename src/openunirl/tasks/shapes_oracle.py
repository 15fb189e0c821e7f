"""The pictures of the synthetic world: what its things look like, whole and damaged; drawing scenes; recognising them.

In: a Scene. Out: a uint8 RGB picture [H, W, 3]; and back: class name -> Detections, and colour names. `Oracle` is the
Detector and the ColorClassifier (types.py) of GenEval's scorer for such pictures. Source: ours.
The oracle names each pixel by the nearest palette colour, joins pixels of one colour to components, and compares each
component with the templates. A component that is like none, or shares its place with other colours, is no object.

Shapes: H = W = 64 pixels, K = 24 pixels (the 3x3-cell block of one thing), S = 8 shape names, D = 9 template shifts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from openunirl.types import Detection

SIZE = 64  # picture side, pixels
CELL = 8  # one image token covers one cell of this side, pixels
BLOCK = 3 * CELL  # side of the block a thing is drawn in
LATTICE = SIZE // CELL - 2  # columns and rows a thing can take
SPACING = 3  # lattice steps between two things, in column or in row: blocks never overlap
MAX_THINGS = 4
BACKGROUND = 0.62
NOISE = 0.01
ACCEPT_SCORE = 0.80  # least template score of an object
DAMAGE_SCORE = 0.76  # no part of a damaged thing reaches it on any template: never a borderline case
DETECTION_SCORE = 0.99  # above both of GenEval's thresholds
MIN_PIXELS = 40  # smaller components are specks

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart")
PALETTE: Mapping[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.93, 0.15),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.12, 0.28, 0.90),
    "purple": (0.55, 0.12, 0.70),
    "black": (0.04, 0.04, 0.04),
    "white": (0.98, 0.98, 0.98),
}
COLORS = tuple(PALETTE)

# ----------------------------------------------------------------------------------------- templates


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points up to 11 pixels from the middle, lowered so that the bounding box is centred."""
    y = y - 1.05
    angle = (np.arctan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5  # from the axis of the nearest point
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.abs(np.sin(angle))
    notch_along, notch_across = 4.8 * math.cos(math.pi / 5), 4.8 * math.sin(math.pi / 5)
    return across * (11.0 - notch_along) <= notch_across * (11.0 - along)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two lobes over a wedge."""
    lobes = np.hypot(np.abs(x) - 4.9, y + 4.3) <= 5.1
    wedge = (y > -4.3) & (np.abs(x) <= 10.0 * (9.4 - y) / 13.0) & (np.abs(x) + 0.3 * (y + 4.3) <= 10.0)
    return lobes | wedge


_INSIDE: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) <= 9.2,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 9.5,
    "triangle": lambda x, y: (np.abs(x) <= 10.5 * (y + 9.5) / 19) & (y <= 9.5),
    "diamond": lambda x, y: np.abs(x) + np.abs(y) <= 10.0,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 2.6) & (np.maximum(np.abs(x), np.abs(y)) <= 10.0),
    "ring": lambda x, y: (np.hypot(x, y) <= 10.0) & (np.hypot(x, y) >= 5.8),
    "star": _star,
    "heart": _heart,
}


def _coverage(shape: str, samples: int = 8) -> np.ndarray:
    """[K, K] share of each pixel that the shape covers, from samples^2 points a pixel."""
    grid = (np.arange(BLOCK * samples) + 0.5) / samples - BLOCK / 2
    inside = _INSIDE[shape](grid[None, :], grid[:, None])
    return inside.reshape(BLOCK, samples, BLOCK, samples).mean((1, 3), dtype=np.float32)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1), exclusive end, of a bool mask."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


TEMPLATES: Mapping[str, np.ndarray] = {shape: _coverage(shape) for shape in SHAPES}
"""shape -> [K, K] float32 coverage 0..1, centred in its block."""

TEMPLATE_BOXES = {shape: _box(coverage_KK >= 0.5) for shape, coverage_KK in TEMPLATES.items()}
"""shape -> (x0, y0, x1, y1) in pixels within the block, exclusive end."""


def _sharp(coverage: np.ndarray) -> np.ndarray:
    """Twice the contrast about one half: a blurred rim counts almost as a clean one."""
    return np.clip(2 * coverage - 0.5, 0, 1)


_SHIFTS = tuple(itertools.product((-1, 0, 1), repeat=2))
_BANK_SDK2 = np.stack([[np.roll(_sharp(t), shift, (0, 1)).ravel() for shift in _SHIFTS] for t in TEMPLATES.values()])


def shape_scores(own_KK: np.ndarray, foreground_KK: np.ndarray) -> np.ndarray:
    """How much a block looks like each shape: soft IoU 0..1, [S] in the order of SHAPES, at the best shift by a pixel.

    own_KK: coverage 0..1 by one colour; foreground_KK >= own_KK: by any colour, so that foreign parts count against it.
    """
    overlap_SD = np.minimum(_BANK_SDK2, _sharp(own_KK).ravel()).sum(-1)
    union_SD = np.maximum(_BANK_SDK2, _sharp(foreground_KK).ravel()).sum(-1)
    return (overlap_SD / union_SD).max(-1)


# -------------------------------------------------------------------------------------------- damage


@dataclass(frozen=True, kw_only=True)
class Graft:
    """Damage: `cells` (0..8, row-major) of a thing's block show another shape or colour.

    Example: Graft(shape="square", color="blue", cells=(0, 1, 2)). Shape None leaves the cells empty. `shift` moves the
    other shape by whole cells (right, down), so that its parts do not fit on.
    """

    shape: str | None
    color: str
    cells: tuple[int, ...]
    shift: tuple[int, int] = (0, 0)


def _parts(shape: str, color: str, graft: Graft | None) -> dict[str, np.ndarray]:
    """colour -> [K, K] coverage by that colour."""
    if graft is None:
        return {color: TEMPLATES[shape]}
    taken_33 = np.zeros((3, 3), dtype=bool)
    taken_33.ravel()[list(graft.cells)] = True
    taken_KK = taken_33.repeat(CELL, 0).repeat(CELL, 1)
    parts = {color: np.where(taken_KK, 0, TEMPLATES[shape])}
    if graft.shape is not None:
        right, down = (CELL * cells for cells in graft.shift)
        other_KK = np.roll(np.pad(TEMPLATES[graft.shape], BLOCK), (down, right), (0, 1))[BLOCK:-BLOCK, BLOCK:-BLOCK]
        parts[graft.color] = parts.get(graft.color, 0) + np.where(taken_KK, other_KK, 0)
    return parts


@lru_cache(maxsize=8192)
def clearly_malformed(shape: str, color: str, graft: Graft) -> bool:
    """Whether no colour of the damaged thing looks like any shape: every template score is below DAMAGE_SCORE."""
    parts = _parts(shape, color, graft)
    foreground_KK = np.sum(list(parts.values()), axis=0)
    return all(shape_scores(own_KK, foreground_KK).max() < DAMAGE_SCORE for own_KK in parts.values())


def sample_graft(shape: str, color: str, rng: np.random.Generator) -> Graft:
    """A random graft that makes the thing clearly malformed: scattered cells, or all from some cell on.

    Two in five grafts keep the shape and change the colour: a thing in two colours is what a model draws most often
    when it has not made up its mind.
    """
    other_colors = [name for name in COLORS if name != color]
    while True:
        number = int(rng.integers(2, 8))
        cells = rng.choice(9, size=number, replace=False) if rng.random() < 0.5 else np.arange(9 - number, 9)
        if rng.random() < 0.4:
            other_shape, other_color = shape, other_colors[rng.integers(len(other_colors))]
        else:
            other_shape = (None, *SHAPES)[rng.integers(len(SHAPES) + 1)]
            other_color = color if rng.random() < 0.4 else COLORS[rng.integers(len(COLORS))]
        shift = (0, 0) if rng.random() < 0.6 else (int(rng.integers(-1, 2)), int(rng.integers(-1, 2)))
        graft = Graft(
            shape=other_shape, color=other_color, cells=tuple(sorted(int(cell) for cell in cells)), shift=shift
        )
        if clearly_malformed(shape, color, graft):
            return graft


@lru_cache(maxsize=8192)
def stamp(shape: str, color: str, graft: Graft | None) -> np.ndarray:
    """[K, K, 3] float32: what a thing adds to the background of its block."""
    parts = _parts(shape, color, graft)
    colors = {name: np.asarray(PALETTE[name], dtype=np.float32) - np.float32(BACKGROUND) for name in parts}
    return np.sum([coverage_KK[..., None] * colors[name] for name, coverage_KK in parts.items()], axis=0)


# -------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One drawn object, centred at x = 12 + 8*column, y = 12 + 8*row pixels; column and row in 0..5.

    Example: Thing(shape="circle", color="red", column=0, row=3)
    A thing with a graft is malformed and counts as no item; ValueError if that graft leaves it (nearly) recognisable.
    """

    shape: str
    color: str
    column: int
    row: int
    graft: Graft | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.color not in COLORS:
            raise ValueError(
                f"no {self.color!r} {self.shape!r} in this world; take one of {SHAPES} and one of {COLORS}"
            )
        if not (0 <= self.column < LATTICE and 0 <= self.row < LATTICE):
            raise ValueError(f"column {self.column}, row {self.row} is off the lattice; both are in 0..{LATTICE - 1}")
        if self.graft is not None and not clearly_malformed(self.shape, self.color, self.graft):
            raise ValueError(
                f"{self.graft} leaves the {self.color} {self.shape} recognisable; graft more or other cells"
            )

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in pixels, exclusive end, of the undamaged shape."""
        x, y = self.column * CELL, self.row * CELL
        x0, y0, x1, y1 = TEMPLATE_BOXES[self.shape]
        return x + x0, y + y0, x + x1, y + y1


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Things at least SPACING lattice steps apart (else ValueError). Example: Scene(things=(Thing(...), Thing(...)))"""

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        for a, b in itertools.combinations(self.things, 2):
            if max(abs(a.column - b.column), abs(a.row - b.row)) < SPACING:
                raise ValueError(f"{a} and {b} are closer than {SPACING} lattice steps; move one of them")

    @property
    def items(self) -> tuple[Thing, ...]:
        """The well-formed things: what counts as present."""
        return tuple(thing for thing in self.things if thing.graft is None)

    def of(self, shape: str, color: str | None = None) -> list[Thing]:
        """The items of a shape (and a colour)."""
        return [t for t in self.items if t.shape == shape and color in (None, t.color)]


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene: uint8 [H, W, 3]; the noise comes from rng."""
    picture = rng.standard_normal((SIZE, SIZE, 3), dtype=np.float32)
    picture *= NOISE
    picture += np.float32(BACKGROUND)
    for thing in scene.things:
        x, y = thing.column * CELL, thing.row * CELL
        picture[y : y + BLOCK, x : x + BLOCK] += stamp(thing.shape, thing.color, thing.graft)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def render_batch(scenes: Sequence[Scene], rng: np.random.Generator) -> np.ndarray:
    """Pictures of B scenes: uint8 [B, H, W, 3]."""
    return np.stack([render(scene, rng) for scene in scenes])


# -------------------------------------------------------------------------------------------- oracle

_COLORS_C3 = np.asarray(list(PALETTE.values()), dtype=np.float32)
_NAMED_C3 = np.concatenate([_COLORS_C3, np.full((1, 3), BACKGROUND, dtype=np.float32)])
_EMPTY = len(COLORS)  # index of the background among the named colours


def _nearest(pixels: np.ndarray) -> np.ndarray:
    """Index of the nearest named colour, background last, for float pixels [..., 3] in 0..1."""
    return ((_NAMED_C3**2).sum(-1) - 2 * (pixels @ _NAMED_C3.T)).argmin(-1)


def _components(names_HW: np.ndarray) -> np.ndarray:
    """Labels [H, W]: equal where pixels of one name touch by a side."""
    labels_HW = np.arange(names_HW.size).reshape(names_HW.shape)
    along_x, along_y = names_HW[:, 1:] == names_HW[:, :-1], names_HW[1:] == names_HW[:-1]
    far = names_HW.size
    while True:
        before_HW = labels_HW.copy()
        for here, there, joined in (
            (labels_HW[:, 1:], labels_HW[:, :-1], along_x),
            (labels_HW[1:], labels_HW[:-1], along_y),
        ):
            np.minimum(here, np.where(joined, there, far), out=here)
            np.minimum(there, np.where(joined, here, far), out=there)
        labels_HW = labels_HW.ravel()[labels_HW]  # a label is a pixel's index: jump to that pixel's own label
        if np.array_equal(labels_HW, before_HW):
            return labels_HW


def _window(image_HW: np.ndarray, x: int, y: int) -> np.ndarray:
    """The [K, K] block around pixel corner (x, y), zero outside the picture."""
    half = BLOCK // 2
    block_KK = np.zeros((BLOCK, BLOCK), dtype=np.float32)
    top, left = max(y - half, 0), max(x - half, 0)
    part = image_HW[top : y + half, left : x + half]
    block_KK[top - (y - half) :, left - (x - half) :][: part.shape[0], : part.shape[1]] = part
    return block_KK


def _grown(mask_HW: np.ndarray) -> np.ndarray:
    """The mask and its eight neighbours: the antialiased rim belongs to a component too."""
    tall = mask_HW.copy()
    tall[1:] |= mask_HW[:-1]
    tall[:-1] |= mask_HW[1:]
    wide = tall.copy()
    wide[:, 1:] |= tall[:, :-1]
    wide[:, :-1] |= tall[:, 1:]
    return wide


def _recognise(pixels: np.ndarray, occupied_HW: np.ndarray, mask_HW: np.ndarray, color: int) -> str | None:
    """The shape of one component of a colour in float pixels [H, W, 3], or None."""
    x0, y0, x1, y1 = _box(mask_HW)
    if max(x1 - x0, y1 - y0) > BLOCK:
        return None
    grown_HW = _grown(mask_HW)
    direction = _COLORS_C3[color] - BACKGROUND
    own_HW = np.clip((pixels - BACKGROUND) @ direction / (direction @ direction), 0, 1) * grown_HW
    foreground_HW = np.where(occupied_HW & ~grown_HW, 1, own_HW)
    x, y = math.floor((x0 + x1 + 1) / 2), math.floor((y0 + y1 + 1) / 2)
    scores_S = shape_scores(_window(own_HW, x, y), _window(foreground_HW, x, y))
    best = int(scores_S.argmax())
    return SHAPES[best] if scores_S[best] >= ACCEPT_SCORE else None


class Oracle:
    """Detector and ColorClassifier of the synthetic world. Example: Oracle().detect([picture])[0]["circle"]"""

    def detect(self, images: Sequence[np.ndarray]) -> list[dict[str, list[Detection]]]:
        """uint8 RGB pictures [H, W, 3] -> for each class name -> its objects, top to bottom; others are left out."""
        return [self._detect_one(image) for image in images]

    def colors(self, image: np.ndarray, detections: Sequence[Detection], classname: str) -> list[str]:
        """The colour that most pixels of each object have; ValueError for a detection without mask."""
        del classname  # the same eight colours for every shape
        return [self._color_of(image, detection) for detection in detections]

    def _detect_one(self, image: np.ndarray) -> dict[str, list[Detection]]:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"picture of shape {image.shape} and type {image.dtype}; pass uint8 RGB [H, W, 3]")
        pixels = image.astype(np.float32) / 255
        names_HW = _nearest(pixels)
        occupied_HW = names_HW != _EMPTY
        labels_HW = _components(names_HW)
        sizes = np.bincount(labels_HW.ravel(), minlength=labels_HW.size)
        found: dict[str, list[Detection]] = {}
        for label in np.flatnonzero(sizes >= MIN_PIXELS):
            color = int(names_HW.ravel()[label])
            mask_HW = labels_HW == label
            shape = _recognise(pixels, occupied_HW, mask_HW, color) if color != _EMPTY else None
            if shape is not None:
                detection = Detection(box=_box(mask_HW), score=DETECTION_SCORE, mask=mask_HW)
                found.setdefault(shape, []).append(detection)
        return found

    def _color_of(self, image: np.ndarray, detection: Detection) -> str:
        if detection.mask is None:
            raise ValueError(f"{detection} has no mask; the oracle names the colour of masked pixels")
        names = _nearest(image[detection.mask].astype(np.float32) / 255)
        return COLORS[int(np.bincount(names[names != _EMPTY], minlength=len(COLORS)).argmax())]
