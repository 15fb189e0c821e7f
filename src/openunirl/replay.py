"""Rejection sampling that learns from the images kept in the last steps, several times, and not from this step's alone.

In: what each step drew, and the advantages of its images. Out: the batches that a step's updates learn from. Without
`replay_steps` that is the step's own rollout, as often as `num_iterations` says. With it, the first steps only collect:
few images would be learned by heart, and what is drawn next would be worse for it (docs/experiments.md).

Source: a replay buffer as in off-policy RL, for reward-ranked fine-tuning (ReST, arXiv 2308.08998), which draws much
and then learns from it several times; here images come and go step by step. A likelihood needs no importance weights.

Shapes: B images, N tokens, R images held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from openunirl.config import RunConfig
from openunirl.draws import key
from openunirl.rollout import Rollout
from openunirl.types import AnswerRollout, ImageRollout, Prompt

_ORDER, _SCORING = 1, 2  # streams of a key


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What `updates` updates learn from. Example: Batch(rollout=..., advantages_B=..., advantages_Q=..., updates=2)"""

    rollout: Rollout
    advantages_B: torch.Tensor
    advantages_Q: torch.Tensor
    updates: int


@dataclass(kw_only=True)
class Replay:
    """The images that this process kept in the last `replay_steps` steps. `prompts` are the run's, in its order;
    `first` is the place of this process's first prompt among those of a step, and `per_step` how many there are.

    Example: for batch in replay.batches(Batch(...), step): ...
    """

    config: RunConfig
    prompts: Sequence[Prompt]
    per_step: int
    first: int = 0
    held: dict[str, torch.Tensor] = field(default_factory=dict)
    """step_R, prompt_R (its place in `prompts`), tokens_RN and reveal_step_RN; int32."""

    def batches(self, own: Batch, step: int) -> list[Batch]:
        """What the updates of this step learn from; nothing while images are collected. A process that holds none gives
        as many batches of its own images, whose advantages are then 0: processes sum their totals batch by batch."""
        wanted = self.config.loss.replay_steps
        if not wanted:
            return [own]
        self._hold(own, step)
        if step < wanted:
            return []
        if not len(self):
            return [replace(own, updates=1)] * own.updates
        return [self._drawn(own.rollout.images, step, i) for i in range(own.updates)]

    def __len__(self) -> int:
        return len(self.held.get("step_R", ()))

    def _hold(self, own: Batch, step: int) -> None:
        """Takes in what was kept, and drops what is too old."""
        rows = (own.advantages_B > 0).nonzero()[:, 0].cpu()
        images, start = own.rollout.images, (step - 1) * self.per_step + self.first
        new = {
            "step_R": torch.full_like(rows, step),
            "prompt_R": start + rows // own.rollout.num_generations,
            "tokens_RN": images.tokens_BN.cpu()[rows],
            "reveal_step_RN": images.reveal_step_BN.cpu()[rows],
        }
        told = {name: value.to(torch.int32) for name, value in new.items()}
        both = {name: torch.cat([self.held[name], value]) if self.held else value for name, value in told.items()}
        fresh_R = both["step_R"] > step - self.config.loss.replay_steps
        self.held = {name: value[fresh_R] for name, value in both.items()}

    def _drawn(self, like: ImageRollout, step: int, update: int) -> Batch:
        """`replay_size` images (or all, where fewer are held), each at most once, all equally likely."""
        rank = key(self.config.seed, step, _ORDER, update, self.held["prompt_R"].long(), torch.arange(len(self)))
        rows = rank.argsort()[: self.config.loss.replay_size]
        places = self.held["prompt_R"][rows].long()
        prompts = tuple(self.prompts[place] for place in places.tolist())
        device = like.tokens_BN.device
        tokens_BN = self.held["tokens_RN"][rows].long().to(device)
        empty_QT = torch.zeros(0, 0, device=device)
        return Batch(
            rollout=Rollout(
                prompts=prompts,
                num_generations=1,
                num_questions=0,
                num_answers=0,
                images=ImageRollout(
                    prompts=tuple(prompt.prompt for prompt in prompts),
                    tokens_BN=tokens_BN,
                    reveal_step_BN=self.held["reveal_step_RN"][rows].long().to(device),
                    logprobs_BN=torch.zeros(tokens_BN.shape, device=device),  # of the policy that drew: nobody asks
                    sampling=like.sampling,
                ),
                answers=AnswerRollout(
                    questions=(), texts=(), tokens_QT=empty_QT.long(), mask_QT=empty_QT.bool(), logprobs_QT=empty_QT
                ),
                gold=(),
                scoring_seeds_B=key(self.config.seed, step, _SCORING, update, places, torch.arange(len(rows))),
            ),
            advantages_B=torch.ones(len(rows), device=device),
            advantages_Q=torch.zeros(0, device=device),
            updates=1,
        )

    # -------------------------------------------------------------------------------------------- checkpoints

    def take_share(self, held: Mapping[str, torch.Tensor], rank: int, count: int) -> None:
        """This process's share of what all of them held."""
        self.held = {name: value[rank::count].clone() for name, value in held.items()}
