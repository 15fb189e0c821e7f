"""A model folder in which something is missing or wrong: one sentence that names it, and the fix."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from openunirl.cli import main
from openunirl.models import convert
from openunirl.models.protocol import load_model
from openunirl.models.tiny import build
from openunirl.tasks import shapes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("tiny-showo", "tiny-janus"):
        build(name, shapes.vocabulary(), seed=1).save(folder / name)
    return folder


def change(file, edit):
    """Edits one file of weights."""

    def damage(folder):
        state = load_file(folder / file)
        edit(state)
        save_file(state, folder / file)

    return damage


def field(value, *names):
    """Sets one field of config.json."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        part = config
        for name in names[:-1]:
            part = part[name]
        part[names[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def poison(state, name, value):
    state[name].view(-1)[3] = value


@pytest.mark.parametrize(
    ("model", "damage", "words"),
    [
        (
            "tiny-showo",
            change("image_tokenizer.safetensors", lambda state: state.pop("decoder.conv_out.bias")),
            "decoder.conv_out.bias.*get the image tokenizer again, or name one: --model.image-tokenizer",
        ),
        (
            "tiny-showo",
            change("image_tokenizer.safetensors", lambda state: state.pop("encoder.conv_in.weight")),
            "encoder.conv_in.weight.*--model.image-tokenizer",
        ),
        (
            "tiny-showo",
            change("model.safetensors", lambda state: state.pop("showo.lm_head.bias")),
            "missing: showo.lm_head.bias.*get them again",
        ),
        (
            "tiny-showo",
            change("model.safetensors", lambda state: state.pop("showo.model.embed_tokens.weight")),
            "not a Show-o checkpoint: .*embed_tokens.*get the file again",
        ),
        (
            "tiny-showo",
            lambda f: shutil.rmtree(f / "tokenizer"),
            "no tokenizer folder .*/tokenizer: .*--model.tokenizer",
        ),
        (
            "tiny-showo",
            lambda f: [path.unlink() for path in (f / "tokenizer").iterdir()],
            "/tokenizer holds no tokenizer that can be read .*--model.tokenizer",
        ),
        (
            "tiny-showo",
            lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"),
            "/tokenizer holds no tokenizer that can be read .*--model.tokenizer",
        ),
        (
            "tiny-janus",
            lambda f: (f / "tokenizer.json").write_text("{"),
            "holds no tokenizer that can be read .*--model.tokenizer",
        ),
        (
            "tiny-janus",
            change("model.safetensors", lambda state: state.pop("lm_head.weight")),
            "missing: lm_head.weight.*get them again",
        ),
        (
            "tiny-janus",
            lambda f: (f / "config.json").write_text("{"),
            "config.json is damaged .*repair it, or get it again",
        ),
        (
            "tiny-janus",
            field("many", "vq_config", "num_embeddings"),
            "config.json has a field that cannot be .*num_embeddings.*'many'.*correct it, or get the file again",
        ),
        (
            "tiny-janus",
            field("User", "roles"),
            "config.json: roles is 'User', wanted two texts: correct it, or get the file again",
        ),
    ],
)
def test_what_is_missing_is_named_with_the_fix(models, tmp_path, model, damage, words):
    folder = shutil.copytree(models / model, tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError, match=words) as told:
        load_model(folder)
    assert str(folder) in str(told.value)


@pytest.mark.parametrize(
    ("model", "file", "name"),
    [
        ("tiny-showo", "model.safetensors", "showo.lm_head.weight"),
        ("tiny-showo", "image_tokenizer.safetensors", "decoder.conv_in.weight"),
        ("tiny-janus", "model.safetensors", "lm_head.weight"),
    ],
)
def test_weights_that_are_no_numbers_are_not_evaluated(models, tmp_path, capsys, model, file, name):
    for value in (torch.nan, torch.inf):
        folder = shutil.copytree(models / model, tmp_path / f"{value}")
        change(file, lambda state, value=value: poison(state, name, value))(folder)
        assert main(["evaluate", str(folder), "--world", "shapes", "--output-dir", str(tmp_path / "out")]) == 1
        told = capsys.readouterr().err
        assert f"the weight {name} of {folder} is not finite" in told and told.count("\n") == 1, told
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: (f / "README.md").write_text("---\nlicense: [mit\n---\n"),
            "front matter of .*README.md cannot be read .*expected ',' or.*: repair it, or remove the file",
        ),
        (
            field("many", "vq_config", "num_embeddings"),
            "config.json has a field that cannot be .*num_embeddings.*'many'.*correct it, or get the file again",
        ),
        (field([1, 2], "roles"), r"config.json: roles is \[1, 2\], wanted two texts: correct it"),
        (
            lambda f: (f / "preprocessor_config.json").write_text('{"size": 1'),
            "preprocessor_config.json is damaged .*Expecting.*: repair it, or get it again",
        ),
        (
            lambda f: (f / "processor_config.json").write_text('{"image_processor": "mine"}'),
            "processor_config.json: image_processor is 'mine', wanted an object: correct it, or get the file again",
        ),
        (field(-3, "text_config", "hidden_size"), "config.json has a field that cannot be .*correct it"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "no tokenizer that can be read .*with --tokenizer"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json: .*with --tokenizer"),
    ],
)
def test_what_cannot_be_converted_is_named_with_the_fix(models, tmp_path, capsys, damage, words):
    folder = shutil.copytree(models / "tiny-janus", tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError, match=words) as told:
        convert.convert(str(folder), tmp_path / "out", "hf")
    assert str(folder) in str(told.value) and "\n" not in str(told.value) and not (tmp_path / "out").exists()
    assert main(["convert", str(folder), str(tmp_path / "out"), "--layout", "hf"]) == 1
    assert str(told.value) in capsys.readouterr().err


def test_a_show_o_whose_field_cannot_be_is_named_with_the_fix(models, tmp_path):
    folder = convert.convert(str(models / "tiny-showo"), tmp_path / "hf", "hf")
    field("many", "num_attention_heads")(folder)
    with pytest.raises(ValueError, match=f"{folder}/config.json has a field .*num_attention_heads.*'many'.*correct it"):
        convert.convert(str(folder), tmp_path / "back", "official")


def test_a_janus_of_its_authors_whose_field_cannot_be_is_named_with_the_fix(models, tmp_path):
    folder = convert.convert(str(models / "tiny-janus"), tmp_path / "official", "official")
    depth = ("language_config", "num_hidden_layers")
    for value, names in (("many", depth), (2**31, depth), ("mine", ("vision_config",))):
        field(value, *names)(folder)
        for use in (load_model, lambda f: convert.convert(str(f), tmp_path / "hf", "hf")):
            with pytest.raises(ValueError, match=f"{folder}/config.json.*{names[-1]}.*{value}"):
                use(folder)
