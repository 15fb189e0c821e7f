"""Configuration: frozen dataclasses, torch-free. The docstring under each field is its --help text.

In: presets.py and the command line (tyro). Out: one RunConfig per run, written to the run directory as config.json.
Names follow TRL's GRPOConfig where TRL has the thing, GenEval and METHOD elsewhere.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from openunirl.types import ImageSampling

META_DETECTOR = "facebook/mask2former-swin-small-coco-instance"
OPENAI_CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint, and where its parts are."""

    weights: str
    """Folder, file or hub id (owner/name) of the checkpoint."""
    family: str | None = None
    """Model family; read from the checkpoint's config.json where it says so."""
    image_tokenizer: str | None = None
    """Folder or hub id of the image tokenizer, where the checkpoint does not hold it (Show-o: showlab/magvitv2)."""
    tokenizer: str | None = None
    """Folder or hub id of the text tokenizer, where the checkpoint does not hold it (Show-o: microsoft/phi-1_5)."""
    max_text_len: int | None = None
    """Text length in tokens; None takes the checkpoint's own."""
    num_image_tokens: int | None = None
    """Tokens per image; needed only where the checkpoint has no config.json."""
    roles: tuple[str, str] | None = None
    """What the checkpoint's prompts call user and assistant (Janus; others refuse it); None takes the checkpoint's
    own."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel. On a CPU at tiny sizes "eager" has the faster backward."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How a training batch is made."""

    num_prompts: int = 8
    """Prompts per step and process."""
    num_generations: int = 8
    """G: images per prompt; they form the group that a reward is compared within."""
    num_questions: int = 1
    """Questions asked on each image, from the prompt's list (its own question first)."""
    num_answers: int = 1
    """K: answers sampled per question (the paper: 1)."""
    sampling: ImageSampling = field(default_factory=ImageSampling)
    """How training images are drawn."""
    drawn_by: Literal["policy", "base"] = "policy"
    """Who draws: the policy that is trained, or (SFT only) the frozen base, whose images cannot drift. Answers and
    verdicts are the policy's in any case, and end-to-end so is the relaxation: its conditional noise then takes the
    token for one that the policy drew, which is less true the further the two are apart."""
    base_guidance_scale: float | None = None
    """Guidance of the base where it draws; None = the policy's own. More of it is imitated along with the verdicts."""
    base_temperature: float | None = None
    """Temperature of the base where it draws; None = the policy's own. Less of it is imitated, too."""
    answer_temperature: float = 1.0
    """Temperature of sampled answers."""
    max_new_tokens: int = 8
    """Longest answer in tokens."""
    batch_size: int = 64
    """Images drawn, and questions answered, at once; changes memory and speed, not the result."""

    @property
    def drawing(self) -> ImageSampling:
        """How training images are drawn, by whomever; the policy is scored with `sampling`."""
        own = {"guidance_scale": self.base_guidance_scale, "temperature": self.base_temperature}
        return dataclasses.replace(self.sampling, **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a rollout is worth."""

    sources: tuple[str, ...] = ("self",)
    """Who says what an image is worth: self (the current model answers: the paper), frozen (the base answers: a fixed
    judge), detector (the evaluation's verdict on the picture: the results say so), or module:function, a function of
    yours f(prompts, images, answers, **columns) -> list of numbers. Several add up."""
    weights: tuple[float, ...] = ()
    """Weight of each source (TRL's reward_weights); none given: 1 each."""
    kind: Literal["answer", "probability"] = "answer"
    """"answer": 1 if the sampled answer is judged correct, else 0 (the paper); "probability": the
    length-normalised probability of the gold answer, for the image half only. For self and frozen."""
    shuffle: bool = False
    """Control: exchange the rewards among all images of the batch; with --loss.reward-coef, ask of each image what only
    other prompts ask. Nothing should be learned. Not for gold answers (SFT), which no reward chooses."""

    @property
    def soft_judges(self) -> dict[str, float]:
        """The sources whose reward has a gradient of its own at the image, with their weights."""
        weights = self.weights or (1.0,) * len(self.sources)
        soft = ("self", "frozen") if self.kind == "probability" else ()
        return {source: weight for source, weight in zip(self.sources, weights, strict=True) if source in soft}


@dataclass(frozen=True, kw_only=True)
class RelaxationConfig:
    """The straight-through Gumbel-softmax of end-to-end training."""

    tau: float = 1.0
    """Temperature: low is close to the sampled image and noisy, high is smooth and biased."""
    final_tau: float | None = None
    """Temperature at the last step; None = constant."""
    schedule: Literal["linear", "exponential"] = "exponential"
    """How the temperature goes from tau to final_tau."""
    noise: Literal["conditional", "plain"] = "conditional"
    """Gumbel noise given that the sampled token is the largest, or noise that ignores what was sampled."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective. GRPO's names and meanings are TRL's."""

    method: Literal["grpo", "sft"] = "grpo"
    """"grpo": clipped objective on the rollout's image and answer tokens; "sft": likelihood of the gold answers and, if
    not end-to-end, of the images whose answers were all judged right."""
    end_to_end: bool = False
    """Let the answers' loss reach the image tokens through a straight-through relaxation of the image."""
    image_coef: float = 1.0
    """Weight of all that trains drawing: the image tokens' objective and, end-to-end, the answers' gradient that
    reaches the image; 0 trains the answers only."""
    answer_coef: float = 1.0
    """Weight of the answer tokens' objective; 0 trains the images only."""
    reward_coef: float = 0.0
    """GRPO, end-to-end: weight of the soft reward's own gradient, that of the judge's log-probability of the gold
    answers, at the relaxed image (times image_coef). The judge's weights do not feel it. Needs --reward.kind
    probability."""
    gold_answers: Literal["all", "kept"] = "all"
    """SFT: on which images the gold answers are learned: on all of them (the paper), or on those that were judged
    right, so that no answer is learned from a picture that does not show it."""
    relaxation: RelaxationConfig = field(default_factory=RelaxationConfig)
    """How the image is relaxed; read by end-to-end training only."""
    beta: float = 0.02
    """Weight of the KL (k3 estimator) to the frozen base. GRPO only."""
    epsilon: float = 0.2
    """Lower clip of the ratio. GRPO only."""
    epsilon_high: float | None = None
    """Upper clip of the ratio; None = epsilon. GRPO only."""
    num_iterations: int = 1
    """Updates per rollout."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the centred rewards are divided by: the group's standard deviation, the batch's, or nothing. GRPO only."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """Normalisation: "grpo" mean per sample, then over samples; "bnpo"/"dapo" over all tokens of the global batch;
    "dr_grpo" over samples times the longest possible length. GRPO only."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """A ratio for each token, or one per sequence: the exponential of its tokens' mean log-ratio (GSPO). GRPO only."""
    estimator: Literal["trajectory", "remask", "training_loss", "full_mask"] = "trajectory"
    """Log-prob estimator of a masked model (autoregressive ones score exactly and ignore it): steps of the sampler's
    own trajectory, random masks weighted to be a log-prob, random masks as in training, or everything masked."""
    num_scored_steps: int = 2
    """Steps of the trajectory that are scored, drawn at random; 0 = all. Autoregressive models ignore it."""
    num_draws: int = 1
    """Random masks per rollout for the estimators "remask" and "training_loss". Autoregressive models ignore it."""
    mask_time: float = 1.0
    """Random masks are drawn at times of the schedule from 0 (all is masked) to this one. Below 1 only early states are
    scored, those in which what the picture shows is decided; it is then no log-prob of the whole image. For the
    estimators "remask" and "training_loss"; autoregressive models ignore it."""
    replay_steps: int = 0
    """SFT: updates imitate images kept in the last so many steps, drawn at random, so that each is imitated several
    times; the first steps, up to this number, only collect, since few images would be learned by heart. 0: updates
    imitate their own step's images. Wants answer_coef 0, and no end_to_end."""
    replay_size: int = 48
    """Images of each process that an update imitates with replay_steps; fewer where fewer are held."""
    ref_model_sync_steps: int = 0
    """Every so many steps the frozen base becomes a copy of the policy (TRL's name); 0 = never. Where the base draws,
    each copy starts a new round of rejection sampling. The KL and the frozen judge follow, too. Not with LoRA."""
    logprob_guidance: bool = True
    """Score with guided logits (two forwards, exact), or with the conditional branch only. End-to-end under guidance
    the second is refused: the image is relaxed as the policy that drew it."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters (peft) instead of all weights. Checkpoints hold the merged weights and, in adapter/, the adapters."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights. The frozen base is then the network without them: no second copy."""
    alpha: float = 32.0
    """An adapter's output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Linear layers that get one, by the ends of their names; none given: all in the language model's layers."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, warm-up, decay, clipping, accumulation."""

    lr: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay of matrices."""
    adam_beta1: float = 0.9
    """AdamW's first decay rate."""
    adam_beta2: float = 0.99
    """AdamW's second decay rate."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon. Far above the gradient's typical entry it turns AdamW into SGD with momentum at the rate
    lr / adam_epsilon: entries that hold only noise are then not blown up to the size of the others."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay: float = 1.0
    """Share of the run, at its end, over which the learning rate falls linearly to 0; 0 = never."""
    max_grad_norm: float = 1.0
    """Gradient norm that is clipped to."""
    gradient_accumulation_steps: int = 1
    """Parts that a step's batch is split into for the backward pass; the result does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and what is written when."""

    max_steps: int = 100
    """Updates of the model."""
    wise_ft_alpha: float = 1.0
    """After the last update the weights become the base's plus this share of what training added (WiSE-FT, arXiv
    2109.01903): below 1, the model gives up little of what it learned and keeps more of what it could before.
    A run that is continued beyond its last step goes on from the blended weights, and is blended again."""
    swa_steps: int = 0
    """After the last update the weights become the mean of those after each of the last so many steps (stochastic
    weight averaging, arXiv 1803.05407), before any blend: what single updates added by chance averages out. With LoRA
    the adapters are averaged, each matrix by itself. It costs one more copy of the trained weights; 0 = none."""
    save_steps: int = 50
    """A checkpoint every so many steps; the last step is always saved."""
    save_total_limit: int = 3
    """Checkpoints kept; older ones are removed."""
    eval_steps: int = 0
    """A small evaluation on validation prompts every so many steps; 0 = never."""
    stall_steps: int = 5
    """Steps with a gradient of exactly 0 although rewards vary, or (SFT) in which nothing was kept, after which the
    run stops; 0 = never."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Trackers beside metrics.jsonl."""
    mixed_precision: Literal["no", "bf16", "auto"] = "no"
    """Autocast of the network's matrix products; log-probs stay in float32. "auto": bf16 where the machine multiplies
    it natively."""
    gradient_checkpointing: bool = False
    """Keep only the input of each of the decoder's layers, and compute the rest again in the backward pass."""
    compile: bool = False
    """torch.compile of the decoder's layers in passes that score; needs a C++ compiler, or Triton on a GPU."""
    reference: Literal["copy", "cpu", "bf16"] = "copy"
    """The frozen base, without --lora.rank: a full copy; one that rests on the CPU while it does not score; or one in
    bf16, half as large, with which the KL starts near 0 instead of at 0. None is held where nothing asks it: SFT on
    the policy's own images, without the judge "frozen"."""
    shard: bool = False
    """Several processes: each holds a share of weights, gradients and optimizer state (FSDP2), instead of all."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation before and after training."""

    split: Literal["validation", "heldout"] = "heldout"
    """Which prompts."""
    num_prompts: int = 240
    """Prompts, balanced over the six task types."""
    num_images: int = 1
    """Images per prompt (GenEval: 4)."""
    num_references: int = 480
    """Reference images for understanding."""
    sampling: ImageSampling = field(default_factory=ImageSampling)
    """How evaluation images are drawn: the base model's best setting on validation prompts."""
    max_new_tokens: int = 8
    """Longest answer in tokens; answers are greedy."""
    batch_size: int = 64
    """Images at once."""
    during_prompts: int = 48
    """Prompts of the cheap evaluation during training (validation split)."""


@dataclass(frozen=True, kw_only=True)
class PhotosConfig:
    """Who judges photographs, in a run's evaluations and as its reward "detector". For the world geneval."""

    detector_weights: str | None = META_DETECTOR
    """Mask2Former of COCO's 80 things in transformers' layout: folder or hub id; read only where an evaluation or the
    reward "detector" asks for it. None: there is no detector, so what the run draws is not scored."""
    color_weights: str = OPENAI_CLIP
    """CLIP in transformers' layout: folder or hub id."""
    references: str | None = None
    """Folder of reference pictures in GenEval's layout, of any source; those that the detector calls right are asked
    about. None: understanding is not measured."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole."""

    model: ModelConfig
    world: Literal["shapes", "geneval"] = "shapes"
    """Where prompts, answer matching, reference images and the evaluation's detector come from."""
    prompt_file: str | None = None
    """Train on the prompts of this JSONL file (GenEval's fields plus question and answer) instead of the world's. In
    the world geneval, records without a question get ours."""
    output_dir: str = "runs/latest"
    """Run directory; it must not exist unless --resume is given."""
    seed: int = 0
    """Every draw is keyed by it."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    photos: PhotosConfig = field(default_factory=PhotosConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A JSON-ready copy."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """The dataclass `kind` from a JSON object. Errors: ValueError naming an unknown or missing field."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(known)}")
    hints, built = typing.get_type_hints(kind), {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hint):
            value = from_dict(typing.cast(type, hint), value, f"{where}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        if not _fits(value, hint):
            shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
            raise ValueError(f"{where}.{name} is {shown}, wanted {_told(hint)}")
        built[name] = value
    required = [
        n
        for n, f in known.items()
        if n not in built and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if required:
        raise ValueError(f"{where}: the field {required[0]!r} is missing")
    return kind(**built)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _told(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
