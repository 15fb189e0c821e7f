"""Images kept in earlier steps: who learns from them, when, and what a checkpoint keeps of them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from openunirl.checkpoint import REPLAY
from openunirl.config import LossConfig, ModelConfig, RolloutConfig, RunConfig, TrainConfig
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals
from openunirl.models.protocol import load_model
from openunirl.models.tiny import build
from openunirl.objectives import Terms, loss_parts
from openunirl.replay import Batch, Replay
from openunirl.rollout import Rollout, roll_out
from openunirl.tasks import shapes
from openunirl.tasks.worlds import WORLDS
from openunirl.types import AnswerRollout, ImageRollout, ImageSampling
from openunirl.validate import check

PROMPTS = WORLDS["shapes"]().training_prompts(40, 0)
LOSS = LossConfig(method="sft", beta=0.0, answer_coef=0.0, replay_steps=2, replay_size=3, num_iterations=2)


def config(**loss):
    return RunConfig(
        model=ModelConfig(weights="tiny-showo"),
        rollout=RolloutConfig(num_prompts=4, num_generations=1),
        loss=dataclasses.replace(LOSS, **loss),
        train=TrainConfig(max_steps=9),
    )


def own(step, kept, tokens=None):
    """Four images of a step, whose tokens tell the step and the image; `kept` says which were right."""
    prompts = tuple(PROMPTS[4 * (step - 1) :][:4])
    tokens_BN = torch.tensor([[10 * step + b] * 4 for b in range(4)]) if tokens is None else tokens
    empty = torch.zeros(4, 1)
    rollout = Rollout(
        prompts=prompts,
        num_generations=1,
        num_questions=1,
        num_answers=1,
        images=ImageRollout(
            prompts=tuple(p.prompt for p in prompts),
            tokens_BN=tokens_BN,
            reveal_step_BN=tokens_BN % 7,
            logprobs_BN=torch.zeros(tokens_BN.shape),
            sampling=ImageSampling(),
        ),
        answers=AnswerRollout(questions=(), texts=(), tokens_QT=empty.long(), mask_QT=empty.bool(), logprobs_QT=empty),
        gold=(),
        scoring_seeds_B=torch.arange(4),
    )
    return Batch(rollout=rollout, advantages_B=torch.tensor(kept) * 1.0, advantages_Q=torch.zeros(4), updates=2)


def replay(**loss):
    return Replay(config=config(**loss), prompts=PROMPTS, per_step=4)


def seen(batches):
    return [sorted(batch.rollout.images.tokens_BN[:, 0].tolist()) for batch in batches]


def test_it_collects_first_and_then_draws_from_the_last_steps():
    held = replay()
    assert held.batches(own(1, [1, 0, 0, 1]), 1) == []
    second = held.batches(own(2, [0, 1, 0, 0]), 2)
    assert seen(second) == [[10, 13, 21]] * 2  # all three that were kept, in either of two updates
    third = held.batches(own(3, [1, 1, 1, 1]), 3)
    assert len(third) == 2 and all(batch.updates == 1 for batch in third)
    for batch, numbers in zip(third, seen(third), strict=True):
        assert len(set(numbers)) == 3 and set(numbers) <= {21, 30, 31, 32, 33}  # step 1 is too old
        rollout = batch.rollout
        assert torch.equal(rollout.images.reveal_step_BN, rollout.images.tokens_BN % 7)
        for prompt, number in zip(rollout.prompts, rollout.images.tokens_BN[:, 0].tolist(), strict=True):
            assert prompt is PROMPTS[4 * (number // 10 - 1) + number % 10]
        assert rollout.images.prompts == tuple(prompt.prompt for prompt in rollout.prompts)
    assert not torch.equal(third[0].rollout.scoring_seeds_B, third[1].rollout.scoring_seeds_B)


def test_every_image_is_as_likely_as_any_other():
    held = replay(replay_steps=1, num_iterations=1)
    counts = torch.zeros(4)
    held.per_step = 0  # every step has the same four prompts
    for step in range(1, 3001):
        batch, _ = held.batches(own(1, [1, 1, 1, 1]), step)
        counts[batch.rollout.images.tokens_BN[:, 0] % 10] += 1
    assert (counts / 3000 - 0.75).abs().max() < 0.04  # 5 standard errors


def test_without_it_a_step_learns_from_its_own_images():
    batch = own(1, [1, 0, 0, 0])
    assert replay(replay_steps=0).batches(batch, 1) == [batch]


def test_a_process_that_holds_none_takes_part_with_advantages_of_0():
    """In as many batches of as many updates as the others: each batch sums totals over all processes."""
    batch = own(1, [0, 0, 0, 0])
    none, some = (replay(replay_steps=1).batches(own(1, kept), 1) for kept in ([0] * 4, [0, 1, 0, 0]))
    assert [one.updates for one in none] == [one.updates for one in some] == [1, 1]
    assert all(torch.equal(one.advantages_B, batch.advantages_B) for one in none)


def test_processes_share_what_all_of_them_held():
    held = replay()
    held.batches(own(1, [1, 1, 1, 0]), 1)
    shares = []
    for rank in range(2):
        other = replay()
        other.take_share(held.held, rank, 2)
        shares.append(other.held["tokens_RN"][:, 0].tolist())
    assert shares == [[10, 12], [11]]


@pytest.mark.parametrize("family", ["tiny-showo", "tiny-janus"])
def test_a_replayed_batch_has_the_loss_of_its_images(family):
    """All of one step's images kept and drawn: loss and gradient are the step's own, where no mask is drawn."""
    model = build(family, shapes.vocabulary(), seed=3)
    rollout_config = RolloutConfig(num_prompts=4, num_generations=1, num_questions=1)
    rollout = roll_out(model, PROMPTS[:4], rollout_config, seed=0, step=1)
    first = Batch(rollout=rollout, advantages_B=torch.ones(4), advantages_Q=torch.ones(4), updates=1)
    run = dataclasses.replace(
        config(replay_steps=1, replay_size=4, num_iterations=1, estimator="full_mask"), rollout=rollout_config
    )
    (again,) = Replay(config=run, prompts=PROMPTS, per_step=4).batches(first, 1)
    assert again is not first
    found = []
    for batch in (first, again):
        experience = gather_experience(
            model, batch.rollout, batch.advantages_B, batch.advantages_Q, run.loss, temperature=0.0
        )
        totals = Totals(samples=4, tokens=4 * model.num_image_tokens, max_length=model.num_image_tokens)
        terms = Terms(config=run.loss, image_totals=totals, answer_totals=totals, temperature=0.0, stats=Stats())
        model.net.zero_grad()
        losses = []
        for part in loss_parts(model, experience, parts=1, terms=terms):
            part.backward()
            losses.append(float(part.detach()))
        grads = torch.cat([p.grad.flatten() for p in model.net.parameters() if p.grad is not None])
        found.append((sum(losses), grads))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][0] > 0
    assert (found[0][1] - found[1][1]).norm() <= 1e-4 * found[0][1].norm()


@pytest.mark.parametrize(
    "loss, told",
    [
        ({"end_to_end": True, "answer_coef": 1.0}, "only the images that SFT keeps"),
        ({"answer_coef": 1.0}, "--loss.answer-coef 0"),
        ({"replay_steps": 10}, "more than --train.max-steps 9"),
        ({"replay_size": 0}, "--loss.replay-size is 0, wanted at least 1"),
    ],
)
def test_what_cannot_be_replayed_is_refused(loss, told):
    with pytest.raises(ValueError, match=told):
        check(config(**loss))


FLAGS = """
--rollout.num-prompts 8 --rollout.num-questions 1 --rollout.sampling.num-timesteps 2 --rollout.max-new-tokens 3
--loss.replay-steps 3 --loss.replay-size 4 --loss.ref-model-sync-steps 0 --reward.sources always:right
--train.max-steps 6 --train.save-steps 2 --train.eval-steps 0 --train.wise-ft-alpha 1 --train.report-to
--eval.num-prompts 0"""


def run(folder, out, *more):
    line = [sys.executable, "-m", "openunirl.cli", "train", "tiny-showo-sft", "--model.weights", str(folder / "model")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return subprocess.run(
        [*line, "--output-dir", str(out), *FLAGS.split(), *more],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def train(folder, out, *more):
    done = run(folder, out, *more)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_resumed_run_holds_what_it_held(tmp_path):
    build("tiny-showo", shapes.vocabulary(), seed=9).save(tmp_path / "model")
    (tmp_path / "always.py").write_text("def right(prompts, images, answers, **_):\n    return [1.0] * len(prompts)\n")
    whole = train(tmp_path, tmp_path / "whole")
    assert [("loss" in row, "grad_norm" in row) for row in whole] == [(step >= 3,) * 2 for step in range(1, 7)]
    assert all(row["sft/kept_share"] == 1.0 for row in whole)
    assert whole[2]["learning_rate"] == pytest.approx(5e-4 / 8)  # warm-up begins with the first update
    last = tmp_path / "whole" / "checkpoints" / "step-000006"
    held = load_file(last / REPLAY)
    assert held["step_R"].tolist() == [4] * 8 + [5] * 8 + [6] * 8
    weights = load_file(last / "model.safetensors")
    assert len(load_model(last).net.state_dict()) > 0  # a checkpoint is a model, whatever lies beside the weights
    shutil.rmtree(last)
    assert train(tmp_path, tmp_path / "whole", "--resume") == whole
    again = load_file(last / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    shutil.rmtree(last)
    (last.parent / "step-000004" / REPLAY).write_bytes(b"{")
    done = run(tmp_path, tmp_path / "whole", "--resume")
    assert done.returncode == 1 and "images.safetensors is damaged" in done.stderr and "Traceback" not in done.stderr
