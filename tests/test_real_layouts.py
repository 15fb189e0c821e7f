"""The whole pipeline on small random checkpoints in the official layouts with the real vocabularies: the presets, code
and commands that a user of the real ones would type."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, JanusForConditionalGeneration

from openunirl.cli import main
from openunirl.config import ModelConfig, PhotosConfig
from openunirl.models.protocol import load_model
from openunirl.presets import PRESETS
from openunirl.presets_real import PUBLISHED
from openunirl.tasks.records import read_jsonl, write_jsonl
from openunirl.validate import check
from photo_checkpoints import name_answers, save_clip, save_mask2former
from real_checkpoints import save_janus, save_magvit, save_phi_tokenizer, save_showo

FOUND = "handbag"  # what the random detector finds in every picture
A = {"class": FOUND, "count": 1}
RECORDS = [
    {"tag": "single_object", "include": [A], "prompt": "a photo of a handbag"},
    {"tag": "colors", "include": [A | {"color": "red"}], "prompt": "a photo of a red handbag"},
    {
        "tag": "counting",
        "include": [A | {"count": 2}],
        "exclude": [A | {"count": 3}],
        "prompt": "a photo of two handbags",
    },
    {"tag": "position", "include": [A, A | {"position": ["left of", 0]}], "prompt": "a photo of a handbag left of it"},
]
REASONS = {
    "colors": r"expected red handbag>=1, found 0 red; and \d (?!red)\w+",  # unless its color is red
    "counting": r"expected handbag(>=2, found [01]|<3, found \d+)",  # at its own threshold, 0.9
    "position": r"expected handbag left of target, found [\w ]*target",  # it is not left of itself
}
"""Why a picture is wrong, where the task type's own rule says so."""


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
    save_clip(place / "clip", side=224, patch=14, entries=49_408)
    read = CLIPConfig.from_pretrained(place / "clip")
    sizes = (read.text_config.vocab_size, read.text_config.max_position_embeddings)
    assert (*sizes, read.vision_config.image_size, read.vision_config.patch_size) == (49_408, 77, 224, 14)
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
    """The layouts that a checkpoint is converted to, one after the other."""
    compared: bool = False
    """Whether the base and the SFT checkpoint are evaluated, too, with references, and compared: once in each family,
    because nothing there depends on a size or a preset that the other evaluation does not run."""
    evaluated: bool = False
    """Whether the GRPO run evaluates itself, on one prompt."""

    def steps(self, section):
        return [f"--{section}.num-timesteps", self.timesteps] if self.timesteps else []

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
    """The state of the network, which is equal in both."""
    was, again = load_model(str(a)), load_model(ModelConfig(weights=str(b), family=family))
    for of in ("net", "image_tokenizer"):
        pairs = (getattr(each, of).state_dict() for each in (was, again))
        for (key, x), (name, y) in zip(*(state.items() for state in pairs), strict=True):
            assert key == name and torch.equal(x, y), key
    return was.net.state_dict()


def exported(checkpoint, out, chain):
    """In the layouts of the chain, one after the other; the last one's folder."""
    source = checkpoint
    for layout in chain.layouts:
        run("convert", source, out / layout, "--layout", layout)
        source = out / layout
    return source


def pipeline(tmp_path, parts, chain):
    """train (two GRPO and two SFT steps) -> resume -> export -> generate -> evaluate -> report."""
    family = PUBLISHED[chain.name].model.family
    grpo = chain.training(tmp_path / "grpo", parts, "grpo")
    source = exported(grpo, tmp_path / "grpo", chain)
    learned = same_weights(grpo, source, family)
    scored = {"grpo-scores": source}
    sft = chain.training(tmp_path / "sft", parts, "sft")
    other = same_weights(sft, exported(sft, tmp_path / "sft", chain), family)
    assert any(not torch.equal(learned[key], other[key]) for key in learned), "one run's weights, compared twice"
    run("report", tmp_path / "grpo", tmp_path / "sft", "--output", tmp_path / "runs.html")
    assert "grpo" in (page := (tmp_path / "runs.html").read_text()) and "<svg" in page
    scored |= {"sft-scores": sft} if chain.compared else {}
    drawn = ["--prompts", "a photo of a bench", "--num-images", 1, "--output-dir", tmp_path / "drawn"]
    run("generate", source, "--settings", chain.name, *chain.steps("sampling"), *drawn)
    assert (tmp_path / "drawn/00000/samples/0000.png").is_file()
    common = ["--settings", chain.name, "--prompt-file", parts / "prompts.jsonl", "--num-images", 1]
    common += ["--max-new-tokens", 3, *chain.steps("sampling"), "--detector-weights", parts / "mask2former"]
    common += ["--color-weights", parts / "clip"]
    folders, references = [tmp_path / name for name in scored], []
    if chain.compared:
        run("evaluate", chain.weights, *chain.model, *common, "--output-dir", tmp_path / "base")
        folders = [tmp_path / "base", *folders]
        for number in ("00000", "00003"):  # a right one and a wrong one
            shutil.copytree(tmp_path / "base" / "evaluation" / number, tmp_path / "references" / number)
        references = ["--references", tmp_path / "references"]
    for name, weights in scored.items():
        run("evaluate", weights, *common, *references, "--output-dir", tmp_path / name)
    told = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    for summary in told:
        assert summary["geneval"]["n"] == len(RECORDS) and 0 < summary["geneval"]["overall"] < 1
    for folder in folders:
        judged = read_jsonl(folder / "evaluation" / "results.jsonl")
        assert judged[0]["correct"] and json.loads(judged[0]["details"])[FOUND]
        for row in judged[1:]:
            assert row["correct"] or re.search(REASONS[row["tag"]], row["reason"]), row
        assert not judged[-1]["correct"]
    run("report", tmp_path / "grpo")
    if not chain.compared:
        return
    assert told[0]["understanding"]["n"] == 0 and all(summary["understanding"]["n"] == 1 for summary in told[1:])
    assert told[1]["imbalance"]["own_images"].keys() == told[1]["imbalance"]["reference_images"].keys()
    page = tmp_path / "comparison.html"
    run("report", *folders, "--output", page)
    assert "grpo-scores" in page.read_text() and page.read_text().count("<img") == len(RECORDS) * len(folders)


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
            compared=tokens == 256,
        ),
    )


@pytest.mark.parametrize(
    ("name", "start"), [("janus-pro-7b", "official"), ("janus-pro-1b", "hf"), ("janus-1.3b", "hf")]
)
def test_janus(tmp_path, parts, name, start):
    """From both layouts. What training saves is in transformers' layout already."""
    sizes = {"width": 24, "layers": 2} if name == "janus-pro-7b" else {"width": 16, "layers": 1}
    weights = save_janus(tmp_path / "weights", tagged=name != "janus-1.3b", **sizes)
    if start == "hf":
        run("convert", weights, tmp_path / "hf", "--layout", "hf")
        JanusForConditionalGeneration.from_pretrained(tmp_path / "hf")
        weights = tmp_path / "hf"
    compared = name == "janus-pro-7b"
    pipeline(tmp_path, parts, Chain(name=name, weights=weights, train=SMALL, layouts=("official",), compared=compared))


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
