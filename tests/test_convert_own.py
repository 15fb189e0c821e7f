"""Conversion of what `save` wrote, what a model card says, and whose roles a Janus has."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import JanusForConditionalGeneration, JanusProcessor

from openunirl.config import ModelConfig, to_dict
from openunirl.models import checkpoints, convert
from openunirl.models.janus_prompting import PLAIN_ROLES, TAGGED_ROLES
from openunirl.models.protocol import load_model
from openunirl.models.tiny import build
from openunirl.presets import PRESETS
from openunirl.tasks import shapes


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "mine"
    build("tiny-janus", shapes.vocabulary(), seed=1).save(folder)
    return folder


@pytest.fixture
def official(own, tmp_path) -> Path:
    """As its authors would publish it: nothing says who speaks."""
    folder = convert.convert(str(own), tmp_path / "snapshots" / "abcdef", "official")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "roles"}))
    (folder / "README.md").unlink()
    return folder


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def roles_in(folder: Path) -> list[str]:
    return json.loads((folder / "config.json").read_text())["roles"]


# ------------------------------------------------------------------------------------------------- what `save` wrote


def test_transformers_loads_our_own_janus_converted(own, tmp_path):
    folder = convert.convert(str(own), tmp_path / "hf", "hf")
    model, report = JanusForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    was, now = checkpoints.read_state(own), model.state_dict()
    assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)
    prompting = load_model(own).prompting  # type: ignore[attr-defined]
    assert model.generation_config.generation_kwargs == {"boi_token_id": prompting.vocab.boi}
    processor = JanusProcessor.from_pretrained(folder)
    picture = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    read = processor(text="<image_placeholder> circle", images=picture, return_tensors="pt")
    vocab = prompting.vocab
    seen = [vocab.boi, *[vocab.placeholder] * 64, vocab.eoi]
    assert read.input_ids.tolist() == [[*seen, *prompting.ids("circle")]]  # our system text, which is empty
    assert torch.equal(read.pixel_values, torch.full((1, 3, 64, 64), -1.0))
    assert "torchvision" not in sys.modules
    assert "openunirl's own layout" in card_of(folder).text


def test_our_own_janus_keeps_its_words_in_either_layout(own, tmp_path):
    was = load_model(own).prompting  # type: ignore[attr-defined]
    for layout in ("hf", "official"):
        folder = convert.convert(str(own), tmp_path / layout, layout)
        now = load_model(folder).prompting  # type: ignore[attr-defined]
        assert (now.roles, now.system, now.max_text_len) == (was.roles, was.system, was.max_text_len), layout
        with pytest.raises(ValueError, match=f"in the {layout} layout of Janus already"):
            convert.convert(str(folder), tmp_path / "again", layout)


def test_a_folder_of_another_writer_without_its_processor_is_no_own_one(own, tmp_path):
    folder = shutil.copytree(own, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "family"}))
    with pytest.raises(ValueError, match="in the hf layout of Janus already"):
        convert.convert(str(folder), tmp_path / "out", "hf")


# ------------------------------------------------------------------------------------------------------------- roles


def test_the_path_of_a_hub_cache_tells_the_roles(official, tmp_path, capsys):
    for name, roles in (("Janus-1.3B", PLAIN_ROLES), ("Janus-Pro-1B", TAGGED_ROLES)):
        cached = shutil.copytree(official, tmp_path / f"models--deepseek-ai--{name}" / "snapshots" / "abcdef")
        assert load_model(cached).prompting.roles == roles  # type: ignore[attr-defined]
        assert tuple(roles_in(convert.convert(str(cached), tmp_path / name, "hf"))) == roles
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(cached)
        assert load_model(tmp_path / "link").prompting.roles == roles  # type: ignore[attr-defined]
    assert "warning" not in capsys.readouterr().err


def test_roles_that_no_name_tells_are_warned_of(official, tmp_path, capsys):
    def told():
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

    assert load_model(official).prompting.roles == TAGGED_ROLES  # type: ignore[attr-defined]
    written = '"roles": ["User", "Assistant"] into its config.json'
    assert told() == [
        f"warning: no name tells whether {official} is a Janus-Pro, so its prompts say <|User|> and <|Assistant|>: if "
        f"it comes from Janus-1.3B, give --model.roles User Assistant, or write {written}"
    ]
    assert load_model(ModelConfig(weights=str(official), roles=PLAIN_ROLES)).prompting.roles == PLAIN_ROLES  # type: ignore[attr-defined]
    assert not told()
    guessed = convert.convert(str(official), tmp_path / "guessed", "hf")
    assert tuple(roles_in(guessed)) == TAGGED_ROLES
    (line,) = told()
    assert "whether abcdef is a Janus-Pro" in line and "give --base-model deepseek-ai/Janus-1.3B, or write" in line
    said = convert.convert(str(official), tmp_path / "said", "hf", base_model="deepseek-ai/Janus-1.3B")
    assert tuple(roles_in(said)) == PLAIN_ROLES and not told()
    assert load_model(said).prompting.roles == PLAIN_ROLES and not told()  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------------------------------- model card


def run_from(weights: str, own: Path, folder: Path) -> Path:
    """A checkpoint of a run that began with `weights`."""
    checkpoint = shutil.copytree(own, folder / "checkpoints" / "step-000100")
    config = to_dict(PRESETS["tiny-janus-grpo"]) | {"command": "openunirl train"}
    config["model"]["weights"] = weights
    (folder / "config.json").write_text(json.dumps(config))
    return checkpoint


@pytest.mark.parametrize(
    ("weights", "base", "words"),
    [
        ("deepseek-ai/Janus-Pro-1B", "deepseek-ai/Janus-Pro-1B", "made from `deepseek-ai/Janus-Pro-1B` and"),
        ("tiny-janus", None, "made from `tiny-janus` and"),
        ("/home/somebody/secret/Janus-Pro-1B", None, "made from `Janus-Pro-1B` and"),
    ],
)
def test_a_runs_checkpoint_names_what_the_run_began_with(own, tmp_path, weights, base, words):
    checkpoint = run_from(weights, own, tmp_path / "run")
    card = card_of(convert.convert(str(checkpoint), tmp_path / "hf", "hf"))
    assert card.data.base_model == base and ("base_model" in card.content) == (base is not None)
    assert "from `step-000100`" in card.text and words in card.text
    assert "secret" not in card.content


def test_a_damaged_run_tells_how_to_name_the_base(own, tmp_path):
    checkpoint = run_from("tiny-janus", own, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"run/config\.json is damaged .*or name .* with --base-model"):
        convert.convert(str(checkpoint), tmp_path / "hf", "hf")
    card = card_of(convert.convert(str(checkpoint), tmp_path / "hf", "hf", base_model="a/b"))
    assert card.data.base_model == "a/b"


def test_a_base_model_that_is_no_hub_id_is_refused(own, tmp_path):
    with pytest.raises(ValueError, match=r"--base-model is 'mine', wanted a hub id \(owner/name\)"):
        convert.convert(str(own), tmp_path / "hf", "hf", base_model="mine")


def test_what_comes_from_the_hub_keeps_its_licence_and_base(official, tmp_path, monkeypatch):
    (official / "README.md").write_text("---\nlicense: mit\nbase_model:\n- a/b\n- c/d\n---\n# x\n")
    (official / "chat_template.jinja").write_text("{{ messages }}")

    def downloaded(name: str, allow_patterns: list[str]) -> str:
        assert name == "somebody/Janus-Pro-mine"
        snapshot = tmp_path / "cache"
        snapshot.mkdir()
        for file in filter_repo_objects([f.name for f in official.iterdir()], allow_patterns=allow_patterns):
            shutil.copyfile(official / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr(checkpoints, "snapshot_download", downloaded)
    folder = convert.convert("somebody/Janus-Pro-mine", tmp_path / "hf", "hf")
    card = card_of(folder)
    assert (card.data.license, card.data.base_model) == ("mit", ["a/b", "c/d"])
    assert "from `somebody/Janus-Pro-mine`, which was made from `a/b` and `c/d` and was in" in card.text
    assert (folder / "chat_template.jinja").exists()
