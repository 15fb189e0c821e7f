"""All commands one after the other, tiny, on a CPU, as a reader would type them: each works on what the last one made.

pretrain -> evaluate -> generate -> answer -> train -> resume -> evaluate -> report -> convert
"""

import json

import pytest
from PIL import Image

from openunirl.cli import main
from openunirl.tasks.records import read_jsonl

PRETRAIN = (
    "--tokenizer-steps 2 --tokenizer-batch 2 --steps 2 --pool 8 --draw-batch 2 --ask-batch 2 --probe-prompts 6 "
    "--probe-steps 2"
)
FAST = "--sampling.num-timesteps 4"
TRAIN = (
    "--train.mixed-precision no --train.save-steps 1 --train.eval-steps 2 --rollout.num-prompts 2 "
    "--rollout.num-generations 2 --rollout.num-questions 1 --rollout.sampling.num-timesteps 2 --eval.num-prompts 6 "
    "--eval.num-references 6 --eval.during-prompts 6 --eval.sampling.num-timesteps 4"
)


@pytest.mark.parametrize("name", ["tiny-showo", "tiny-janus"])
def test_from_nothing_to_a_report(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(line):
        capsys.readouterr()
        code = main(line.split())
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    assert call(f"pretrain {name} --output-dir base {PRETRAIN}").endswith("\nbase\n")

    judge = f"--num-prompts 6 --num-references 6 {FAST} --output-dir"
    assert main(f"evaluate base {judge} noise".split()) != 0  # two steps draw noise, and noise gets no score
    assert "no object was detected" in capsys.readouterr().err
    call(f"evaluate {name} {judge} judged")
    summary = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert summary["geneval"]["images"]["n"] == summary["understanding"]["n"] == 6
    assert {"imbalance", "self_reward", "collusion_gap", "label", "model", "seed", "sampling"} <= summary.keys()

    (tmp_path / "prompts.txt").write_text("a photo of a red circle\na photo of two stars\n")
    call(f"generate base --prompt-file prompts.txt --num-images 2 --output-dir drawn {FAST}")
    pictures = sorted((tmp_path / "drawn").rglob("*.png"))
    assert len(pictures) == 4 and Image.open(pictures[0]).size == (64, 64)

    assert main(["answer", "base", "--images", "drawn", "--questions", "what color?", "--output", "said.jsonl"]) == 0
    said = read_jsonl(tmp_path / "said.jsonl")
    assert len(said) == 4 and all(isinstance(row["answer"], str) for row in said)

    start = f"train tiny-showo-grpo --model.weights {name} --model.attn-implementation sdpa {TRAIN}"
    call(f"{start} --output-dir run --train.max-steps 2")
    call("train --output-dir run --resume --train.max-steps 3")
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [1, 2, 3]
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())][-1] == "step-000003"
    there = {path.name for path in (tmp_path / "run" / "evaluation").iterdir()}
    assert {"before.json", "after.json", "step-000002.json", "before", "after"} <= there

    step = "run/checkpoints/step-000003"
    after = json.loads((tmp_path / "run/evaluation/after.json").read_text())
    call(f"evaluate {step} {judge} again")
    again = json.loads((tmp_path / "again/evaluation.json").read_text())
    after["geneval"].pop("unseen")  # only a run knows what it was trained on
    for summary in (after["geneval"], after["understanding"]):
        for task in summary["tasks"].values():
            task.pop("trained_prompts")
    for part in ("geneval", "understanding", "imbalance", "self_reward", "collusion_gap", "seed"):
        assert again[part] == after[part], part  # the checkpoint is the model that the run evaluated

    assert call("report run").endswith("run/report.html\n")
    assert "reward" in (tmp_path / "run" / "report.html").read_text()
    call("report judged again --output both.html")
    assert (tmp_path / "both.html").exists() and json.loads((tmp_path / "both.json").read_text())["lines"]

    here, there = ("official", "hf") if name == "tiny-showo" else ("hf", "official")
    call(f"convert {step} other --layout {there}")
    call(f"convert other back --layout {here}")
    assert list((tmp_path / "back").glob("*.safetensors"))
