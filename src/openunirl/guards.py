"""What ends a run that goes nowhere: numbers that are none, a gradient that is never there, nothing to imitate.

In: a step's metrics, the network, the run's settings. Out: nothing, or a ValueError that says what happened, where the
last good checkpoint is, and what to try. Every process sees the same numbers, so all of them stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from openunirl.config import RunConfig


def check_update(step: int, config: RunConfig, last_checkpoint: str, *, loss: float, norm: float) -> None:
    """Before an update. Errors: ValueError where its loss or gradient is not finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"step {step}: the loss is {loss} and the gradient norm {norm}; the run stopped before this update. "
            f"Its last checkpoint is {last_checkpoint}; {calmer(config)}"
        )


def check_weights(step: int, config: RunConfig, last_checkpoint: str, *, broken: str | None) -> None:
    """After an update, so that no checkpoint is written. Errors: ValueError where a weight, `broken`, is not finite."""
    if broken is not None:
        raise ValueError(
            f"step {step}: after this update the weight {broken} is not finite; the run stopped, and this step is not "
            f"saved. Its last checkpoint is {last_checkpoint}; {calmer(config)}"
        )


def calmer(config: RunConfig) -> str:
    """What to try against an update that was too large, as the method allows."""
    beta = " or a higher --loss.beta" if config.loss.method == "grpo" else ""
    return f"try a lower --optim.lr (now {config.optim.lr:g}){beta}"


@dataclass
class StepGuard:
    """Stops a run that learns nothing without saying so: a gradient of exactly 0 although advantages are not; or, in
    SFT, steps in which nothing was kept, so that there is nothing to imitate."""

    config: RunConfig
    warn: Callable[[str], None] = lambda _: None
    stalled: int = 0
    empty: int = 0

    def check(self, step: int, metrics: dict[str, float], last_checkpoint: str) -> None:
        """`metrics["advantage_abs"]` is the mean size of the advantages that count in the loss; a step without an
        update has no `grad_norm`."""
        train, sft = self.config.train, self.config.loss.method == "sft"
        learning = metrics["advantage_abs"] > 0
        self.stalled = self.stalled + 1 if learning and metrics.get("grad_norm") == 0 else 0
        self.empty = self.empty + 1 if sft and (not learning or metrics.get("sft/kept_share") == 0) else 0
        if train.stall_steps and self.stalled >= train.stall_steps:
            raise ValueError(
                f"step {step}: the gradient was exactly 0 for {self.stalled} steps although rewards vary, so nothing "
                f"is being trained; the run stopped. Its last checkpoint is {last_checkpoint}. Check that the weights "
                "require gradients and that --optim.lr and --loss are what you meant"
            )
        why = (
            f"step {step}: in {self.empty} steps in a row no image was kept, because none had all of its answers right"
        )
        if train.stall_steps and self.empty >= train.stall_steps and not learning:
            raise ValueError(
                f"{why}, so there was nothing to learn from; the run stopped. Its last checkpoint is "
                f"{last_checkpoint}. Either the model was destroyed: {calmer(self.config)}; or it never succeeds: give "
                "more --rollout.num-prompts or fewer --rollout.num-questions; --train.stall-steps 0 goes on regardless"
            )
        if self.empty == 2:
            self.warn(f"{why}" + (": the image half learns nothing" if learning else ": nothing is being learned"))
