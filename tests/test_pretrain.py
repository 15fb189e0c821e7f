"""Pre-training: from nothing to a folder that loads, repeatably, and onwards from there."""

import json

import pytest
import torch

from openunirl.config import PretrainConfig
from openunirl.models.protocol import load_model
from openunirl.pretrain import pretrain

SMALL = {
    "tokenizer_steps": 3,
    "tokenizer_batch": 2,
    "steps": 3,
    "pool": 8,
    "draw_batch": 2,
    "ask_batch": 2,
    "probe_prompts": 6,
}


def trained(folder, **more):
    return load_model(pretrain(PretrainConfig(name="tiny-showo", output_dir=str(folder), **(SMALL | more))))


def test_pretraining_repeats_itself_and_continues(tmp_path):
    first, second = (trained(tmp_path / name) for name in ("a", "b"))
    for (name, a), (_, b) in zip(first.net.named_parameters(), second.net.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    other = trained(tmp_path / "c", seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(first.net.parameters(), other.net.parameters(), strict=True))
    told = json.loads((tmp_path / "a" / "pretrain.json").read_text())
    assert told["seed"] == 0 and told["question_weights"] and told["versions"]
    row = json.loads((tmp_path / "a" / "pretrain.jsonl").read_text())
    assert row["step"] == 3 and {"drawing", "understanding"} <= row.keys()
    onwards = trained(tmp_path / "d", start_from=str(tmp_path / "a"), seed=2)
    for a, b in zip(first.image_tokenizer.parameters(), onwards.image_tokenizer.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sum(p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors")) <= 8e6


def test_a_finished_model_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        pretrain(PretrainConfig(output_dir=str(tmp_path / "mine"), **SMALL))
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "keep me"
