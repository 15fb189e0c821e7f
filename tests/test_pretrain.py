"""Pre-training: from nothing to a folder that loads, repeatably, and onwards from there."""

import json
from dataclasses import replace

import pytest
import torch
from rich.progress import Progress

from openunirl.config_pretrain import PretrainConfig
from openunirl.models.protocol import load_model
from openunirl.models.tiny import build
from openunirl.pretrain import pretrain, train_model
from openunirl.tasks import shapes

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


@pytest.mark.parametrize("family", ["tiny-showo", "tiny-janus"])
def test_a_teacher_teaches_all_of_the_network(family, tmp_path):
    """Guided weights teach themselves; what sees goes on learning, too."""
    start = build(family, shapes.vocabulary(), seed=3)
    start.save(tmp_path / "start")
    config = PretrainConfig(
        name=family, output_dir=str(tmp_path / "taught"), start_from=str(tmp_path / "start"), teacher_guidance=2.0,
        **SMALL,
    )  # fmt: skip
    (tmp_path / "taught").mkdir()
    model = load_model(tmp_path / "start")
    with Progress(disable=True) as progress:
        train_model(model, replace(config, probe_steps=99, steps=3), progress, tmp_path / "taught")
    assert model.reference_net is not None
    for a, b in zip(start.net.parameters(), model.reference_net.parameters(), strict=True):
        assert torch.equal(a, b)
    still = {name for (name, a), b in zip(start.net.named_parameters(), model.net.parameters(), strict=True)
             if torch.equal(a, b)}  # fmt: skip
    assert len(still) < 0.1 * len(list(model.net.parameters())), still
    vision = [name for name, _ in model.net.named_parameters() if "vision_model" in name]
    assert not vision or not still.issuperset(vision)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"teacher_guidance": 2.0}, "--teacher-guidance is 2.0 without --start-from"),
        ({"teacher_guidance": -1.0, "start_from": "x"}, "--teacher-guidance is -1.0"),
        ({"teacher_guidance": float("nan"), "start_from": "x"}, "--teacher-guidance is nan"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(changed, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        pretrain(PretrainConfig(name="tiny-showo", output_dir=str(tmp_path / "taught"), **(SMALL | changed)))
    assert not (tmp_path / "taught").exists()


def test_a_finished_model_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        pretrain(PretrainConfig(name="tiny-showo", output_dir=str(tmp_path / "mine"), **SMALL))
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "keep me"
