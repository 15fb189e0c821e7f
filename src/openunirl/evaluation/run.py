"""Evaluates a model on both of its tasks: does it draw what it is told, does it see what is there, do the two agree?

In: a model, a world, prompts. Out: rows (one per generated image, one per reference image) and a summary (METHOD 5-7):
GenEval by the world's detector, understanding on reference images, both imbalance rates, self-reward and collusion gap.
Every accuracy carries n, the number of distinct prompts and a 95 % interval.

Departures: 1. reference images come from the world (of photographs: files that the detector calls right);
2. where several images are drawn per prompt, P(image wrong | answer right) counts every one of them.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from openunirl.config import EvalConfig
from openunirl.draws import key
from openunirl.evaluation.geneval import judge_pictures, summarize
from openunirl.evaluation.image_folder import digest, read_picture
from openunirl.evaluation.imbalance import accuracy, accuracy_by_task, imbalance
from openunirl.evaluation.intervals import paired_shares
from openunirl.evaluation.journal import batches
from openunirl.evaluation.kept import Job, Kept
from openunirl.models.protocol import UnifiedModel
from openunirl.tasks.worlds import Found, World
from openunirl.types import AnswerSampling, ImageQuestion, Images, Prompt

Report = Callable[[str, int, int], None]
"""Called as report(stage, done, total) for progress."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """generated: one row per drawn image (tag, prompt, question, expected, answer, answer_correct, correct, reason,
    metadata, details, index, sample, objects); references: one per reference image, without a verdict and with a digest
    of the picture; pictures uint8 [B, H, W, 3] in the order of `generated`."""

    summary: dict[str, Any]
    generated: list[dict[str, Any]]
    references: list[dict[str, Any]]
    pictures: np.ndarray


def evaluate(
    model: UnifiedModel,
    world: World,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    *,
    seed: int,
    reference_prompts: Sequence[Prompt] | None = None,
    report: Report = lambda *_: None,
    about: dict[str, Any] | None = None,
    trained: Collection[str] = (),
    kept: Kept | None = None,
) -> Evaluation:
    """`reference_prompts` default to `prompts`; they may be more. Where the world finds reference pictures instead of
    drawing them, at most as many are read. `trained`: the prompts that the model is trained on. `kept`: what an
    earlier call did of the same evaluation, and where this one keeps what it does. Deterministic in `seed`, whatever
    the batch size."""
    kept = kept or Kept()
    generated, pictures = draw_and_judge(model, world, prompts, config, seed, report, kept=kept)
    if world.found is None:
        references = _read_references(model, world, reference_prompts or prompts, config, seed, report, kept)
    else:
        found = world.found(prompts, len(reference_prompts or prompts))
        references = _read_found(model, world, found, config, report)
    return Evaluation(
        summary=summarize_rows(
            generated,
            references,
            world.label,
            trained,
            seed=seed,
            sampling=asdict(config.sampling),
            max_new_tokens=config.max_new_tokens,
            **(about or {}),
        ),
        generated=generated,
        references=references,
        pictures=pictures,
    )


def summarize_rows(
    generated: Sequence[dict[str, Any]],
    references: Sequence[dict[str, Any]],
    label: str,
    trained: Collection[str] = (),
    **about: Any,
) -> dict[str, Any]:
    """The summary that every evaluation writes; `about` is added as it is. Where `trained` holds the prompts of the
    training, "geneval" says how many of each task's are among them, and in "unseen" how those fare that are not.
    "unsettled": answers of which the judge could not tell whether they are right; they count as wrong."""
    geneval = asdict(summarize(generated))
    understanding = accuracy_by_task(references, "answer_correct")
    self_reward = accuracy(sum(row["answer_correct"] for row in generated), len(generated))
    for part, rows in ((geneval, generated), (understanding, references), (self_reward, generated)):
        part["distinct_prompts"] = len({row["prompt"] for row in rows})
        for tag, task in part.get("tasks", {}).items():
            told = {row["prompt"] for row in rows if row["tag"] == tag}
            task["distinct_prompts"] = len(told)
            if trained:
                task["trained_prompts"] = len(told & set(trained))
    if trained:
        unseen = [row for row in generated if row["prompt"] not in trained]
        geneval["unseen"] = accuracy(sum(row["correct"] for row in unseen), len(unseen))
        geneval["unseen"]["distinct_prompts"] = len({row["prompt"] for row in unseen})
    if all("settled" in row for row in (*generated, *references)):
        lost = {"own": generated, "references": references}
        about["unsettled"] = {
            name: accuracy(sum(not row["settled"] for row in rows), len(rows)) for name, rows in lost.items()
        }
    pairs = Counter((bool(row["answer_correct"]), bool(row["correct"])) for row in generated)
    gap, *ends = paired_shares(*(pairs[pair] for pair in ((True, True), (True, False), (False, True), (False, False))))
    return {
        "geneval": geneval,
        "understanding": understanding,
        "imbalance": imbalance(generated, references),
        "self_reward": self_reward["accuracy"],
        "self_reward_interval": self_reward,
        "collusion_gap": gap,
        "collusion_gap_interval": {"n": len(generated), "ci95": ends},
        "label": label,
        **about,
    }


# --------------------------------------------------------------------------------------------- the two halves


def to_uint8(pixels_BCHW: torch.Tensor) -> np.ndarray:
    """Floats in 0..1 [B, 3, H, W] -> uint8 [B, H, W, 3], truncated as the official tools do."""
    return (pixels_BCHW * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_pixels(pictures_BHWC: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in 0..1."""
    return torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2).float() / 255


def draw_and_judge(
    model: UnifiedModel,
    world: World,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    seed: int,
    report: Report = lambda *_: None,
    *,
    ask_too: bool = True,
    kept: Kept | None = None,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Rows and pictures of `num_images` images per prompt; without `ask_too` no question is asked on them."""
    if world.judge is None:
        raise ValueError("this world has no detector, so nothing can be judged in it")
    judge, held = world.judge(), kept or Kept()
    jobs = [(i, k) for i in range(len(prompts)) for k in range(config.num_images)]

    def make(missing: list[Job]) -> Iterator[list[dict[str, Any]]]:
        for part in batches(missing, config.batch_size):
            wanted = [prompts[i] for i, _ in part]
            seeds_B = key(seed, torch.tensor([i for i, _ in part]), torch.tensor([k for _, k in part]))
            images = model.sample_images([p.prompt for p in wanted], seeds_B, config.sampling).images
            drawn = to_uint8(model.decode(images))
            answers = ask(model, images, wanted, config.max_new_tokens) if ask_too else [""] * len(part)
            verdicts = judge_pictures(judge, [p.metadata() for p in wanted], list(drawn))
            rows: list[dict[str, Any]] = []
            for job, prompt, verdict, answer, picture in zip(part, wanted, verdicts, answers, drawn, strict=True):
                row = _row(world, prompt, answer) | {"correct": verdict.correct, "reason": verdict.reason}
                # GenEval's results.jsonl holds these two as JSON in a string
                row |= {"metadata": json.dumps(prompt.metadata()), "details": json.dumps(verdict.details)}
                rows.append(row | {"index": job[0], "sample": job[1], "objects": verdict.objects})
                held.keep(job, picture)
            yield rows

    return held.rows("drawing", {job: job for job in jobs}, make, report, drawn=True), held.pictures(jobs)


def _read_references(
    model: UnifiedModel,
    world: World,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    seed: int,
    report: Report,
    kept: Kept,
) -> list[dict[str, Any]]:
    pictures = world.references(prompts, seed)

    def make(missing: list[int]) -> Iterator[list[dict[str, Any]]]:
        for part in batches(missing, config.batch_size):
            asked = [prompts[index] for index in part]
            answers = ask(model, model.encode(to_pixels(pictures[list(part)])), asked, config.max_new_tokens)
            yield [
                _row(world, prompt, answer) | {"index": index, "sample": 0, "digest": digest(pictures[index].tobytes())}
                for index, prompt, answer in zip(part, asked, answers, strict=True)
            ]

    return kept.rows("reading", {(index, 0): index for index in range(len(prompts))}, make, report)


def _read_found(
    model: UnifiedModel, world: World, found: Sequence[Found], config: EvalConfig, report: Report
) -> list[dict[str, Any]]:
    """The same of pictures in files, of any size."""
    rows: list[dict[str, Any]] = []
    for part in batches(found, config.batch_size):
        read = [read_picture(each.file) for each in part]
        images = model.read_pictures([Image.fromarray(picture) for _, picture in read])
        answers = ask(model, images, [each.prompt for each in part], config.max_new_tokens)
        for each, (content, _), answer in zip(part, read, answers, strict=True):
            known = {"index": each.index, "sample": each.sample, "digest": content}
            rows.append(_row(world, each.prompt, answer) | known)
        report("reading", len(rows), len(found))
    return rows


def ask(model: UnifiedModel, images: Images, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    """Each prompt's own question on its image, answered greedily."""
    questions = [ImageQuestion(image=i, question=prompt.questions[0].question) for i, prompt in enumerate(prompts)]
    seeds_Q = torch.zeros(len(questions), dtype=torch.int64)
    return list(model.sample_answers(images, questions, seeds_Q, AnswerSampling(max_new_tokens=max_new_tokens)).texts)


def _row(world: World, prompt: Prompt, answer: str) -> dict[str, Any]:
    asked = prompt.questions[0]
    match = world.match(prompt.tag, asked.answer, answer)
    return {
        "tag": prompt.tag,
        "prompt": prompt.prompt,
        "question": asked.question,
        "expected": asked.answer,
        "answer": answer,
        "answer_correct": match.same,
        "settled": match.settled,
    }
