"""The world of a training run: its prompts, who judges its pictures, where its reference pictures come from.

In: a RunConfig. Out: a World, the run's prompts in order, and in one sentence what the run does not measure.
A world of drawn pictures brings its own judge and references. Photographs want a detector, a colour classifier and a
folder of references (evaluation/photo_world.py): they are read before the run writes anything, and only where an
evaluation or the reward "detector" asks for them.
"""

from __future__ import annotations

import dataclasses

import torch

from openunirl.config import RunConfig
from openunirl.tasks.geneval import TRAINING_OBJECTS, training_prompts
from openunirl.tasks.records import read_asked, read_prompts
from openunirl.tasks.worlds import WORLDS, World
from openunirl.types import Prompt


def open_world(config: RunConfig, device: torch.device) -> World:
    """The world; photographs' judge is on `device`. Errors: ValueError, naming the flags, for a detector, a colour
    classifier or references that cannot be read."""
    world, photos = WORLDS[config.world](), config.photos
    if not loads_detector(config):
        return world
    from openunirl.evaluation.photo_world import with_detector

    try:
        judged = with_detector(world, photos, device)
    except ValueError as error:
        raise ValueError(
            f"{error}. The run's detector is --photos.detector-weights with --photos.color-weights, its references "
            "--photos.references; --photos.detector-weights None trains without scoring what is drawn"
        ) from None
    if config.reward.sources != ("detector",) or judged.classes is None:
        return judged
    # any other prompt would be a step without a reward
    names = [name for name in TRAINING_OBJECTS if name in judged.classes]
    return dataclasses.replace(judged, training_prompts=lambda n, seed: training_prompts(n, seed, names))


def loads_detector(config: RunConfig) -> bool:
    """Whether every process of the run holds a detector and a colour classifier."""
    judged = config.eval.num_prompts or config.train.eval_steps or "detector" in config.reward.sources
    return bool(judged) and WORLDS[config.world]().judge is None and config.photos.detector_weights is not None


def evaluates(config: RunConfig) -> bool:
    """Whether the run draws and judges pictures, before and after it or in between."""
    judge = WORLDS[config.world]().judge is not None or config.photos.detector_weights is not None
    return bool(config.eval.num_prompts or config.train.eval_steps) and judge


def not_measured(config: RunConfig, world: World, prompts: list[Prompt]) -> list[str]:
    """What a run leaves out, in sentences. Errors: ValueError where its only reward applies to no prompt."""
    told: list[str] = []
    evaluated = config.eval.num_prompts or config.train.eval_steps
    if not evaluated or world.judge is None:
        why = "--photos.detector-weights is None" if evaluated else "--eval.num-prompts and --train.eval-steps are 0"
        told.append(f"what this run draws is not scored ({why}); score its checkpoints with openunirl evaluate")
    elif world.found is not None and config.photos.references is None:
        told.append("understanding is not measured in this run: that wants --photos.references DIR")
    if "detector" in config.reward.sources:
        known = sum(world.can_judge(prompt.metadata()) for prompt in prompts)
        if not known and config.reward.sources == ("detector",):
            raise ValueError(
                f"--reward.sources detector: the detector knows the objects and colors of none of the {len(prompts)} "
                "prompts, so there would be no reward; train on prompts of COCO's 80 things, or add the source self"
            )
        if known < len(prompts):
            told.append(
                f"the detector knows the objects and colors of {known} of the run's {len(prompts)} prompts; for the "
                "others it gives no reward"
            )
    return told


def prompts_of_run(config: RunConfig, world: World, processes: int) -> list[Prompt]:
    """Every prompt of the run in order: from a file, gone round, or from the world.

    Errors: ValueError for a file that cannot be read, or with a prompt that asks nothing.
    """
    count = config.train.max_steps * config.rollout.num_prompts * processes
    if config.prompt_file is None:
        return world.training_prompts(count, config.seed)
    own = (read_asked if config.world == "geneval" else read_prompts)(config.prompt_file)
    for number, prompt in enumerate(own, start=1):  # one a line
        if not prompt.questions:
            raise ValueError(
                f"{config.prompt_file}:{number}: the prompt {prompt.prompt!r} has no question: training needs one with "
                'its gold answer; add "question" and "answer" to the line'
            )
    return [own[i % len(own)] for i in range(count)]
