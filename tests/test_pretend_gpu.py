"""train, generate, answer and evaluate --images on a pretended GPU: nothing on it meets what lies on the CPU. CI has no
GPU, and a tensor that was left behind is no error there."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import backend_registration

from openunirl.draws import key
from openunirl.tasks.records import read_jsonl, write_jsonl
from photo_checkpoints import save_clip, save_mask2former

needs_torch = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch is too old for it"
)
WORKER = Path(__file__).parent / "pretend_gpu_worker.py"
SMALL = ["--rollout.num-prompts", "1", "--rollout.num-generations", "2", "--train.report-to", "--train.max-steps", "1"]
FEW = ["--rollout.sampling.num-timesteps", "2", "--eval.sampling.num-timesteps", "2", "--loss.num-scored-steps", "1"]
RUNS = {
    "grpo": ["tiny-showo-grpo", *FEW, "--loss.num-iterations", "2", "--reward.sources", "self", "frozen", "detector",
             "--train.reference", "cpu", "--optim.gradient-accumulation-steps", "2", "--train.swa-steps", "1"],
    "adapters, end to end": ["tiny-showo-grpo", *FEW, "--lora.rank", "2", "--loss.end-to-end", "--reward.shuffle",
                             "--rollout.num-answers", "2", "--train.gradient-checkpointing",
                             "--loss.estimator", "remask"],
    "replayed": ["tiny-showo-sft", *FEW, "--loss.replay-steps", "1"],
    "end to end": ["tiny-janus-sft", "--loss.replay-steps", "0", "--loss.end-to-end", "--loss.answer-coef", "1"],
    "autoregressive": ["tiny-janus-grpo", "--loss.end-to-end", "--loss.reward-coef", "1",
                       "--reward.kind", "probability"],
}  # fmt: skip


def on_pretended_gpu(*arguments):
    place = os.pathsep.join(str(WORKER.parents[part] / name) for part, name in ((1, "src"), (0, "")))
    done = subprocess.run(
        [sys.executable, WORKER, *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": place, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_torch
@pytest.mark.parametrize("name", RUNS)
def test_it_trains_there(name, tmp_path):
    evaluations = (
        ["--eval.num-prompts", "1", "--eval.num-references", "2"] if name == "grpo" else ["--eval.num-prompts", "0"]
    )
    out = tmp_path / "run"
    on_pretended_gpu("train", *RUNS[name], *SMALL, *evaluations, "--output-dir", out)
    if name == "grpo":
        on_pretended_gpu("train", "--resume", "--output-dir", out, "--train.max-steps", "2", "--train.swa-steps", "1")
    steps = [row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == ([1, 2] if name == "grpo" else [1])


@needs_torch
def test_it_draws_and_answers_there(tmp_path):
    on_pretended_gpu(
        "generate", "tiny-janus", "--prompts", "a photo of a red circle", "--output-dir", tmp_path / "drawn"
    )
    said = on_pretended_gpu("answer", "tiny-janus", "--images", tmp_path / "drawn", "--questions", "what color is it?")
    assert said


@needs_torch
def test_photographs_are_scored_there(tmp_path):
    color = {"class": "handbag", "count": 1, "color": "red"}
    for number, clause in enumerate(({"class": "handbag", "count": 1}, color)):
        samples = tmp_path / "pictures" / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        record = {"tag": ("single_object", "colors")[number], "include": [clause], "prompt": "a photo of a handbag"}
        write_jsonl(samples.parent / "metadata.jsonl", [record])
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(samples / "0000.png")
    save_mask2former(tmp_path / "mask2former")
    save_clip(tmp_path / "clip", side=224, patch=14, entries=49_408)
    judges = ["--detector-weights", tmp_path / "mask2former", "--color-weights", tmp_path / "clip"]
    on_pretended_gpu("evaluate", "--images", tmp_path / "pictures", *judges, "--output-dir", tmp_path / "scores")
    assert (tmp_path / "scores" / "evaluation.json").exists()


@needs_torch
def test_what_meets_the_cpu_is_refused(tmp_path):
    code = "import torch\nfrom pretend_gpu import pretend_gpu\n"
    code += "with pretend_gpu() as gpu:\n    there = torch.ones(2, device=gpu) * 3\n"
    code += "    assert (there + torch.tensor(1.0)).sum().item() == 8\n    there + torch.ones(2)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=WORKER.parent)
    assert done.returncode == 1 and "expected all tensors on one device" in done.stderr, done.stderr


def test_a_key_lies_where_its_parts_lie():
    """On the accelerator, whatever comes after; "meta" stands for one."""
    there = torch.zeros(3, dtype=torch.int64, device="meta")
    assert key(there, 2).device.type == key(1, there, torch.arange(3)).device.type == "meta"
    assert key(1, torch.arange(3)).device.type == "cpu"
