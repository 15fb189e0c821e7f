"""The published models: what they are called, where their parts are, and the settings that their authors publish.

In: nothing. Out: PUBLISHED (a name -> KnownModel, the defaults of evaluate, generate and answer) and REAL_PRESETS (two
for each, -grpo and -sft). Torch-free.

Sources, each read in the authors' repositories:
* Show-o (showlab/Show-o): README.md, 256 px: guidance_scale=1.75, generation_timesteps=18; configs/showo_demo.yaml:
  max_seq_length 128, num_vq_tokens 256. Its guidance g is w - 1 here, so w = 2.75 (types.ImageSampling).
* Show-o at 512 px, as UniRL evaluates it (showlab/UniRL): run_eval.sh: guidance_scale=5 (w = 6),
  generation_timesteps=50; configs/showo_gen_eval_cycle_512.yaml: max_seq_length 64, num_vq_tokens 1024, bf16.
  Show-o's own configs/showo_demo_512x512.yaml has max_seq_length 128.
* Show-o draws tokens at temperature 1; generation_temperature=1 scales the noise on confidences (inference_t2i.py).
* Janus, Janus-Pro (deepseek-ai/Janus): generation_inference.py and README.md: cfg_weight=5 (w = 5), temperature=1, 576
  tokens of 384 px, no top-k or top-p; roles User/Assistant in Janus-1.3B, <|User|>/<|Assistant|> in Janus-Pro.
* Answers: greedy, at most 100 tokens (showlab/UniRL, inference_mmu_t2i.py: top_k=1, max_new_tokens=100).
* Training (UniRL, arXiv 2505.23380): learning rate 1e-5; groups of 3 (Show-o) and 8 (Janus) images; SFT: one image per
  prompt, end-to-end. Everything else about training is not published and ours: steps, prompts per process, answers of
  32 tokens, the KL's weight, 2 scored steps of a trajectory, one image per backward pass. Evaluations before,
  during and after training want a detector (config.PhotosConfig); --photos.detector-weights None leaves them out.
No real weights have been run with these settings yet (docs/evaluation.md); random ones of the true size have, Show-o
at 256 px (docs/performance.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from openunirl.config import (
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from openunirl.types import ImageSampling


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A published model and its published settings. Example: PUBLISHED["showo-512"].sampling.num_timesteps == 50"""

    model: ModelConfig
    sampling: ImageSampling
    group: int
    """G, images per prompt, in the paper's GRPO."""
    max_new_tokens: int = 100
    """Longest answer in evaluation."""
    batch_size: int = 8
    """Images at once; ours."""
    copies: tuple[str, ...] = ()
    """Other hub ids of the same model."""

    @property
    def evaluation(self) -> EvalConfig:
        """GenEval whole: 553 prompts, 4 images each."""
        return EvalConfig(
            num_prompts=553,
            num_images=4,
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )

    @property
    def look(self) -> EvalConfig:
        """What training itself evaluates, before and after: 40 prompts of each task, one image each; ours."""
        return replace(self.evaluation, num_prompts=240, num_images=1)


def _showo(weights: str, tokens: int, text: int, steps: int, guidance: float) -> KnownModel:
    return KnownModel(
        model=ModelConfig(
            weights=weights,
            family="showo",
            image_tokenizer="showlab/magvitv2",
            tokenizer="microsoft/phi-1_5",
            max_text_len=text,
            num_image_tokens=tokens,
        ),
        sampling=ImageSampling(num_timesteps=steps, guidance_scale=guidance),
        group=3,
    )


def _janus(weights: str, roles: tuple[str, str], *copies: str) -> KnownModel:
    return KnownModel(
        model=ModelConfig(weights=weights, family="janus", roles=roles),
        sampling=ImageSampling(guidance_scale=5.0),
        group=8,
        copies=copies,
    )


PUBLISHED: dict[str, KnownModel] = {
    "showo-256": _showo("showlab/show-o", tokens=256, text=128, steps=18, guidance=2.75),
    "showo-512": _showo("showlab/show-o-512x512", tokens=1024, text=64, steps=50, guidance=6.0),
    "janus-1.3b": _janus("deepseek-ai/Janus-1.3B", ("User", "Assistant")),
    "janus-pro-1b": _janus(
        "deepseek-ai/Janus-Pro-1B", ("<|User|>", "<|Assistant|>"), "deepseek-community/Janus-Pro-1B"
    ),
    "janus-pro-7b": _janus(
        "deepseek-ai/Janus-Pro-7B", ("<|User|>", "<|Assistant|>"), "deepseek-community/Janus-Pro-7B"
    ),
}

_TRAIN = TrainConfig(max_steps=1000, save_steps=100, eval_steps=200, mixed_precision="bf16")


def _grpo(name: str, known: KnownModel) -> RunConfig:
    return RunConfig(
        model=known.model,
        world="geneval",
        output_dir=f"runs/{name}-grpo",
        rollout=RolloutConfig(
            num_prompts=1,
            num_generations=known.group,
            sampling=known.sampling,
            max_new_tokens=32,
            batch_size=known.batch_size,
        ),
        loss=LossConfig(method="grpo", num_scored_steps=2),
        optim=OptimConfig(lr=1e-5, gradient_accumulation_steps=known.group),
        train=_TRAIN,
        eval=known.look,
    )


def _sft(name: str, known: KnownModel) -> RunConfig:
    return RunConfig(
        model=known.model,
        world="geneval",
        output_dir=f"runs/{name}-sft",
        rollout=RolloutConfig(
            num_prompts=4,
            num_generations=1,
            sampling=known.sampling,
            answer_temperature=0.0,
            max_new_tokens=32,
            batch_size=known.batch_size,
        ),
        loss=LossConfig(method="sft", end_to_end=True, beta=0.0, num_scored_steps=2),
        optim=OptimConfig(lr=1e-5, gradient_accumulation_steps=4),
        train=_TRAIN,
        eval=known.look,
    )


REAL_PRESETS: dict[str, RunConfig] = {
    f"{name}-{method}": make(name, known)
    for name, known in PUBLISHED.items()
    for method, make in (("grpo", _grpo), ("sft", _sft))
}
