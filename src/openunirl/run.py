"""A training run: its directory, its model and optimizer, and what happens around a step.

In: a RunConfig. Out: the run directory, self-describing: config.json, metrics.jsonl, checkpoints/, evaluation/,
report.html.
train.py decides what a step is; this file logs, saves, evaluates and stops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openunirl import checkpoint, run_directory
from openunirl.config import RunConfig
from openunirl.disk import naming
from openunirl.distributed import Processes, device_of_process
from openunirl.evaluation.files import write_evaluation, write_summary
from openunirl.evaluation.kept import Kept
from openunirl.evaluation.no_score import no_answers, no_drawing, one_color
from openunirl.evaluation.run import Evaluation, evaluate
from openunirl.guards import check_update, check_weights
from openunirl.looks import collusion_warning, look_metrics
from openunirl.losses import Stats
from openunirl.metrics import JsonlTracker
from openunirl.models.adapter import REFERENCE
from openunirl.models.protocol import UnifiedModel, load_model
from openunirl.notices import warn
from openunirl.optim import average_weights, build_optimizer, drop_average, lr_factor, take_average
from openunirl.replay import Replay
from openunirl.report import read_side, write_report
from openunirl.report_numbers import collusion_verdict, detector_notice, paired_changes, summary_table, unsettled_lines
from openunirl.rewards import Rewards, check_sources
from openunirl.rollout import Rollout
from openunirl.run_world import not_measured, open_world, prompts_of_run
from openunirl.step_metrics import step_metrics
from openunirl.tasks.worlds import World
from openunirl.types import Prompt
from openunirl.validate import check
from openunirl.validate_model import check_model, unknown_words, unread


@dataclass
class Run:
    """Everything a step needs."""

    config: RunConfig
    folder: Path
    model: UnifiedModel
    optimizer: torch.optim.Optimizer
    world: World
    processes: Processes
    first_step: int
    prompts: list[Prompt]
    console: Console = field(default_factory=lambda: Console(stderr=True))
    progress: Progress | None = None
    replay: Replay = field(init=False)
    _bar: Any = None

    def __post_init__(self) -> None:
        first = self.processes.rank * self.config.rollout.num_prompts
        self.replay = Replay(config=self.config, prompts=self.prompts, per_step=self._prompts_per_step, first=first)

    # ------------------------------------------------------------------------------------------ start, finish

    @classmethod
    def open(cls, config: RunConfig, *, resume: bool, command: str) -> Run:
        check(config)
        folder = Path(config.output_dir)
        run_directory.check_directory(folder, resume=resume)
        point = checkpoint.saved(folder)[-1] if resume and checkpoint.saved(folder) else None
        state = checkpoint.read_state(point) if point else checkpoint.State(step=0)
        done = state.step
        if resume:
            run_directory.check_resumed(folder, config, done, state.wise_ft_alpha, state.swa_steps, state.swa_from)
        world = open_world(config, device_of_process())
        check_sources(config.reward, world)
        model = load_model(config.model)
        set_up(model, config, point)
        if point:
            checkpoint.load_model(point, model)
        trackers: list[Any] = [JsonlTracker(folder / "metrics.jsonl", done), *config.train.report_to]
        processes = Processes(config.train.mixed_precision, trackers, folder, config.train.shard)
        run_directory.check_prompts_per_step(folder, config, processes.count, state.prompts_per_step)
        prompts = prompts_of_run(config, world, processes.count)
        left_out = not_measured(config, world, prompts)
        model.check_prompts([prompt.prompt for prompt in prompts])
        optim = config.optim
        optimizer = processes.prepare(
            model,
            lambda net: build_optimizer(
                net,
                lr=optim.lr,
                weight_decay=optim.weight_decay,
                betas=(optim.adam_beta1, optim.adam_beta2),
                epsilon=optim.adam_epsilon,
            )[0],
        )
        if point:
            checkpoint.load_optimizer(point, optimizer)
            if not run_directory.swa_holds(config, done):
                drop_average(optimizer)
        if processes.is_main:
            run_directory.write_config(folder / "config.json", config, command)
        processes.wait()
        with naming(folder):
            processes.accelerator.init_trackers("tensorboard")
        run = cls(
            config=config,
            folder=folder,
            model=model,
            optimizer=optimizer,
            world=world,
            processes=processes,
            first_step=done + 1,
            prompts=prompts,
        )
        if point and config.loss.replay_steps:
            run.replay.take_share(checkpoint.read_replay(point), processes.rank, processes.count)
        texts = (text for p in prompts for q in p.questions for text in (p.prompt, q.question, q.answer))
        origin = config.prompt_file or f"the world {config.world}"
        for told in unknown_words(model, config.model.weights, texts, origin) + unread(config, model):
            run.warn(told)
        for sentence in left_out if processes.is_main else ():
            run.console.print(sentence, highlight=False, soft_wrap=True)
        return run

    def finish(self) -> Path:
        """Writes the report and says how the run went."""
        with naming(self.folder):
            self.processes.accelerator.end_training()
        if self.processes.is_main:
            page = write_report(self.folder)
            before, after = (run_directory.read_evaluation(self.folder, name) for name in ("before", "after"))
            if before and after:
                self.console.print(summary_table(before, after))
                sides = [read_side(self.folder / "evaluation" / name, []) for name in ("before", "after")]
                self.console.print(collusion_verdict(before, after, paired_changes(*sides)))
                for line in unsettled_lines(after):
                    self.console.print(line, highlight=False)
            if notice := detector_notice(self.config.reward.sources):
                self.console.print(notice)
            self.console.print(f"report: {page}", soft_wrap=True)
        return self.folder

    # ------------------------------------------------------------------------------------------------- steps

    @property
    def _prompts_per_step(self) -> int:
        return self.config.rollout.num_prompts * self.processes.count

    def steps(self) -> Iterator[int]:
        total = self.config.train.max_steps
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not self.processes.is_main) as bar:
            self.progress, self._bar = bar, bar.add_task("training", total=total, completed=self.first_step - 1)
            for step in range(self.first_step, total + 1):
                yield step
                bar.advance(self._bar)
            self.progress = None

    def prompts_of(self, step: int) -> list[Prompt]:
        """This process's share of the step's prompts."""
        first = (step - 1) * self._prompts_per_step + self.processes.rank * self.config.rollout.num_prompts
        return self.prompts[first : first + self.config.rollout.num_prompts]

    def update(self, losses: Iterable[torch.Tensor], step: int) -> tuple[float, float]:
        """Back-propagates the parts, clips, and steps; (loss, gradient norm before clipping).

        Errors: ValueError where either is not finite, before the weights change; or where the update left a weight so.
        """
        optim, total = self.config.optim, 0.0
        late = max(0, self.config.loss.replay_steps - 1)  # steps that only collect
        total_steps = self.config.train.max_steps - late
        factor = lr_factor(step - 1 - late, total_steps, warmup=optim.warmup_steps, decay=optim.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = optim.lr * factor
        with self.processes.averaging(self.model.net):
            for part in losses:
                total += float(part.detach())
                if part.requires_grad:
                    self.processes.accelerator.backward(part)
        norm = self.processes.clip(self.model.net, optim.max_grad_norm)
        total = self.processes.sum({"loss": total})["loss"] / self.processes.count
        check_update(step, self.config, self.last_checkpoint(), loss=total, norm=norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        check_weights(step, self.config, self.last_checkpoint(), broken=self.processes.not_finite(self.model.net))
        return total, norm

    def metrics(
        self, rollout: Rollout, rewards: Rewards, stats: Stats, learned: list[tuple[float, float]], **told: float
    ) -> dict[str, float]:
        """Of one step: `step_metrics`, and what its updates, if any, had: the mean loss, the last one's gradient norm,
        and the learning rate."""
        metrics = step_metrics(self.processes, rollout, rewards, stats, **told)
        if not learned:
            return metrics
        loss, rate = sum(loss for loss, _ in learned) / len(learned), self.optimizer.param_groups[0]["lr"]
        return {"loss": loss, **metrics, "grad_norm": learned[-1][1], "learning_rate": rate}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        images = step * self._prompts_per_step * self.config.rollout.num_generations
        with naming(self.folder):
            self.processes.accelerator.log({"images": images, **metrics}, step=step)
        if self.progress:
            told = f"reward {metrics.get('reward', math.nan):.3f}"
            if measure := next((name for name in ("kl", "loss") if name in metrics), None):
                told += f"  {measure} {metrics[measure]:.4f}"
            self.progress.update(self._bar, description=f"training  {told}")

    def warn(self, told: str) -> None:
        if self.processes.is_main:
            warn(told, self.console)

    def settle_weights(self, step: int) -> None:
        """Counts the last steps' weights into their mean; after the last they become it, and blend with the base's."""
        first = run_directory.swa_from(self.config)
        if first and step >= first:
            average_weights(self.optimizer, restart=step == first)
            if step == self.config.train.max_steps:
                take_average(self.optimizer)
        if (alpha := self._alpha_after(step)) < 1:
            self.model.blend_with_base(alpha, lambda: load_model(self.config.model))

    def _alpha_after(self, step: int) -> float:
        return self.config.train.wise_ft_alpha if step == self.config.train.max_steps else 1.0

    def sync_reference_if_due(self, step: int) -> None:
        every = self.config.loss.ref_model_sync_steps
        if every and step % every == 0:
            self.model.sync_reference()

    def save_if_due(self, step: int) -> None:
        train = self.config.train
        due = step == train.max_steps or (train.save_steps and step % train.save_steps == 0)
        if due:
            state = self.processes.optimizer_state(self.optimizer)
            held = self.processes.gather_rows(self.replay.held)
            with self.processes.whole(self.model):
                if self.processes.is_main:
                    told = checkpoint.State(
                        step=step,
                        wise_ft_alpha=self._alpha_after(step),
                        swa_steps=self.config.train.swa_steps if step == self.config.train.max_steps else 0,
                        swa_from=run_directory.swa_holds(self.config, step),
                        prompts_per_step=self._prompts_per_step,
                    )
                    checkpoint.save(self.folder, self.model, state, told, train.save_total_limit, replay=held)
        self.processes.wait()

    @contextmanager
    def stopping_at(self, step: int) -> Iterator[None]:
        """What cannot be done inside it ends the run, on every process: the ValueError says where the run stands."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = self.processes.sum({"failed": float(error is not None)})["failed"]  # or the others would wait for ever
        if error is not None and not isinstance(error, ValueError):
            raise error
        if failed:
            raise ValueError(
                f"step {step}: {error or 'another process failed, and says why'}. The run stopped before this update; "
                f"its last checkpoint is {self.last_checkpoint()}, and --resume goes on from there"
            ) from error

    def last_checkpoint(self) -> str:
        whole = checkpoint.saved(self.folder)
        return str(whole[-1]) if whole else "none yet (the base is untouched)"

    # -------------------------------------------------------------------------------------------- evaluation

    @property
    def _evaluates(self) -> bool:
        return bool(self.config.eval.num_prompts) and self.world.judge is not None

    def evaluate_base(self) -> None:
        """The base on held-out prompts, once per run."""
        if self._evaluates and not run_directory.read_evaluation(self.folder, "before"):
            if self.model.base_moved:
                raise ValueError(
                    f"{self.folder} has no evaluation of its base, which has followed the policy since: continue it "
                    "with --eval.num-prompts 0"
                )
            untouched = self.model.reference_net is None and not self.config.lora.rank  # as keeps_base says
            with nullcontext() if untouched else self.model.reference():
                self._evaluate_in_full("before", step=0)

    def evaluate_tuned(self) -> None:
        """The tuned model on the same prompts, again where a resumed run went further."""
        last, known = self.config.train.max_steps, run_directory.read_evaluation(self.folder, "after")
        if self._evaluates and not (known and known.get("step") == last):
            self._evaluate_in_full("after", step=last)

    def _evaluate_in_full(self, name: str, step: int) -> None:
        config = self.config.eval
        prompts = self.world.evaluation_prompts(config.split, config.num_prompts, self.config.seed)
        references = self.world.evaluation_prompts(
            config.split, max(config.num_references, config.num_prompts), self.config.seed
        )
        result = self._evaluate(name, prompts, references, step=step, split=config.split)
        if (
            self.world.found is not None
            and step == 0
            and (why := no_drawing(result.generated, result.pictures, "the base"))
        ):
            raise ValueError(f"the evaluation before training: {why}; --eval.num-prompts 0 trains without it")
        if self.processes.is_main:
            write_evaluation(self.folder / "evaluation", name, result, prompts)

    def evaluate_if_due(self, step: int) -> None:
        """A cheap look at validation prompts, logged under eval/; and a warning where the gap has clearly grown."""
        every = self.config.train.eval_steps
        if not every or step % every or self.world.judge is None:
            return
        prompts = self.world.evaluation_prompts("validation", self.config.eval.during_prompts, self.config.seed)
        summary = self._evaluate(f"step {step}", prompts, prompts, step=step, split="validation").summary
        self.processes.accelerator.log(look_metrics(summary), step=step)
        if why := collusion_warning(run_directory.read_evaluation(self.folder, "before"), summary):
            self.warn(f"step {step}: {why}")
        if self.processes.is_main:
            write_summary(self.folder / "evaluation", f"step-{step:06d}", summary)

    def _evaluate(self, name: str, prompts: list[Prompt], references: list[Prompt], **about: Any) -> Evaluation:
        about |= {"detector": dict(self.world.judged_by)} if self.world.judged_by else {}
        status = None if self.progress else self.console.status(f"evaluation: {name}")
        if status:
            status.start()
        try:
            result = evaluate(
                self.model,
                self.world,
                prompts,
                self.config.eval,
                seed=self.config.seed,
                reference_prompts=references,
                trained={prompt.prompt for prompt in self.prompts},
                kept=Kept(peers=self.processes),
                about={"model": self.config.model.weights, "reward_sources": self.config.reward.sources, **about},
                report=lambda stage, done, total: (
                    status.update(f"evaluation: {name}: {stage} {done}/{total}") if status else None
                ),
            )
        finally:
            if status:
                status.stop()
        no_score = no_drawing(result.generated, result.pictures, "the model"), one_color(result.generated)
        told = [why for why in (*no_score, no_answers(result.generated, result.references)) if why]
        result.summary["warnings"] = told
        for why in told:
            self.warn(f"evaluation {name}: {why}")
        return result


def keeps_base(config: RunConfig, point: Path | None = None) -> bool:
    """Whether a run that trains all weights holds a copy of its base: because a step asks it (GRPO's KL, which is
    logged whatever it weighs; a frozen judge; a base that draws, or follows), or because the run goes on from the
    checkpoint `point` with the base still to be evaluated, or with one that is no longer the model that is loaded.
    Before the first step the policy is its own base, and a blend reads the model again."""
    loss = config.loss
    asked = "frozen" in config.reward.sources or config.rollout.drawn_by == "base" or loss.ref_model_sync_steps > 0
    if loss.method == "grpo" or asked:
        return True
    if point is None:
        return False
    evaluated = run_directory.read_evaluation(Path(config.output_dir), "before") or not config.eval.num_prompts
    return not evaluated or (point / REFERENCE).exists()


def set_up(model: UnifiedModel, config: RunConfig, point: Path | None = None) -> None:
    """What is trained, what the frozen base is, and what the backward pass keeps; `point`: the checkpoint that the run
    goes on from. Errors: as check_model's."""
    check_model(config, model)
    if config.lora.rank:
        model.add_adapters(config.lora, config.seed)
    elif not keeps_base(config, point):
        model.freeze_unlearned()
    else:
        model.freeze_reference(
            dtype=torch.bfloat16 if config.train.reference == "bf16" else None,
            rests_on=torch.device("cpu") if config.train.reference == "cpu" else None,
        )
    if config.train.compile:  # first, so that what is recomputed is compiled, too
        model.compile_layers()
    if config.train.gradient_checkpointing:
        model.recompute_activations()
