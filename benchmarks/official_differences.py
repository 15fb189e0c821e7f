"""By how much the detector's and the colour classifier's two ends differ from the packages that GenEval calls.

    pip download --no-deps -d DIR mmdet==2.28.2 torchvision==0.15.2 clip-benchmark==1.4.0
    pip install opencv-python-headless
    python benchmarks/official_differences.py --official DIR

mmdet's, torchvision's and clip-benchmark's own functions are taken out of their wheels in DIR and run alone: none of
the three is installed or imported. cv2 is imported, and called as mmcv 1.x calls it. Pictures are drawn (`--images`
takes others), smooth ones with sharp shapes and noise. The networks are small and random unless
`--detector-weights` and `--color-weights` name real ones: of random ones the scores spread without meaning, so that
verdicts say how far a rounding reaches and not how GenEval's score moves. Prints a table with command and commit.
"""

from __future__ import annotations

import argparse
import ast
import json
import numbers
import os
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig

from openunirl.evaluation import color
from openunirl.evaluation import detectors as ours
from openunirl.evaluation.geneval import ScoreParams, score
from openunirl.evaluation.image_folder import read_folder, read_picture
from openunirl.evaluation.weights import full_precision
from openunirl.provenance import commit
from openunirl.tasks.geneval import COLORS, GENEVAL_OBJECTS
from openunirl.types import Detection

SIZES = ((512, 512), (384, 384), (1024, 1024), (333, 517), (768, 1344), (1500, 1100), (200, 900))
PACKAGES = {
    "mmdet": ("mmdet/core/mask/utils.py", "mmdet/models/seg_heads/panoptic_fusion_heads/maskformer_fusion_head.py"),
    "torchvision": ("torchvision/transforms/functional.py",),
    "clip_benchmark": ("clip_benchmark/metrics/zeroshot_classification.py",),
}
GOLDEN = Path(os.environ.get("OPENUNIRL_GOLDEN") or Path(__file__).parents[1] / "tests" / "golden")


def imported_cv2() -> Any:
    try:
        import cv2  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.exit("cv2 is not installed: pip install opencv-python-headless (only this benchmark wants it)")
    return cv2


def official(folder: Path, package: str, name: str, **known: Any) -> Callable[..., Any]:
    """A function or method of a wheel, run with nothing but `known` around it."""
    wheels = sorted(folder.glob(f"{package}-*.whl"))
    if not wheels:
        sys.exit(f"{folder} holds no wheel of {package}: pip download --no-deps -d {folder} {package}, as in --help")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for file in PACKAGES[package]:
            for node in ast.walk(ast.parse(wheel.read(file))):
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    node.returns, node.decorator_list = None, []
                    for each in (*node.args.args, *node.args.kwonlyargs):
                        each.annotation = None
                    space = dict(known)
                    exec(compile(ast.Module(body=[node], type_ignores=[]), f"{package}/{file}", "exec"), space)
                    return space[name]
    raise ValueError(f"{wheels[0]} has no function {name}: take the version that --help names")


class Table:
    """Rows of differences."""

    def __init__(self) -> None:
        print("| what is compared | over | equal | largest difference | mean |\n|---|---|---|---|---|")

    def row(self, what: str, over: str, differences: list[np.ndarray], unit: str = "") -> None:
        flat = np.concatenate([np.abs(each).ravel().astype(np.float64) for each in differences])
        largest, mean = (f"{value:.3g}{unit}" for value in (flat.max(), flat.mean()))
        print(f"| {what} | {over} | {(flat == 0).mean():.2%} | {largest} | {mean} |", flush=True)

    def count(self, what: str, over: str, changed: int, of: int) -> None:
        print(f"| {what} | {over} | {of - changed} of {of} | {changed} changed | |", flush=True)


# -------------------------------------------------------------------------------------------------- what is seen


def drawn(rng: np.random.Generator, size: tuple[int, int], noise: bool) -> np.ndarray:
    """Soft colours with a few sharp rectangles and grain; or nothing but noise."""
    height, width = size
    if noise:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    for _ in range(6):
        y, x = rng.integers(0, height - 20), rng.integers(0, width - 20)
        picture[y : y + rng.integers(20, height // 2), x : x + rng.integers(20, width // 2)] = rng.integers(0, 256, 3)
    return (picture + rng.integers(-3, 4, picture.shape)).clip(0, 255).astype(np.uint8)


def pictures(folder: str | None, most: int, seed: int) -> Iterator[tuple[np.ndarray, bool]]:
    """(picture, whether it is noise)."""
    if folder:
        for each in read_folder(Path(folder), partial=True)[:most]:
            yield read_picture(each.file)[1], False
        return
    rng = np.random.default_rng(seed)
    for number in range(most):
        noise = number % 4 == 3
        yield drawn(rng, SIZES[number % len(SIZES)], noise), noise


def prepared(cv2: Any, image: np.ndarray) -> torch.Tensor:
    """As mmcv 1.x's imrescale, impad_to_multiple and imnormalize make it of what cv2.imread gave."""
    long, short = max(image.shape[:2]), min(image.shape[:2])
    scale = min(1333 / long, 800 / short)
    width, height = (int(side * scale + 0.5) for side in (image.shape[1], image.shape[0]))
    bgr = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (width, height), interpolation=cv2.INTER_LINEAR)
    below, right = -height % 32, -width % 32
    bgr = cv2.copyMakeBorder(bgr, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(128, 128, 128))
    pixels = cv2.cvtColor(bgr.astype(np.float32), cv2.COLOR_BGR2RGB)
    pixels = cv2.subtract(pixels, np.float64([[*ours.MEAN]]))
    pixels = cv2.multiply(pixels, 1 / np.float64([[*ours.STD]]))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


# ---------------------------------------------------------------------------------------------------- what is found


def small_detector() -> ours.InstanceNet:
    """Random, its class logits spread over both sides of GenEval's thresholds."""
    swin = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    swin |= {"window_size": 7, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=3, num_attention_heads=2, num_queries=20,
        id2label=dict(enumerate(GENEVAL_OBJECTS)),
    )  # fmt: skip
    net = ours.InstanceNet(config).eval().requires_grad_(False)
    net.class_predictor.weight.mul_(4 / net.class_predictor.weight.std() / 32**0.5)
    net.class_predictor.bias[-1] -= 4
    return net


class Blobs:
    """Stands in for a network where only what follows it is compared: masks of every place and size, some empty, and
    class probabilities from sure to undecided."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, pixels_13HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng([self.seed, *pixels_13HW.shape])  # the same for both ends
        classes = torch.tensor(rng.normal(0, 2.5, (1, 100, 81)), dtype=torch.float32)
        coarse = torch.tensor(rng.normal(-1.2, 1.5, (1, 100, 7, 7)), dtype=torch.float32)
        size = [side // 4 for side in pixels_13HW.shape[2:]]
        return classes, F.interpolate(coarse * 3, size, mode="bicubic", align_corners=False)


def found_officially(post: Any, net: Any, pixels: torch.Tensor, image: np.ndarray) -> ours.Instances:
    """mmdet's simple_test of head and fusion head, with its own instance_postprocess; sorted as GenEval needs it."""
    class_BQC, mask_BQhw = net(pixels[None])
    inner, original = ours.resized(image.shape[:2]), image.shape[:2]
    mask = F.interpolate(mask_BQhw, pixels.shape[1:], mode="bilinear", align_corners=False)[
        0, :, : inner[0], : inner[1]
    ]
    mask = F.interpolate(mask[:, None], original, mode="bilinear", align_corners=False)[:, 0]
    labels, boxes, masks = post(class_BQC[0], mask)
    order = np.lexsort((labels.numpy(), -boxes[:, 4].numpy()))
    return ours.Instances(
        class_K=labels.numpy()[order],
        score_K=boxes[:, 4].numpy()[order],
        box_K4=boxes[:, :4].numpy()[order],
        query_K=order,
        mask_K=np.arange(len(order)),
        masks_UHW=masks.numpy()[order],
    )


def found_here(net: Any, pixels: torch.Tensor, image: np.ndarray) -> ours.Instances:
    class_BQC, mask_BQhw = net(pixels[None])
    original = (image.shape[0], image.shape[1])
    told = ours.instances(class_BQC[0], mask_BQhw[0], inner=ours.resized(original), original=original)
    order = np.lexsort((told.class_K, -told.score_K))
    parts = {name: getattr(told, name)[order] for name in ("class_K", "score_K", "box_K4", "query_K", "mask_K")}
    return ours.Instances(**parts, masks_UHW=told.masks_UHW)


def matched(class_K: np.ndarray, other_K: np.ndarray) -> tuple[list[int], list[int]]:
    """The places of equal instances: the first of a class is the other's first of that class, and so on."""
    pairs = [
        pair
        for each in np.unique(class_K)
        for pair in zip(np.flatnonzero(class_K == each), np.flatnonzero(other_K == each), strict=False)
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def verdicts(told: ours.Instances) -> list[bool]:
    """Of "a photo of a X" at the threshold 0.3, and "two X" at 0.9, for every class."""
    found = ours.by_class(told)
    asked = [("single_object", 1), ("counting", 2)]
    return [
        score({"tag": tag, "include": [{"class": name, "count": n}]}, found, lambda *_: []).correct
        for name in GENEVAL_OBJECTS
        for tag, n in asked
    ]


# ------------------------------------------------------------------------------------------------------- the colour


def small_clip() -> CLIPModel:
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text, vision_config=text | {"patch_size": 14, "image_size": 224}, projection_dim=64)
    net = CLIPModel(config).eval().requires_grad_(False)
    for weight in net.parameters():
        weight.mul_(4.0)  # transformers' first weights are so small that all pictures look alike
    return net


def features(told: Any) -> torch.Tensor:
    return told if isinstance(told, torch.Tensor) else told.pooler_output


def squared_officially(place: Path) -> Callable[[Image.Image], Image.Image]:
    """torchvision's Resize(224) and CenterCrop(224) of a PIL picture, bicubic, as open_clip 2.20 composes them."""
    size_of = official(place, "torchvision", "_compute_resized_output_size")
    crop = official(
        place,
        "torchvision",
        "center_crop",
        torch=torch,
        numbers=numbers,
        _log_api_usage_once=lambda _: None,
        get_dimensions=lambda picture: (3, picture.height, picture.width),
        crop=lambda picture, top, left, height, width: picture.crop((left, top, left + width, top + height)),
    )

    def square(picture: Image.Image) -> Image.Image:
        height, width = size_of((picture.height, picture.width), [224])
        return crop(picture.resize((width, height), Image.Resampling.BICUBIC), [224, 224])

    return square


def prototypes(place: Path, weights: str | None, net: CLIPModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[C, D] of the colours: clip-benchmark's own zero_shot_classifier on this network, and ours."""
    known: dict[str, torch.Tensor] = {}
    if weights:
        tokenizer = color.read_parts(weights)[1]
    else:  # words do not matter to a random network: every prompt gets ids of its own

        def tokenizer(prompts: list[str], **_: Any) -> Any:
            ids = torch.stack([known.setdefault(p, torch.randint(1, 49405, (77,))) for p in prompts])
            ids[:, -1] = 49407
            out = SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
            out.to = lambda _: out
            return out

    classifier = object.__new__(color.ClipColors)
    classifier.net, classifier.tokenizer, classifier._known = net, tokenizer, {}
    build = official(
        place, "clip_benchmark", "zero_shot_classifier", torch=torch, F=F, tqdm=list, suppress=torch.no_grad
    )
    told = build(
        SimpleNamespace(encode_text=lambda ids: features(net.get_text_features(**ids))),
        lambda texts: _Ids(tokenizer(texts, padding=True, return_tensors="pt")),
        COLORS,
        [template.replace("{color}", "{c}").replace("{name}", name) for template in color.TEMPLATES],
        "cpu",
        amp=False,
    )
    return told.T, classifier.prototypes(name)


class _Ids(dict):
    def __init__(self, told: Any) -> None:
        super().__init__(input_ids=told.input_ids, attention_mask=told.attention_mask)

    def to(self, _: object) -> _Ids:
        return self


# ---------------------------------------------------------------------------------------------------------- all


def scorer(table: Table) -> None:
    """The golden cases: what the official evaluate_images.py said."""
    cases = [json.loads(line) for line in (GOLDEN / "geneval_cases.jsonl").read_text("utf-8").splitlines()]
    changed = 0
    for case in cases:
        found, colors = {}, {}
        for name, raws in case["detections"].items():
            found[name] = [Detection(box=tuple(raw["box"]), score=raw["score"]) for raw in raws]
            colors |= {id(each): raw["color"] for each, raw in zip(found[name], raws, strict=True)}

        def told(_: str, objects: list[Detection], colors: dict[int, str] = colors) -> list[str]:
            return [colors[id(each)] for each in objects]

        verdict = score(case["metadata"], found, told, ScoreParams(**case["params"]))
        changed += (verdict.correct, verdict.reason) != (case["expected"]["correct"], case["expected"]["reason"])
    table.count("scorer: verdicts and reasons", "golden cases", changed, len(cases))


def detector(table: Table, args: argparse.Namespace, seen: list[tuple[np.ndarray, bool]]) -> None:
    cv2, std = imported_cv2(), np.array(ours.STD)[:, None, None]
    pairs = [(ours.prepare(image), prepared(cv2, image), noise) for image, noise in seen]
    for kind in (False, True):
        levels = [((a - b).numpy() * std).round(3) for a, b, noise in pairs if noise == kind]
        if levels:
            what = "noise" if kind else "pictures"
            table.row("detector input, cv2", f"{len(levels)} {what}", levels, " grey levels")
    normal = [(a - b).numpy() for a, b, _ in pairs]
    table.row("the same, normalised", f"{len(seen)} pictures", normal)
    names = {"torch": torch, "F": F}
    mask2bbox = official(args.official, "mmdet", "mask2bbox", torch=torch)
    process = official(args.official, "mmdet", "instance_postprocess", mask2bbox=mask2bbox, **names)
    heads = SimpleNamespace(test_cfg={"max_per_image": 100}, num_classes=80, num_things_classes=80)
    network = ours.Mask2FormerDetector(args.detector_weights).net if args.detector_weights else small_detector()
    comparisons = (("detector output, mmdet, equal input", Blobs(args.seed), True), ("both ends of it", network, False))
    for what, net, alike in comparisons:
        parts: dict[str, list[np.ndarray]] = {"scores": [], "boxes": [], "masks": []}
        lost, all_of, flips, asked = 0, 0, 0, 0
        for (image, _), (mine, theirs, _) in zip(seen, pairs, strict=True):
            here = found_here(net, mine, image)
            there = found_officially(lambda *x: process(heads, *x), net, mine if alike else theirs, image)
            a_M, b_M = matched(here.class_K, there.class_K)
            lost, all_of = lost + len(here.class_K) - len(a_M), all_of + len(here.class_K)
            parts["scores"].append(here.score_K[a_M] - there.score_K[b_M])
            parts["boxes"].append(here.box_K4[a_M] - there.box_K4[b_M])
            masks = here.masks_UHW[here.mask_K[a_M]] != there.masks_UHW[there.mask_K[b_M]]
            parts["masks"].append(masks.mean((1, 2)) * 100)
            pair = [(a, b) for a, b in zip(verdicts(here), verdicts(there), strict=True) if a or b]
            flips, asked = flips + sum(a != b for a, b in pair), asked + len(pair)
        over = f"{all_of - lost} instances"
        for name, unit in (("scores", ""), ("boxes", " pixels"), ("masks", " % of the picture")):
            table.row(f"{what}: {name}", over, parts[name], unit)
        table.count(f"{what}: among the 100", f"{all_of} instances", lost, all_of)
        table.count(f"{what}: verdicts", f"{asked} right ones of {160 * len(seen)}", flips, asked)


def colours(table: Table, args: argparse.Namespace, seen: list[tuple[np.ndarray, bool]]) -> None:
    rng, square = np.random.default_rng(args.seed + 1), squared_officially(args.official)
    crops = []
    for number in range(args.crops):
        image = seen[number % len(seen)][0]
        height, width = (int(rng.integers(9, side)) for side in image.shape[:2])
        top, left = (int(rng.integers(0, a - b)) for a, b in zip(image.shape, (height, width), strict=False))
        crops.append(Image.fromarray(image[top : top + height, left : left + width]))
    pairs = [(color.square(each, 224), square(each)) for each in crops]
    levels = [np.array(a).astype(int) - np.array(b) for a, b in pairs]
    table.row("colour crops, torchvision", f"{len(crops)} crops", levels, " grey levels")
    net = color.load_whole(CLIPModel, args.color_weights) if args.color_weights else small_clip()
    theirs, mine = prototypes(args.official, args.color_weights, net, "dog")
    table.row("colour prompts' features, clip-benchmark", "10 colours", [(mine - theirs).numpy()])
    few = pairs[: args.logits]
    logits = []
    for part, half in ((0, False), (1, True)):
        pixels = color.to_clip([pair[part] for pair in few])
        with torch.autocast("cpu", torch.float16, enabled=half):
            seen_KD = F.normalize(features(net.get_image_features(pixel_values=pixels)), dim=-1)
            logits.append((100 * seen_KD @ (theirs if half else mine).T).float())
    table.row("colour logits, float16 autocast", f"{len(few)} crops", [(logits[0] - logits[1]).numpy()])
    changed = int((logits[0].argmax(1) != logits[1].argmax(1)).sum())
    table.count("colour verdicts, float16 autocast", f"{len(few)} crops", changed, len(few))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="folder of the wheels")
    parser.add_argument("--images", help="folder in GenEval's layout; default: pictures that are drawn here")
    parser.add_argument("--pictures", type=int, default=28)
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--logits", type=int, default=64, help="crops that the network sees")
    parser.add_argument("--detector-weights", help="folder or hub id; default: a small random Mask2Former")
    parser.add_argument("--color-weights", help="folder or hub id; default: a small random CLIP")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    print(f"command: {shlex.join(['python', *sys.argv])}\ncommit: {commit()}\ncv2 {imported_cv2().__version__}\n")
    seen, table = list(pictures(args.images, args.pictures, args.seed)), Table()
    with torch.inference_mode(), full_precision():
        scorer(table)
        colours(table, args, seen)
        detector(table, args, seen)


if __name__ == "__main__":
    main()
