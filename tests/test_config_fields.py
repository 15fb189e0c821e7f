"""A damaged number in a checkpoint's config.json is refused in one sentence, or does not matter; it takes no memory."""

import json
import os
import shutil
from pathlib import Path

import pytest

from openunirl.models.magvit import MagvitConfig
from openunirl.models.protocol import bundled, load_model

SOUND = {name: Path(bundled(name)) for name in ("tiny-janus", "tiny-showo")}


def places(value, at=()):
    """Where the whole numbers are."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*at, key))
    elif type(value) is int:
        yield at


CONFIGS = {name: json.loads((folder / "config.json").read_text()) for name, folder in SOUND.items()}
FIELDS = [(name, at) for name, config in CONFIGS.items() for at in places(config)]
EXTREMES = (-3, 0, 2**31)


def with_value(folder, name, at, value):
    """A copy with one other number; weights and tokenizer are linked."""
    for file in SOUND[name].iterdir():
        os.symlink(file, folder / file.name)
    config = json.loads(json.dumps(CONFIGS[name]))
    inner = config
    for part in at[:-1]:
        inner = inner[part]
    inner[at[-1]] = value
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("name", "at"), FIELDS, ids=lambda part: ".".join(map(str, part)) if part else "")
def test_a_number_that_cannot_be_is_refused(tmp_path, name, at):
    for number, value in enumerate(EXTREMES):
        place = tmp_path / str(number)
        place.mkdir()
        try:
            model = load_model(with_value(place, name, at, value))
        except ValueError as error:
            told = str(error)
            assert str(place) in told and "\n" not in told and 20 < len(told) < 700, told
        else:
            assert at[-1] in DO_NOT_MATTER, f"{at} = {value} was taken"
            assert model.num_image_tokens == 64


DO_NOT_MATTER = {
    "image_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "pretraining_tp",
    "num_image_tokens", "num_patches", "vocab_size", "llm_vocab_size", "num_new_special_tokens", "codebook_size",
    "max_text_len",
}  # fmt: skip
"""What weights, tokenizer or other fields tell as well (vocab_size that of Show-o), or a limit."""


@pytest.mark.parametrize("width", ["hidden_size", "intermediate_size"])
def test_a_width_takes_no_memory_before_weights_are_compared(tmp_path, width):
    """10^7 rows of 10^7 numbers would never be had."""
    with pytest.raises(ValueError, match="do not fit JanusNet; wrong shape"):
        load_model(with_value(tmp_path, "tiny-janus", ("text_config", width), 10**7))


@pytest.mark.parametrize("value", [["showo"], "a" * 5000, {"a": 1}], ids=["list", "long", "object"])
@pytest.mark.parametrize("field", ["family", "norm_groups", "model_type"])
def test_a_field_of_another_kind_is_told_shortly(tmp_path, field, value):
    folder = with_value(tmp_path, "tiny-showo", (field,), value)
    if field == "model_type":
        assert load_model(folder).num_image_tokens == 64  # its family is told by our own field
        return
    with pytest.raises(ValueError, match=r"family|norm_groups") as told:
        load_model(folder)
    assert len(str(told.value)) < 500


def with_tokenizer(folder, name, change):
    """A copy whose tokenizer's files, read, are changed by `change(name of the file, content)`."""
    shutil.copytree(SOUND[name], folder, dirs_exist_ok=True)
    for file in folder.rglob("tokenizer*.json"):
        content = json.loads(file.read_text())
        change(file.name, content)
        file.write_text(json.dumps(content))
    return folder


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    def change(name, content):
        content.pop("eos_token", None)

    with pytest.raises(ValueError, match=r"no beginning or end token, .*get tokenizer_config.json again"):
        load_model(with_tokenizer(tmp_path, "tiny-showo", change))


@pytest.mark.parametrize(
    ("name", "words"),
    [("tiny-showo", "ids from 72 on, which are image codes"), ("tiny-janus", "70 entries and the tokenizer 1001")],
)
def test_a_tokenizer_of_larger_ids_is_refused(tmp_path, name, words):
    """It has no more entries than the sound one."""

    def change(name, content):
        if name == "tokenizer.json":
            content["model"]["vocab"]["circle"] = 1000

    with pytest.raises(ValueError, match=words):
        load_model(with_tokenizer(tmp_path, name, change))


@pytest.mark.parametrize("bits", [0, 40])
def test_no_table_of_endless_codes_is_made(bits):
    with pytest.raises(ValueError, match=f"codebook_bits={bits}: a table of all codes is made for 1 to 20 bits"):
        MagvitConfig(codebook_bits=bits)
