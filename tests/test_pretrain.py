"""Pre-training: from nothing to a folder that loads, repeatably, and onwards from there."""

import json
from dataclasses import replace

import pytest
import torch
from rich.progress import Progress
from safetensors import SafetensorError

from openunirl.cli import main
from openunirl.config_pretrain import PretrainConfig
from openunirl.models.protocol import load_model
from openunirl.models.showo import Showo
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
    chain = json.loads((tmp_path / "d" / "pretrain.json").read_text())
    assert chain["started_from"] == told and told["started_from"] is None and "seed=2" in chain["command"]
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


@pytest.mark.parametrize("family", ["tiny-showo", "tiny-janus"])
def test_answers_alone_leave_what_draws(family, tmp_path):
    sizes = SMALL | {"draw_batch": 0, "places": True, "warmup_steps": 0}
    pretrain(PretrainConfig(name=family, output_dir=str(tmp_path / "a"), **sizes))
    fresh, model = build(family, shapes.vocabulary(), seed=0), load_model(tmp_path / "a")
    moved = {
        name for (name, a), b in zip(fresh.net.named_parameters(), model.net.parameters(), strict=True)
        if not torch.equal(a.half(), b.half())
    }  # fmt: skip
    assert moved and not any("generation" in name for name in moved), moved


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"teacher_guidance": 2.0}, "--teacher-guidance is 2.0 without --start-from"),
        ({"teacher_guidance": -1.0, "start_from": "x"}, "--teacher-guidance is -1.0"),
        ({"teacher_guidance": float("nan"), "start_from": "x"}, "--teacher-guidance is nan"),
        ({"pool": 0}, "--pool is 0, wanted at least 1"),
        ({"steps": -1}, "--steps is -1, wanted at least 1"),
        ({"tokenizer_steps": 0}, "--tokenizer-steps is 0, wanted at least 1"),
        ({"draw_batch": -1}, "--draw-batch is -1, wanted at least 0"),
        ({"ask_batch": -2}, "--ask-batch is -2, wanted at least 1"),
        ({"probe_steps": 0}, "--probe-steps is 0, wanted at least 1"),
        ({"probe_prompts": 0}, "--probe-prompts is 0, wanted at least 1"),
        ({"lr": 0.0}, "--lr is 0.0, wanted more than 0"),
        ({"tokenizer_lr": -1.0}, "--tokenizer-lr is -1.0, wanted more than 0"),
        ({"lr": float("inf")}, "--lr is inf, wanted a finite number"),
        ({"negatives": 1.5}, "--negatives is 1.5, wanted a share from 0 to 1"),
        ({"damaged": -0.1}, "--damaged is -0.1, wanted a share from 0 to 1"),
        ({"near_misses": 2.0}, "--near-misses is 2.0, wanted a share from 0 to 1"),
        ({"condition_dropout": 1.1}, "--condition-dropout is 1.1, wanted a share from 0 to 1"),
        ({"decay": 1.5}, "--decay is 1.5, wanted a share from 0 to 1"),
        ({"warmup_steps": -1}, "--warmup-steps is -1, wanted at least 0"),
        ({"position_weight": -1.0}, "--position-weight is -1.0, wanted at least 0"),
        ({"teacher_temperature": 0.0}, "--teacher-temperature is 0.0, wanted more than 0"),
        ({"draw_coef": 0.0, "answer_coef": 0.0}, "nothing would be trained"),
        ({"draw_batch": 0, "answer_coef": 0.0}, "nothing would be trained"),
    ],
)
def test_values_that_cannot_work_are_refused(changed, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        pretrain(PretrainConfig(name="tiny-showo", output_dir=str(tmp_path / "taught"), **(SMALL | changed)))
    assert not (tmp_path / "taught").exists()


def test_a_finished_model_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        pretrain(PretrainConfig(name="tiny-showo", output_dir=str(tmp_path / "mine"), **SMALL))
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "keep me"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_is_one_sentence_and_keeps_what_is_whole(tmp_path, monkeypatch, capsys, at):
    """At the image tokenizer, at a step, at the end."""
    calls, real = [], Showo.save

    def full(self, path, dtype=None):
        calls.append(path)
        real(self, path, dtype)
        if len(calls) == at:
            raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(Showo, "save", full)
    flags = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["pretrain", "tiny-showo", "--output-dir", str(tmp_path / "made"), *flags]) == 1
    told, names = capsys.readouterr().err.splitlines()[-1], ("image-tokenizer-only", "step-000003", "finished")
    assert told.endswith(f"made/{names[at - 1]}: cannot be written: No space left on device; free some space"), told
    left = {path.name for path in (tmp_path / "made").iterdir()} - {"pretrain.jsonl"}
    assert left == set(names[: at - 1])
    for name in left:
        load_model(tmp_path / "made" / name)
