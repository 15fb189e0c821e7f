"""What every arrow of the loop carries, with example values.

    Prompt -> ImageRollout -> AnswerRollout -> rewards -> advantages -> loss          (train.py)
                   \\-> Detections -> Verdict -> report                                (evaluation/)

Shapes: P prompts, G images per prompt, B = P*G images, Q questions asked (each names its image),
N image tokens, T answer tokens, V codes, L token positions. This file imports torch for type checkers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

# ---------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question on an image and its gold answer, known from the prompt.

    Example: Question(question="what color is the circle?", answer="red")
    """

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task record: GenEval's own JSON fields, plus the questions whose answers the prompt settles.

    Example: Prompt(tag="colors", include=({"class": "circle", "count": 1, "color": "red"},),
                    prompt="a photo of a red circle",
                    questions=(Question(question="what color is the circle?", answer="red"),))
    The first question is the task's own (`question`/`answer` in JSONL); any further ones make the self-reward stricter.
    """

    tag: str
    include: tuple[Mapping[str, Any], ...]
    prompt: str
    questions: tuple[Question, ...]
    exclude: tuple[Mapping[str, Any], ...] = ()

    def metadata(self) -> dict[str, Any]:
        """GenEval's metadata record for this prompt (the keys its tools read, in its order)."""
        exclude = {"exclude": [dict(clause) for clause in self.exclude]} if self.exclude else {}
        return {"tag": self.tag, "include": [dict(c) for c in self.include], **exclude, "prompt": self.prompt}


@dataclass(frozen=True, kw_only=True)
class Match:
    """Whether a model's answer means the gold answer. `settled=False`: only world knowledge could tell (counts as not
    same).

    Example: Match(same=True, settled=True, why="color red")
    """

    same: bool
    settled: bool = True
    why: str = ""


class Matcher(Protocol):
    """(tag, gold answer, model answer) -> Match."""

    def __call__(self, tag: str, expected: str, answer: str) -> Match: ...


# ------------------------------------------------------------------------------------------- detection


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One detected object. `box` is (x0, y0, x1, y1) in pixels, exclusive end; `mask` is [H, W] bool or None.

    Example: Detection(box=(2.0, 10.0, 23.0, 31.0), score=0.98)
    """

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = field(default=None, repr=False)


class Detector(Protocol):
    """Finds objects. The synthetic oracle and Mask2Former both stand behind this."""

    def detect(self, images: Sequence[np.ndarray]) -> list[dict[str, list[Detection]]]:
        """uint8 RGB images [H, W, 3] -> for each image class name -> detections in detector order, before
        thresholds."""
        ...


class ColorClassifier(Protocol):
    """Names the colour of detected objects."""

    def colors(self, image: np.ndarray, detections: Sequence[Detection], classname: str) -> list[str]:
        """One colour name for each detection of `classname` in the uint8 RGB image [H, W, 3]."""
        ...


class Judge(Detector, ColorClassifier, Protocol):
    """Finds objects and names their colours."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """GenEval's judgement of one image. Example: Verdict(correct=False, reason="expected circle>=1, found 0")"""

    correct: bool
    reason: str = ""
    details: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict, compare=False)
    """class -> its detections above the threshold, [x0, y0, x1, y1, score] in pixels, as in GenEval's results.jsonl."""

    @property
    def objects(self) -> int:
        """Detections above the threshold, of any class."""
        return sum(map(len, self.details.values()))


# -------------------------------------------------------------------------------------------- rollouts


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """How images are drawn. `guidance_scale` w: logits = uncond + w*(cond - uncond), 1 = off (Show-o's own g is w - 1).

    `temperature` divides token logits; `confidence_temperature` scales the Gumbel noise on Show-o's confidences.
    An autoregressive model draws one token a step and reads neither `num_timesteps` nor `confidence_temperature`.
    `top_k` draws among the k most probable codes only (0 = all); autoregressive models.
    `top_p` draws among the fewest codes that hold this share of the probability (1 = all); autoregressive models.
    Log-probs are always those before this truncation.
    """

    num_timesteps: int = 16
    guidance_scale: float = 1.0
    temperature: float = 1.0
    confidence_temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AnswerSampling:
    """How answers are drawn. `temperature` 0 is greedy."""

    max_new_tokens: int = 16
    temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images as token ids, as relaxed one-hots, or as pixels; exactly one of them is given.

    tokens_BN int64 in [0, V); onehots_BNV float, differentiable; pixels_BCHW float in 0..1.
    """

    tokens_BN: torch.Tensor | None = None
    onehots_BNV: torch.Tensor | None = None
    pixels_BCHW: torch.Tensor | None = None

    def __len__(self) -> int:
        given = [x for x in (self.tokens_BN, self.onehots_BNV, self.pixels_BCHW) if x is not None]
        if len(given) != 1:
            raise ValueError(f"Images wants exactly one of tokens, onehots and pixels; {len(given)} were given")
        return given[0].shape[0]

    def select(self, rows: torch.Tensor) -> Images:
        """The images at these places; places may repeat."""
        tables = (self.tokens_BN, self.onehots_BNV, self.pixels_BCHW)
        tokens_BN, onehots_BNV, pixels_BCHW = (
            None if x is None else x.index_select(0, rows.to(x.device)) for x in tables
        )
        return Images(tokens_BN=tokens_BN, onehots_BNV=onehots_BNV, pixels_BCHW=pixels_BCHW)


@dataclass(frozen=True, kw_only=True)
class ImageRollout:
    """B sampled images and all that is needed to score them again.

    tokens_BN int64 codes; reveal_step_BN int64, the step at which each token's value was drawn (METHOD 2: the whole
    trajectory); logprobs_BN float32, log-probability of each token under the acting policy at its reveal step.
    """

    prompts: tuple[str, ...]
    tokens_BN: torch.Tensor
    reveal_step_BN: torch.Tensor
    logprobs_BN: torch.Tensor
    sampling: ImageSampling

    @property
    def images(self) -> Images:
        return Images(tokens_BN=self.tokens_BN)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the reward asks of each image, Q = one per sampled answer, in the order of the images.

    Example: Targets(questions=(ImageQuestion(image=0, question="how many stars are in this image?"),), gold=("two",))
    """

    questions: tuple[ImageQuestion, ...]
    gold: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ScorePass:
    """One forward of an estimator, drawn once and reused by the policy, the old policy and the reference.

    shown_BN bool: tokens the model sees; scored_BN bool: tokens whose log-prob this pass yields;
    weight_BN float: their weight in the sum over the image (inverse share of what was drawn).
    """

    shown_BN: torch.Tensor
    scored_BN: torch.Tensor
    weight_BN: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """logprobs_BN and entropy_BN, at least float32, zero where the pass scores nothing. On request onehots_BNV: the
    scored tokens relaxed (relaxation.py), zero elsewhere."""

    logprobs_BN: torch.Tensor
    entropy_BN: torch.Tensor
    onehots_BNV: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ImageQuestion:
    """A question on image number `image` of a batch. Example: ImageQuestion(image=3, question="what color is the
    circle?")"""

    image: int
    question: str


@dataclass(frozen=True, kw_only=True)
class AnswerRollout:
    """Q sampled answers. tokens_QT int64 (end token included), mask_QT bool, logprobs_QT float32 under the acting
    policy.

    Example: texts=("red",), tokens_QT=[[17, 2]], mask_QT=[[True, True]]
    """

    questions: tuple[ImageQuestion, ...]
    texts: tuple[str, ...]
    tokens_QT: torch.Tensor
    mask_QT: torch.Tensor
    logprobs_QT: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Log-probs and entropy of given answers. logprobs_QT, entropy_QT float32, mask_QT bool; padding is zero."""

    logprobs_QT: torch.Tensor
    entropy_QT: torch.Tensor
    mask_QT: torch.Tensor
