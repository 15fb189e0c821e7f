"""What `evaluate --images` costs beside its networks: both end to end, over their bare forwards on the same inputs.

    python benchmarks/evaluate_images.py --pictures 4 --side 512

Random weights at the real sizes (Mask2Former Swin-S of 80 classes, CLIP ViT-L/14); every picture gets one object, whose
colour is asked. End to end: PNG decoding, resizing, both networks, post-processing, scoring, the journal; not what a
call does before (loading and fingerprinting weights, reading the folder, comparing its pictures). Bare: the same
networks on inputs that are ready. The aim is a ratio of at most 1.25. Prints a table with command and commit.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig

from openunirl.evaluation.color import BLANK, ClipColors, square, to_clip
from openunirl.evaluation.detectors import InstanceNet, Mask2FormerDetector, full_precision, prepare
from openunirl.evaluation.image_folder import read_folder
from openunirl.evaluation.image_scores import score_into_journal
from openunirl.evaluation.judges import PhotoJudge
from openunirl.generate import best_device
from openunirl.provenance import commit
from openunirl.tasks.geneval import COLORS, GENEVAL_OBJECTS
from openunirl.tasks.records import write_jsonl
from openunirl.types import Detection


def detector(device: torch.device) -> Mask2FormerDetector:
    swin = {"model_type": "swin", "embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}
    swin |= {"window_size": 7, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    config = Mask2FormerConfig(backbone_config=swin, id2label=dict(enumerate(GENEVAL_OBJECTS)))
    made = object.__new__(Mask2FormerDetector)
    made.net = InstanceNet(config).to(device).eval().requires_grad_(False)
    return made


def classifier(device: torch.device) -> ClipColors:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPConfig(vision_config=vision | {"patch_size": 14, "image_size": 224}, projection_dim=768)
    made = object.__new__(ClipColors)
    made.net, made.side = CLIPModel(config).to(device).eval().requires_grad_(False), 224
    made._known = {"dog": torch.nn.functional.normalize(torch.randn(len(COLORS), 768), dim=-1).to(device)}
    return made


class OneDog(PhotoJudge):
    """The whole work of detection; then one object stands in for what random weights find."""

    def detect(self, images):
        super().detect(images)
        masks = [np.tri(*image.shape[:2], dtype=bool) for image in images]
        boxes = [(0.0, 0.0, float(image.shape[1]), float(image.shape[0])) for image in images]
        return [{"dog": [Detection(box=box, score=0.9, mask=mask)]} for box, mask in zip(boxes, masks, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    device, rng = best_device(), np.random.default_rng(0)
    judge = OneDog(detector(device), classifier(device))
    net, clip = judge.detector.net, judge.classifier.net  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as place, torch.inference_mode(), full_precision():
        record = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"}
        for index in range(args.pictures):
            samples = Path(place) / f"{index:05d}" / "samples"
            samples.mkdir(parents=True)
            write_jsonl(samples.parent / "metadata.jsonl", [record])
            coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((args.side, args.side)).save(samples / "0000.png")
        pictures = read_folder(Path(place))
        images = [np.array(Image.open(picture.file)) for picture in pictures]
        ready = torch.stack([prepare(image, device) for image in images])
        crops = to_clip([square(Image.new("RGB", (args.side, args.side), BLANK), 224)]).to(device)

        @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # as anybody would run them on a GPU
        def bare() -> None:
            for part in ready.split(args.batch_size):
                net(part)
            for _ in images:
                clip.get_image_features(pixel_values=crops)

        def whole() -> None:
            score_into_journal(judge, pictures, Path(place) / "journal.jsonl", args.batch_size)

        times: dict[str, list[float]] = {"bare": [], "whole": []}
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        net(ready[:1])
        for _ in range(args.rounds):  # alternating, so that a busy machine slows both
            for name, work in (("bare", bare), ("whole", whole)):
                began = clock()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append((clock() - began) / args.pictures)
    best = {name: min(each) for name, each in times.items()}
    print(shlex.join(["python", *sys.argv]), "commit", commit(), "device", device, "threads", torch.get_num_threads())
    seconds = "CPU seconds" if device.type == "cpu" else "seconds"  # the former do not depend on who else computes
    print(f"| {args.side}x{args.side}, batch {args.batch_size} | {seconds} per picture, best of {args.rounds} |")
    print(f"|---|---|\n| bare forwards | {best['bare']:.3f} |\n| end to end | {best['whole']:.3f} |")
    print(f"| ratio | {best['whole'] / best['bare']:.3f} |")


if __name__ == "__main__":
    main()
