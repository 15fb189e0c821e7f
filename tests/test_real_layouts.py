"""The whole pipeline on small random checkpoints in the official layouts with the real vocabularies: the presets, code
and commands that a user of the real ones would type."""

import json

import pytest
import torch

from openunirl.cli import main
from openunirl.config import ModelConfig
from openunirl.models.protocol import load_model
from openunirl.presets import PRESETS
from openunirl.presets_real import PUBLISHED
from openunirl.tasks.records import read_jsonl, write_jsonl
from openunirl.validate import check
from photo_checkpoints import save_clip, save_mask2former
from real_checkpoints import save_janus, save_magvit, save_phi_tokenizer, save_showo

NAMES = ("handbag", "handbag", "bench")  # the first is what the random detector finds
RECORDS = [
    {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of {words} {name}"}
    for name, words in zip(NAMES, ("a", "the", "a"), strict=True)
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Everything that would be downloaded, and a prompt file."""
    place = tmp_path_factory.mktemp("published")
    save_phi_tokenizer(place / "phi-1_5")
    save_magvit(place / "magvitv2")
    save_mask2former(place / "mask2former")
    save_clip(place / "clip")
    write_jsonl(place / "prompts.jsonl", RECORDS)
    return place


def run(*argv):
    assert main([str(each) for each in argv]) == 0, argv


def steps(run_dir):
    return [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl") if "loss" in row]


def pipeline(tmp_path, parts, name, train_flags, base_flags, sampling, layouts, images):
    """train (two GRPO and two SFT steps, one resumed) -> export -> generate -> evaluate -> report."""

    def few(section):
        return [f"--{section}.num-timesteps", sampling] if sampling else []

    judges = ("--detector-weights", parts / "mask2former", "--color-weights", parts / "clip")
    for method in ("grpo", "sft"):
        out = tmp_path / method
        train = ["train", f"{name}-{method}", *train_flags, *few("rollout.sampling"), "--output-dir", out]
        train += ["--rollout.max-new-tokens", 3, "--train.mixed-precision", "no", "--train.report-to"]
        if method == "sft":
            train += ["--rollout.num-prompts", 1, "--optim.gradient-accumulation-steps", 1]
            train += ["--rollout.num-generations", 1]
        run(*train, "--train.max-steps", 1)
        run("train", "--output-dir", out, "--resume", "--train.max-steps", 2)
        assert steps(out) == [1, 2]
        trained = out / "checkpoints" / "step-000002"
        exported = trained
        for layout in layouts if method == "grpo" else ():
            run("convert", exported, out / layout, "--layout", layout)
            exported = out / layout
        weights = out / ("official" if method == "grpo" else "checkpoints/step-000002")
        again = load_model(ModelConfig(weights=str(weights), family=PUBLISHED[name].model.family))
        was = load_model(str(trained))
        for (key, a), (_, b) in zip(was.net.named_parameters(), again.net.named_parameters(), strict=True):
            assert torch.equal(a, b), key
    drawn = ["--prompts", "a photo of a bench", "--num-images", 1, "--output-dir", tmp_path / "drawn"]
    run("generate", tmp_path / "grpo/official", "--settings", name, *few("sampling"), *drawn)
    base = [parts / f"{name}-weights", "--settings", name, *base_flags]
    common = ["--prompt-file", parts / "prompts.jsonl", "--num-images", images, "--max-new-tokens", 3, *judges]
    run("evaluate", *base, *common, *few("sampling"), "--output-dir", tmp_path / "base")
    for method, weights in (("grpo", "grpo/official"), ("sft", "sft/checkpoints/step-000002")):
        told = ["--references", tmp_path / "base" / "evaluation", "--output-dir", tmp_path / f"{method}-scores"]
        run("evaluate", tmp_path / weights, "--settings", name, *common, *few("sampling"), *told)
    told = [json.loads((tmp_path / f / "evaluation.json").read_text()) for f in ("base", "grpo-scores", "sft-scores")]
    for summary in told:
        assert summary["geneval"]["n"] == 3 * images and 0 < summary["geneval"]["overall"] < 1
    assert told[0]["understanding"]["n"] == 0 and told[1]["understanding"]["n"] > 0
    assert told[1]["imbalance"]["own_images"].keys() == told[1]["imbalance"]["reference_images"].keys()
    page = tmp_path / "comparison.html"
    run("report", tmp_path / "base", tmp_path / "grpo-scores", tmp_path / "sft-scores", tmp_path / "grpo",
        "--output", page)  # fmt: skip
    assert "grpo-scores" in page.read_text() and "<img" in page.read_text()


def test_showo(tmp_path, parts):
    weights = save_showo(parts / "showo-256-weights", tokens=256)
    model = ("--model.image-tokenizer", parts / "magvitv2", "--model.tokenizer", parts / "phi-1_5")
    train = ("--model.weights", weights, *model)
    pipeline(tmp_path, parts, "showo-256", train, model, sampling=2, layouts=("hf", "official"), images=2)


def test_janus(tmp_path, parts):
    """What training saves is in transformers' layout already."""
    weights = save_janus(parts / "janus-pro-1b-weights")
    group = ("--rollout.num-generations", 2, "--optim.gradient-accumulation-steps", 1)
    train = ("--model.weights", weights, *group)
    pipeline(tmp_path, parts, "janus-pro-1b", train, (), sampling=0, layouts=("official",), images=1)


# ------------------------------------------------------------------------------------------------- presets


def test_there_are_two_presets_for_each_published_model():
    for name, known in PUBLISHED.items():
        for method in ("grpo", "sft"):
            preset = PRESETS[f"{name}-{method}"]
            check(preset)
            assert preset.loss.method == method and preset.world == "geneval" and preset.model == known.model
            assert preset.rollout.sampling == known.sampling
    assert PUBLISHED["showo-512"].model.num_image_tokens == 1024
