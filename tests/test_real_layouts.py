"""The whole pipeline on small random checkpoints in the official layouts with the real vocabularies: the presets, code
and commands that a user of the real ones would type."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import JanusForConditionalGeneration

from openunirl.cli import main
from openunirl.config import ModelConfig, PhotosConfig
from openunirl.models.protocol import load_model
from openunirl.presets import PRESETS
from openunirl.presets_real import PUBLISHED
from openunirl.tasks.records import read_jsonl, write_jsonl
from openunirl.validate import check
from photo_checkpoints import name_answers, save_clip, save_mask2former
from real_checkpoints import save_janus, save_magvit, save_phi_tokenizer, save_showo

NAMES = ("handbag", "bench")  # the first is what the random detector finds
RECORDS = [
    {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of {words} {name}"}
    for name, words in zip(NAMES, ("a", "the"), strict=True)
]


SMALL = ("--rollout.num-generations", 2, "--optim.gradient-accumulation-steps", 1)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module", autouse=True)
def named():
    with pytest.MonkeyPatch.context() as patch:
        name_answers(patch.setattr)
        yield


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


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a user of one published model would type beside the names of the presets."""

    name: str
    weights: Path
    """The base, in the layout it starts from."""
    model: tuple = ()
    """Flags of its other parts."""
    train: tuple = ()
    """Flags that make a step small."""
    timesteps: int = 0
    """0: the family has none."""
    layouts: tuple = ()
    """The layouts that the GRPO checkpoint is converted to, one after the other."""
    evaluated: bool = False
    """Whether the GRPO run evaluates itself, on one prompt."""

    def steps(self, section):
        return [f"--{section}.num-timesteps", self.timesteps] if self.timesteps else []

    @property
    def exported(self):
        return f"grpo/{self.layouts[-1]}"

    def training(self, out, parts, method):
        """Two steps, the second one resumed. GRPO is rewarded and judged by the detector, too."""
        flags = ["train", f"{self.name}-{method}", "--model.weights", self.weights, *self.model, *self.train]
        flags += [*self.steps("rollout.sampling"), "--output-dir", out, "--rollout.max-new-tokens", 3]
        flags += ["--train.mixed-precision", "no", "--train.report-to"]
        if method == "sft":
            flags += ["--rollout.num-prompts", 1, "--rollout.num-generations", 1, "--photos.detector-weights", "None"]
            flags += ["--optim.gradient-accumulation-steps", 1]
        else:
            flags += ["--photos.detector-weights", parts / "mask2former", "--photos.color-weights", parts / "clip"]
            flags += ["--reward.sources", "self", "detector", "--prompt-file", parts / "prompts.jsonl"]
            flags += ["--eval.num-prompts", int(self.evaluated), "--eval.max-new-tokens", 3, "--train.eval-steps", 0]
            flags += self.steps("eval.sampling")
        run(*flags, "--train.max-steps", 1)
        run("train", "--output-dir", out, "--resume", "--train.max-steps", 2)
        rows = [row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]
        assert [row["step"] for row in rows] == [1, 2]
        if method == "grpo":
            assert all("rewards/detector/mean" in row for row in rows)
        if method == "grpo" and self.evaluated:
            after = json.loads((out / "evaluation" / "after.json").read_text())
            assert after["step"] == 2 and after["label"].startswith("GenEval protocol, weights ")
        return out / "checkpoints" / "step-000002"


def same_weights(a, b, family):
    was, again = load_model(str(a)), load_model(ModelConfig(weights=str(b), family=family))
    for (key, x), (_, y) in zip(was.net.named_parameters(), again.net.named_parameters(), strict=True):
        assert torch.equal(x, y), key


def pipeline(tmp_path, parts, chain):
    """train (two GRPO and two SFT steps) -> resume -> export -> generate -> evaluate -> report."""
    family = PUBLISHED[chain.name].model.family
    grpo = source = chain.training(tmp_path / "grpo", parts, "grpo")
    for layout in chain.layouts:
        run("convert", source, tmp_path / "grpo" / layout, "--layout", layout)
        source = tmp_path / "grpo" / layout
    same_weights(grpo, source, family)
    sft = chain.training(tmp_path / "sft", parts, "sft")
    same_weights(sft, sft, family)
    drawn = ["--prompts", "a photo of a bench", "--num-images", 1, "--output-dir", tmp_path / "drawn"]
    run("generate", source, "--settings", chain.name, *chain.steps("sampling"), *drawn)
    assert (tmp_path / "drawn/00000/samples/0000.png").is_file()
    common = ["--settings", chain.name, "--prompt-file", parts / "prompts.jsonl", "--num-images", 1]
    common += ["--max-new-tokens", 3, *chain.steps("sampling"), "--detector-weights", parts / "mask2former"]
    common += ["--color-weights", parts / "clip"]
    run("evaluate", chain.weights, *chain.model, *common, "--output-dir", tmp_path / "base")
    folders = [tmp_path / "base"]
    for name, weights in (("grpo-scores", source), ("sft-scores", sft)):
        folders.append(tmp_path / name)
        told = ["--references", tmp_path / "base" / "evaluation", "--output-dir", folders[-1]]
        run("evaluate", weights, *common, *told)
    told = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    for summary in told:
        assert summary["geneval"]["n"] == len(NAMES) and 0 < summary["geneval"]["overall"] < 1
    assert told[0]["understanding"]["n"] == 0 and all(summary["understanding"]["n"] > 0 for summary in told[1:])
    assert told[1]["imbalance"]["own_images"].keys() == told[1]["imbalance"]["reference_images"].keys()
    page = tmp_path / "comparison.html"
    run("report", *folders, "--output", page)
    assert "grpo-scores" in page.read_text() and page.read_text().count("<img") == len(NAMES) * len(folders)
    run("report", tmp_path / "grpo")
    run("report", tmp_path / "grpo", tmp_path / "sft", "--output", page)
    assert "grpo" in page.read_text() and "<svg" in page.read_text()


@pytest.mark.parametrize(("name", "tokens"), [("showo-256", 256), ("showo-512", 1024)])
def test_showo(tmp_path, parts, name, tokens):
    """Its authors' layout; transformers' is that of the language model."""
    pipeline(
        tmp_path,
        parts,
        Chain(
            name=name,
            weights=save_showo(tmp_path / "weights", tokens=tokens),
            model=("--model.image-tokenizer", parts / "magvitv2", "--model.tokenizer", parts / "phi-1_5"),
            timesteps=2,
            train=SMALL if tokens > 256 else (),
            layouts=("hf", "official"),
            evaluated=tokens == 256,
        ),
    )


@pytest.mark.parametrize(("name", "start"), [("janus-pro-1b", "official"), ("janus-1.3b", "hf")])
def test_janus(tmp_path, parts, name, start):
    """From both layouts. What training saves is in transformers' layout already."""
    weights = save_janus(tmp_path / "weights", tagged=name != "janus-1.3b")
    if start == "hf":
        run("convert", weights, tmp_path / "hf", "--layout", "hf")
        JanusForConditionalGeneration.from_pretrained(tmp_path / "hf")
        weights = tmp_path / "hf"
    pipeline(tmp_path, parts, Chain(name=name, weights=weights, train=SMALL, layouts=("official",)))


# ------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", sorted(f"{name}-{method}" for name in PUBLISHED for method in ("grpo", "sft")))
def test_a_preset_is_taken_by_the_command(name, monkeypatch, tmp_path, capsys):
    """As it is, with the flags of an evaluation, and with --help."""
    called = {}
    monkeypatch.setattr("openunirl.train.train", lambda config, **_: called.update(config=config) or tmp_path)
    run("train", name)
    assert called["config"] == PRESETS[name] and called["config"].photos == PhotosConfig()
    run("train", name, "--photos.detector-weights", tmp_path, "--photos.references", "refs", "--optim.lr", "2e-5")
    config = called["config"]
    assert (config.photos.detector_weights, config.photos.references, config.optim.lr) == (str(tmp_path), "refs", 2e-5)
    capsys.readouterr()
    run("train", name, "--help")
    page = " ".join(capsys.readouterr().out.split())
    assert "--photos.detector-weights" in page and PRESETS[name].model.weights.rpartition("/")[2] in page


def test_the_published_settings():
    """presets_real.py names the source of each."""
    published = {
        "showo-256": (18, 2.75, 3, 128, 256),
        "showo-512": (50, 6.0, 3, 64, 1024),
        "janus-1.3b": (None, 5.0, 8, None, None),
        "janus-pro-1b": (None, 5.0, 8, None, None),
        "janus-pro-7b": (None, 5.0, 8, None, None),
    }
    assert PUBLISHED.keys() == published.keys()
    for name, (timesteps, guidance, group, text, tokens) in published.items():
        known, grpo, sft = PUBLISHED[name], PRESETS[f"{name}-grpo"], PRESETS[f"{name}-sft"]
        assert timesteps in (None, known.sampling.num_timesteps) and known.sampling.guidance_scale == guidance
        assert known.sampling.temperature == 1 and known.max_new_tokens == 100
        assert (known.model.max_text_len, known.model.num_image_tokens) == (text, tokens)
        assert (grpo.rollout.num_generations, sft.rollout.num_generations) == (group, 1)
        assert grpo.optim.lr == sft.optim.lr == 1e-5 and sft.loss.end_to_end
        assert grpo.eval.sampling == known.sampling and grpo.eval.num_prompts == 240


def test_there_are_two_presets_for_each_published_model():
    for name, known in PUBLISHED.items():
        for method in ("grpo", "sft"):
            preset = PRESETS[f"{name}-{method}"]
            check(preset)
            assert preset.loss.method == method and preset.world == "geneval" and preset.model == known.model
            assert preset.rollout.sampling == known.sampling
