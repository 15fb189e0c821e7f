"""Which runs hold a copy of their base, and that those without one evaluate, blend and resume as the others do."""

import json
from dataclasses import replace

import pytest
import torch

from openunirl.cli import main
from openunirl.config import LoraConfig
from openunirl.models import adapter
from openunirl.models.tiny import build
from openunirl.plan import changes
from openunirl.presets import PRESETS
from openunirl.run import keeps_base, set_up
from openunirl.tasks import shapes

SFT = PRESETS["tiny-showo-sft"]
OWN = replace(
    SFT,
    rollout=replace(SFT.rollout, drawn_by="policy", base_guidance_scale=None, base_temperature=None),
    reward=replace(SFT.reward, sources=("self",)),
    loss=replace(SFT.loss, ref_model_sync_steps=0),
)
FLAGS = [
    *("--rollout.drawn-by", "policy", "--rollout.base-guidance-scale", "None", "--rollout.base-temperature", "None"),
    *("--loss.ref-model-sync-steps", "0", "--train.save-steps", "1", "--train.mixed-precision", "no"),
    *("--eval.num-prompts", "2", "--eval.num-references", "2"),
    *("--eval.sampling.num-timesteps", "2", "--eval.max-new-tokens", "2", "--train.eval-steps", "0"),
    *("--rollout.num-prompts", "1", "--rollout.num-generations", "2", "--rollout.num-questions", "1"),
    *("--rollout.sampling.num-timesteps", "2", "--rollout.max-new-tokens", "2", "--train.report-to"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (OWN, False),
        (replace(OWN, rollout=replace(OWN.rollout, drawn_by="base")), True),
        (replace(OWN, reward=replace(OWN.reward, sources=("self", "frozen"))), True),
        (replace(OWN, loss=replace(OWN.loss, ref_model_sync_steps=2)), True),
        (PRESETS["tiny-showo-grpo"], True),
        (replace(PRESETS["tiny-showo-grpo"], loss=replace(PRESETS["tiny-showo-grpo"].loss, beta=0.0)), True),
    ],
)
def test_a_copy_is_held_where_something_asks_it(config, kept):
    assert keeps_base(config) == kept
    assert any("--train.reference" in change.flags for change in changes(config, gpus=1)) == kept
    model = build("tiny-janus", shapes.vocabulary(), seed=5)
    set_up(model, replace(config, train=replace(config.train, compile=False)))
    assert (model.reference_net is not None) == kept
    learned = {n: w.requires_grad for n, w in model.net.named_parameters()}
    model.add_adapters(LoraConfig(rank=2), seed=0)  # which freezes the same parts
    unlearned = [n for n in learned if any(n.startswith(f"{part}.") for part in model.unlearned)]
    assert unlearned and [n for n, trained in learned.items() if not trained] == unlearned


def test_a_run_that_goes_on_keeps_what_is_still_asked(tmp_path):
    config = replace(OWN, output_dir=str(tmp_path))
    point = tmp_path / "checkpoints" / "step-000001"
    (point / adapter.REFERENCE).parent.mkdir(parents=True)
    assert keeps_base(config, point)  # it has no evaluation of its base
    assert not keeps_base(replace(config, eval=replace(config.eval, num_prompts=0)), point)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "before.json").write_text("{}")
    assert keeps_base(config, point)  # an empty one is none
    (tmp_path / "evaluation" / "before.json").write_text('{"step": 0}')
    assert not keeps_base(config, point)
    (point / adapter.REFERENCE).touch()
    assert keeps_base(config, point)  # it has followed the policy


def test_without_a_copy_the_base_is_evaluated_before_the_first_step_and_later(tmp_path, monkeypatch):
    weights, folder, copies = tmp_path / "model", tmp_path / "run", []
    build("tiny-showo", shapes.vocabulary(), seed=9).save(weights)
    frozen = adapter.Adapter.freeze_reference
    monkeypatch.setattr(
        adapter.Adapter, "freeze_reference", lambda self, **how: (copies.append(1), frozen(self, **how))
    )
    argv = ["train", "tiny-showo-sft", "--model.weights", str(weights), "--output-dir", str(folder), *FLAGS]
    assert main([*argv, "--train.max-steps", "1", "--train.wise-ft-alpha", "0.5"]) == 0 and not copies
    file = folder / "evaluation" / "before.json"
    before = json.loads(file.read_text())
    resume = ["train", "--output-dir", str(folder), "--resume", "--train.max-steps"]
    assert main([*resume, "2"]) == 0 and not copies
    file.unlink()
    assert main([*resume, "3"]) == 0 and copies
    assert json.loads(file.read_text()) == before and torch.is_grad_enabled()
