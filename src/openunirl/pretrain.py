"""Trains the bundled tiny models from nothing on the synthetic world: image tokenizer first, then the unified model.

In: a PretrainConfig. Out: a folder that `load_model` reads. Two stages:
  pictures -> image tokenizer (frozen afterwards) -> (prompt, tokens) to draw and (tokens, questions, answers) to
  answer.
The base is left unfinished on purpose: many questions and few drawings, so that it judges well and draws badly, which
is the imbalance that the paper starts from. Its understanding also sees damaged pictures and questions whose honest
answer is "none", so that the judge does not merely repeat what it is asked about.

Shapes: B pictures, N image tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openunirl.config import EvalConfig, ModelConfig
from openunirl.config_pretrain import PretrainConfig, check
from openunirl.disk import is_occupied, naming, remove, whole
from openunirl.draws import key
from openunirl.evaluation.run import evaluate, to_pixels
from openunirl.models.protocol import PretrainBatch, UnifiedModel, load_model
from openunirl.models.tiny import build
from openunirl.optim import build_optimizer, fast_dtype, lr_factor
from openunirl.presets import bundled
from openunirl.provenance import about
from openunirl.tasks import shapes, shapes_examples
from openunirl.tasks.shapes_oracle import CELL
from openunirl.tasks.worlds import WORLDS
from openunirl.types import ImageQuestion, Images, ImageSampling, Prompt

SETTLING = 512  # pictures on which a trained image tokenizer's codes are counted


def pretrain(config: PretrainConfig, command: str | None = None) -> Path:
    """Trains and saves; returns the folder. Its pretrain.json holds `command`, the configuration, and under
    "started_from" the pretrain.json of the weights that it continued from, and so on: how to make it again.

    Errors: ValueError for values that cannot work and for a folder that exists and is not empty; OSError that names
    what a full disk refused: what was saved before is whole, and nothing else is there.
    """
    check(config)
    output = Path(config.output_dir or f"runs/{config.name}")
    if is_occupied(output):
        raise ValueError(f"{output} exists and is not empty: choose another --output-dir")
    output.mkdir(parents=True, exist_ok=True)
    model = build(config.name, shapes.vocabulary(), config.seed)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    ) as progress:
        if config.start_from is not None:
            model = load_model(ModelConfig(weights=config.start_from, attn_implementation="eager"))
        elif config.image_tokenizer is None:
            train_tokenizer(model, config, progress)
            with whole(output / "image-tokenizer-only") as partial:
                model.save(partial)
        else:
            trained = load_model(config.image_tokenizer).image_tokenizer
            model.image_tokenizer.load_state_dict(trained.state_dict())
        train_model(model, config, progress, output)
    _save_into(output, model)
    told = asdict(config) | {"question_weights": question_weights(config), "dtype": str(fast_dtype())}
    told |= about(command or f"pretrain({config})") | {"started_from": _origin(config.start_from)}
    with whole(output / "pretrain.json") as partial:
        partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return output


def _origin(start_from: str | None) -> dict[str, Any] | str | None:
    """The pretrain.json of a model folder or of the run that it is a step of; else the name as it was given."""
    if start_from is None:
        return None
    folder = Path(bundled(start_from) or start_from)
    found = [place / "pretrain.json" for place in (folder, folder.parent) if (place / "pretrain.json").is_file()]
    return json.loads(found[0].read_text(encoding="utf-8")) if found else start_from


def _save_into(output: Path, model: UnifiedModel) -> None:
    """The finished model beside what is there; config.json, without which nothing loads, comes last."""
    finished = output / "finished"
    with whole(finished) as partial:
        model.save(partial, torch.float16)
    for part in sorted(finished.iterdir(), key=lambda path: path.name == "config.json"):
        remove(output / part.name)
        part.replace(output / part.name)
    finished.rmdir()


def probe(model: UnifiedModel, config: PretrainConfig) -> dict[str, float]:
    """A small evaluation on validation prompts: how the base draws (guided, 8 steps) and understands, by task."""
    sampling = ImageSampling(num_timesteps=8, guidance_scale=2.0)
    world = WORLDS["shapes"]()
    asked = world.evaluation_prompts("validation", 4 * config.probe_prompts, config.seed)
    drawn = asked[: config.probe_prompts]
    summary = evaluate(
        model, world, drawn, EvalConfig(sampling=sampling), seed=config.seed, reference_prompts=asked
    ).summary
    tasks = {f"answer_{tag}": task["accuracy"] for tag, task in summary["understanding"]["tasks"].items()}
    tasks |= {f"draw_{tag}": task["accuracy"] for tag, task in summary["geneval"]["tasks"].items()}
    told = {"drawing": summary["geneval"]["overall"], "understanding": summary["understanding"]["overall"]}
    return told | {"collusion_gap": summary["collusion_gap"]} | tasks


# ------------------------------------------------------------------------------------------ image tokenizer


def train_tokenizer(model: UnifiedModel, config: PretrainConfig, progress: Progress) -> None:
    """Reconstruction of scenes, damaged ones included; first of crops around things (most of a picture is empty, and
    a tokenizer that sees mainly background collapses to one code), then of whole pictures."""
    rng = np.random.default_rng([config.seed, 1])
    net = model.image_tokenizer.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.tokenizer_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    bar = progress.add_task("image tokenizer", total=config.tokenizer_steps)
    for step in range(config.tokenizer_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.tokenizer_lr * lr_factor(step, config.tokenizer_steps, warmup=50, decay=0.4)
        scenes = [
            shapes_examples.random_example(rng, negatives=0.0, damaged=0.3)[0] for _ in range(config.tokenizer_batch)
        ]
        pictures = shapes.render_batch(scenes, rng)
        if step < 0.8 * config.tokenizer_steps:
            pictures = np.stack([_crop(picture, scene, rng) for picture, scene in zip(pictures, scenes, strict=True)])
        with _autocast():
            loss = model.tokenizer_loss(to_pixels(pictures))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.update(bar, advance=1, description=f"image tokenizer  loss {loss.item():.4f}")
    net.requires_grad_(False).eval()
    scenes = [shapes_examples.random_example(rng, negatives=0.0, damaged=0.3)[0] for _ in range(SETTLING)]
    model.settle_tokenizer(to_pixels(shapes.render_batch(scenes, rng)))


def _crop(picture_HWC: np.ndarray, scene: shapes.Scene, rng: np.random.Generator, cells: int = 4) -> np.ndarray:
    """A window of `cells` x `cells` image tokens that holds one whole thing, aligned with the token grid."""
    thing = scene.things[rng.integers(len(scene.things))]
    limit = picture_HWC.shape[0] // CELL - cells
    left, top = (int(np.clip(at - rng.integers(2), 0, limit)) * CELL for at in (thing.column, thing.row))
    return picture_HWC[top : top + cells * CELL, left : left + cells * CELL]


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() == torch.bfloat16)


# -------------------------------------------------------------------------------------------- unified model


def train_model(model: UnifiedModel, config: PretrainConfig, progress: Progress, output: Path) -> None:
    batches = pretrain_batches(model, config)
    if config.teacher_guidance:
        trained = [parameter for parameter in model.net.parameters() if parameter.requires_grad]
        model.freeze_reference()
        for parameter in trained:  # a family may freeze what sees, for self-improvement; here it goes on learning
            parameter.requires_grad_(True)
    optimizers = build_optimizer(model.net, lr=config.lr, weight_decay=config.weight_decay, name=config.optimizer)
    bar = progress.add_task("unified model", total=config.steps)
    start = time.monotonic()
    for step in range(config.steps):
        factor = lr_factor(step, config.steps, warmup=config.warmup_steps, decay=config.decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factor
        with _autocast():
            draw_loss, answer_loss = model.pretrain_loss(next(batches))
        loss = config.draw_coef * draw_loss + config.answer_coef * answer_loss
        if not torch.isfinite(loss):
            raise ValueError(f"step {step + 1}: the loss is {loss.item()}; start again with a lower --lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        told = f"unified model  draw {draw_loss.item():.3f}  answer {answer_loss.item():.3f}"
        progress.update(bar, advance=1, description=told)
        if (step + 1) % config.probe_steps == 0 or step + 1 == config.steps:
            row = {"step": step + 1, "minutes": (time.monotonic() - start) / 60, "draw_loss": draw_loss.item()}
            row |= {"answer_loss": answer_loss.item()} | probe(model, config)
            with naming(output / "pretrain.jsonl"), (output / "pretrain.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            told = {name: row[name] for name in ("step", "minutes", "drawing", "understanding", "collusion_gap")}
            progress.console.print(told)
            with whole(output / f"step-{step + 1:06d}") as partial:  # training can be stopped, and continued from here
                model.save(partial)


def pretrain_batches(model: UnifiedModel, config: PretrainConfig) -> Iterator[PretrainBatch]:
    """Endless batches from a pool of scenes that is encoded once and gone through in random order."""
    rng = np.random.default_rng([config.seed, 2])
    to_draw = config.pool if config.draw_batch else 1
    drawn = [shapes_examples.training_example(rng, config.near_misses) for _ in range(to_draw)]
    asked = [
        shapes_examples.random_example(
            rng,
            config.negatives,
            config.damaged,
            question_weights(config),
            both_sides=config.both_sides,
            places=config.places,
        )
        for _ in range(config.pool)
    ]
    drawn_images = _read(model, [scene for _, scene in drawn], rng, as_drawn=True)
    asked_images = _read(model, [scene for scene, _ in asked], rng)
    prompts: list[Prompt] = [prompt for prompt, _ in drawn]
    step = 0
    teacher = None
    if config.teacher_guidance:
        teacher = ImageSampling(guidance_scale=config.teacher_guidance, temperature=config.teacher_temperature)
    while True:
        pick_draw = torch.from_numpy(rng.integers(to_draw, size=config.draw_batch))
        pick_ask = torch.from_numpy(rng.integers(config.pool, size=config.ask_batch))
        texts = ["" if rng.random() < config.condition_dropout else prompts[i].prompt for i in pick_draw.tolist()]
        asking = [(row, question) for row, i in enumerate(pick_ask.tolist()) for question in asked[i][1]]
        yield PretrainBatch(
            prompts=tuple(texts),
            drawn=drawn_images.select(pick_draw),
            seeds_B=key(config.seed, step, torch.arange(config.draw_batch)),
            asked=asked_images.select(pick_ask),
            questions=tuple(ImageQuestion(image=row, question=question.question) for row, question in asking),
            answers=tuple(question.answer for _, question in asking),
            teacher=teacher,
        )
        step += 1


def question_weights(config: PretrainConfig) -> dict[str, float]:
    """Task type -> how often it is asked about."""
    return dict(shapes_examples.QUESTION_WEIGHTS) | {"position": config.position_weight}


def _read(
    model: UnifiedModel,
    scenes: list[shapes.Scene],
    rng: np.random.Generator,
    *,
    as_drawn: bool = False,
    batch: int = 64,
) -> Images:
    """Pictures of the scenes: as the model would draw them (codes), or as it sees them. Where it sees pixels, every
    second batch goes through the image tokenizer, because that is how it sees its own drawings."""
    parts: list[Images] = []
    for start in range(0, len(scenes), batch):
        pixels = to_pixels(shapes.render_batch(scenes[start : start + batch], rng))
        part = Images(tokens_BN=model.tokenize(pixels)) if as_drawn else model.encode(pixels)
        if part.pixels_BCHW is not None and (start // batch) % 2:
            part = Images(pixels_BCHW=model.decode(Images(tokens_BN=model.tokenize(pixels))))
        parts.append(part)
    if parts[0].pixels_BCHW is not None:
        return Images(pixels_BCHW=torch.cat([part.pixels_BCHW for part in parts if part.pixels_BCHW is not None]))
    return Images(tokens_BN=torch.cat([part.tokens_BN for part in parts if part.tokens_BN is not None]))
