"""Checks a RunConfig before anything is loaded or written, so that a mistake costs no time.

In: a RunConfig. Out: nothing, or a ValueError that names the flag, its value and the fix. Torch-free.
"""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec
from typing import Any

from openunirl.config import LossConfig, RewardConfig, RunConfig

_AT_LEAST_ONE = (
    ("rollout", ("num_prompts", "num_generations", "num_questions", "num_answers", "max_new_tokens", "batch_size")),
    ("loss", ("num_iterations", "num_draws", "replay_size")),
    ("optim", ("gradient_accumulation_steps",)),
    ("train", ("max_steps", "save_total_limit")),
    ("eval", ("num_images", "max_new_tokens", "batch_size")),
)
_NOT_NEGATIVE = (
    ("loss", ("image_coef", "answer_coef", "reward_coef", "beta", "epsilon", "num_scored_steps", "replay_steps")),
    ("lora", ("rank",)),
    ("optim", ("lr", "weight_decay", "warmup_steps", "decay")),
    ("train", ("save_steps", "eval_steps", "stall_steps", "swa_steps")),
    ("eval", ("num_prompts", "num_references", "during_prompts")),
)
_POSITIVE = (
    ("lora", ("alpha",)),
    ("optim", ("adam_epsilon", "max_grad_norm")),
)
LARGEST_WEIGHT = 1e6
"""Of a reward source; rewards end at reward_functions.LARGEST, so that squares of weighted sums are float32 numbers."""


def check(config: RunConfig) -> None:
    """Errors: ValueError for the first value that cannot work."""
    _check_finite(config)
    for sections, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for section, names in sections:
            for name in names:
                value = getattr(getattr(config, section), name)
                if value < least:
                    raise ValueError(f"{_flag(section, name)} is {value}, wanted at least {least}")
    for section, names in _POSITIVE:
        for name in names:
            if (value := getattr(getattr(config, section), name)) <= 0:
                raise ValueError(f"{_flag(section, name)} is {value}, wanted more than 0")
    if config.loss.epsilon_high is not None and config.loss.epsilon_high < 0:
        raise ValueError(f"--loss.epsilon-high is {config.loss.epsilon_high}, wanted at least 0")
    if not 0 < config.loss.mask_time <= 1:
        raise ValueError(f"--loss.mask-time is {config.loss.mask_time}, wanted a time above 0 and at most 1")
    if config.loss.mask_time < 1 and config.loss.estimator not in ("remask", "training_loss"):
        raise ValueError(
            f"--loss.mask-time is {config.loss.mask_time} with --loss.estimator {config.loss.estimator}, which "
            "draws no random masks; use remask or training_loss, or leave it out"
        )
    if not 0 < config.train.wise_ft_alpha <= 1:
        raise ValueError(
            f"--train.wise-ft-alpha is {config.train.wise_ft_alpha}, wanted more than 0 (the base alone) and at most 1"
        )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= (value := getattr(config.optim, name)) < 1:
            raise ValueError(f"{_flag('optim', name)} is {value}, wanted at least 0 and less than 1")
    check_weights(config.reward)
    for section in ("rollout", "eval"):
        sampling = getattr(config, section).sampling
        if sampling.num_timesteps < 1 or sampling.temperature <= 0:
            raise ValueError(
                f"--{section}.sampling wants num-timesteps >= 1 and temperature > 0; they are "
                f"{sampling.num_timesteps} and {sampling.temperature}"
            )
    drawn = config.rollout.sampling
    if drawn.top_k or drawn.top_p != 1:
        raise ValueError(
            f"--rollout.sampling has top-k {drawn.top_k} and top-p {drawn.top_p}: a training rollout draws from the "
            "whole policy (0 and 1), or the KL to the base is infinite"
        )
    for name in ("base_guidance_scale", "base_temperature"):
        value = getattr(config.rollout, name)
        if value is not None and (config.rollout.drawn_by != "base" or value <= 0):
            raise ValueError(
                f"{_flag('rollout', name)} is {value}: it is how the base draws, above 0; add --rollout.drawn-by base, "
                "or leave it out"
            )
    _METHODS[config.loss.method](config)
    _check_halves(config.loss)
    _check_relaxation(config)
    _check_shuffle(config)
    _check_reference(config)
    _check_replay(config)
    images = config.rollout.num_prompts * config.rollout.num_generations
    if config.optim.gradient_accumulation_steps > images:
        raise ValueError(
            f"--optim.gradient-accumulation-steps is {config.optim.gradient_accumulation_steps}, "
            f"more than the {images} images of a step"
        )
    for tracker in config.train.report_to:
        if find_spec(tracker) is None:
            raise ValueError(f"--train.report-to {tracker}: the package is not installed; pip install {tracker}")


def check_weights(reward: RewardConfig) -> None:
    """Errors: ValueError for weights that do not fit the sources."""
    weights, sources = reward.weights, reward.sources
    usable = all(abs(weight) <= LARGEST_WEIGHT for weight in weights)  # nan is not
    if weights and (len(weights) != len(sources) or not usable or not any(weights)):
        told = f"{' '.join(map(str, weights))} for --reward.sources {' '.join(sources)}"
        raise ValueError(
            f"--reward.weights: {told}; wanted one finite number for each (at most {LARGEST_WEIGHT:g} in size), not "
            "all 0"
        )


def _check_finite(section: Any, path: str = "") -> None:
    """All numbers of a config, whatever they are for."""
    for each in dataclasses.fields(section):
        value, name = getattr(section, each.name), f"{path}.{each.name}" if path else each.name
        if dataclasses.is_dataclass(value):
            _check_finite(value, name)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} is {value}, wanted a finite number")


def _check_halves(loss: LossConfig) -> None:
    """What is accepted must do something. Errors: ValueError for coefficients that leave nothing of it."""
    if not loss.image_coef and not loss.answer_coef:
        raise ValueError("--loss.image-coef and --loss.answer-coef are both 0: nothing would be trained")
    for name, value in (("--loss.reward-coef", loss.reward_coef), ("--loss.end-to-end", loss.end_to_end)):
        if value and not loss.image_coef:
            raise ValueError(
                f"{name} is {value} and --loss.image-coef 0: the image coefficient weights all that reaches the image, "
                f"so it would do nothing; give --loss.image-coef above 0, or leave {name} out"
            )
    if loss.end_to_end and not loss.answer_coef and not loss.reward_coef:
        raise ValueError(
            "--loss.end-to-end with --loss.answer-coef 0 and --loss.reward-coef 0: no gradient would reach the image "
            "through the answers; give one of them a weight, or use --loss.no-end-to-end"
        )


def _check_grpo(config: RunConfig) -> None:
    rollout, loss = config.rollout, config.loss
    if rollout.answer_temperature <= 0:
        raise ValueError(
            f"--rollout.answer-temperature is {rollout.answer_temperature}: GRPO needs sampled answers, above 0"
        )
    if rollout.drawn_by != "policy":
        raise ValueError(
            f"--rollout.drawn-by is {rollout.drawn_by}: GRPO's ratio is that of the policy that drew; use policy, or "
            "--loss.method sft"
        )
    if loss.gold_answers != LossConfig().gold_answers:
        raise ValueError(f"--loss.gold-answers is {loss.gold_answers}: GRPO learns sampled answers; leave it out")
    if rollout.num_generations == 1 and (loss.image_coef or rollout.num_answers == 1):
        raise ValueError(
            "--rollout.num-generations is 1: GRPO compares the images of a prompt, so every advantage would be 0; use "
            "at least 2, or --loss.method sft"
        )


def _check_sft(config: RunConfig) -> None:
    rollout, loss = config.rollout, config.loss
    if rollout.answer_temperature < 0:
        raise ValueError(f"--rollout.answer-temperature is {rollout.answer_temperature}, wanted at least 0 (greedy)")
    if loss.beta:
        raise ValueError(
            f"--loss.beta is {loss.beta}: gold answers and kept images are no samples of the policy, so --loss.method "
            "sft has no KL to weight; use --loss.beta 0"
        )
    for name in ("epsilon_high", "loss_type", "importance_sampling_level"):
        value, default = getattr(loss, name), getattr(LossConfig(), name)
        if value != default:
            raise ValueError(
                f"{_flag('loss', name)} is {value}: it belongs to GRPO; leave it out with --loss.method sft"
            )
    if loss.end_to_end and not loss.answer_coef:
        raise ValueError(
            "--loss.answer-coef is 0: end-to-end SFT has the answers' loss only; use --loss.no-end-to-end to train the "
            "images alone"
        )
    keeps = loss.gold_answers == "kept" or not loss.end_to_end
    if keeps and loss.image_coef and config.reward.kind != "answer":
        raise ValueError(
            f"--reward.kind is {config.reward.kind}: SFT keeps images whose answers were judged right, which wants the "
            "verdicts of --reward.kind answer (or --loss.end-to-end with all gold answers, or --loss.image-coef 0)"
        )
    if not loss.end_to_end and loss.image_coef and any(weight < 0 for weight in config.reward.weights):
        raise ValueError(
            f"--reward.weights {' '.join(map(str, config.reward.weights))}: SFT keeps images of which every source "
            "says 1, which a negative weight cannot ask for; give weights of at least 0"
        )


_METHODS = {"grpo": _check_grpo, "sft": _check_sft}


def _check_relaxation(config: RunConfig) -> None:
    loss, reward = config.loss, config.reward
    if loss.reward_coef and not (loss.method == "grpo" and loss.end_to_end and reward.soft_judges):
        raise ValueError(
            f"--loss.reward-coef is {loss.reward_coef}: it follows the gradient of a soft reward, which wants "
            "--loss.method grpo, --loss.end-to-end, --reward.kind probability and self or frozen in --reward.sources"
        )
    scale = config.rollout.sampling.guidance_scale
    if loss.end_to_end and not loss.logprob_guidance and scale != 1:
        raise ValueError(
            f"--loss.no-logprob-guidance with --loss.end-to-end and --rollout.sampling.guidance-scale {scale}: the "
            "image would be relaxed as the policy without guidance, which did not draw it; use "
            "--loss.logprob-guidance, or --rollout.sampling.guidance-scale 1"
        )
    for name in ("tau", "final_tau"):
        value = getattr(config.loss.relaxation, name)
        if value is not None and value <= 0:
            raise ValueError(f"{_flag('loss.relaxation', name)} is {value}: a temperature must be above 0")


def _check_reference(config: RunConfig) -> None:
    every = config.loss.ref_model_sync_steps
    if every < 0:
        raise ValueError(f"--loss.ref-model-sync-steps is {every}, wanted at least 0 (0: never)")
    if every and (config.lora.rank or config.train.shard):
        other = f"--lora.rank {config.lora.rank}" if config.lora.rank else "--train.shard"
        raise ValueError(
            f"--loss.ref-model-sync-steps is {every} with {other}: no process holds a whole copy of the base that "
            "could follow the policy; leave one of them out"
        )
    kind = config.train.reference
    if config.lora.targets and not config.lora.rank:
        raise ValueError(
            f"--lora.targets {' '.join(config.lora.targets)} with --lora.rank 0: no layer gets an adapter; give a "
            "rank, or leave the targets out"
        )
    if config.lora.rank and kind != "copy":
        raise ValueError(
            f"--train.reference is {kind} and --lora.rank {config.lora.rank}: with adapters there is no copy of the "
            "base; leave --train.reference out"
        )
    if kind == "cpu" and config.train.shard:
        raise ValueError(
            "--train.reference is cpu with --train.shard: shares of a copy stay where they are; leave one of them out"
        )
    if kind == "cpu" and config.loss.reward_coef and "frozen" in config.reward.soft_judges:
        raise ValueError(
            "--train.reference is cpu, and --loss.reward-coef follows the frozen judge's gradient, which needs it "
            "where the policy is; use --train.reference copy, or --reward.sources self"
        )


def _check_replay(config: RunConfig) -> None:
    loss, steps = config.loss, config.loss.replay_steps
    if not steps:
        return
    if loss.method != "sft" or loss.end_to_end or loss.answer_coef:
        raise ValueError(
            f"--loss.replay-steps is {steps}: only the images that SFT keeps are imitated again; use --loss.method sft "
            "--loss.no-end-to-end --loss.answer-coef 0, or --loss.replay-steps 0"
        )
    if steps > config.train.max_steps:
        raise ValueError(
            f"--loss.replay-steps is {steps}, more than --train.max-steps {config.train.max_steps}: the first "
            f"{steps} steps only collect images, so that nothing would be trained"
        )
    if config.train.shard:
        raise ValueError(
            f"--loss.replay-steps is {steps} with --train.shard: processes hold different numbers of images, and would "
            "gather shares at different times; leave one of them out"
        )


def _check_shuffle(config: RunConfig) -> None:
    rollout, loss = config.rollout, config.loss
    if not config.reward.shuffle:
        return
    if loss.method == "sft" and loss.answer_coef and loss.gold_answers == "all":
        raise ValueError(
            f"--reward.shuffle with --loss.method sft and --loss.answer-coef {loss.answer_coef}: the gold answers are "
            "trained whatever the rewards are, so it would be no control; use --loss.gold-answers kept, "
            "--loss.answer-coef 0 without --loss.end-to-end, or --loss.method grpo"
        )
    if loss.reward_coef and rollout.num_prompts < 2:
        raise ValueError(
            f"--rollout.num-prompts is {rollout.num_prompts}: with --loss.reward-coef, --reward.shuffle asks of an "
            "image what other prompts of its process ask; give at least 2"
        )


def _flag(section: str, name: str) -> str:
    return f"--{section}.{name.replace('_', '-')}"
