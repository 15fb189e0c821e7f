"""What is wrong with the weights of a judge is said before a picture is drawn, with the file and the fix."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPModel

from openunirl.cli import main
from openunirl.evaluation.detectors import InstanceNet
from openunirl.evaluation.judges import photo_judge
from openunirl.evaluation.llm_judge import ChatModel
from openunirl.evaluation.weights import check_whole
from openunirl.models.checkpoints import check_depths
from openunirl.models.showo import Showo
from openunirl.tasks.records import write_jsonl
from photo_checkpoints import save_chat, save_clip, save_mask2former

RECORD = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
WHOLE = "model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    place = tmp_path_factory.mktemp("judges")
    save_mask2former(place / "mask2former")
    save_clip(place / "clip")
    save_chat(place / "chat")
    qwen = shutil.copytree(place / "chat", place / "qwen")  # of which transformers lists the layers
    (qwen / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 1}))
    write_jsonl(place / "prompts.jsonl", [RECORD])
    return place


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 100])


def without(name):
    def change(folder):
        state = load_file(folder / WHOLE)
        del state[name]
        save_file(state, folder / WHOLE, metadata={"format": "pt"})

    return change


def narrower(name):
    def change(folder):
        state = load_file(folder / WHOLE)
        state[name] = state[name][:3].clone()
        save_file(state, folder / WHOLE, metadata={"format": "pt"})

    return change


def edited(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def in_shards(folder):
    """Two files and their list."""
    state = load_file(folder / WHOLE)
    names = sorted(state)
    files = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    listed = {name: file for file, part in files.items() for name in part}
    (folder / f"{WHOLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    (folder / WHOLE).unlink()


def as_pickle(folder):
    torch.save(load_file(folder / WHOLE), folder / "pytorch_model.bin")
    (folder / WHOLE).unlink()


def of_shards(change):
    return lambda folder: (in_shards(folder), change(folder))


SECOND = "model-00002-of-00002.safetensors"
DAMAGE = {
    "gone": (lambda f: (f / WHOLE).unlink(), "{f} holds no weights, neither model.safetensors nor pytorch_model.bin"),
    "cut off": (lambda f: cut(f / WHOLE), "{f}/model.safetensors: .*damaged or was copied in part; get it again"),
    "shard gone": (of_shards(lambda f: (f / SECOND).unlink()), "{f}/" + SECOND + " is not there, .*get it again"),
    "shard cut off": (of_shards(lambda f: cut(f / SECOND)), "{f}/" + SECOND + ": .*copied in part"),
    "list of shards": (
        of_shards(lambda f: (f / f"{WHOLE}.index.json").write_text("[]")),
        "{f}/model.safetensors.index.json is damaged: get it again",
    ),
    "pickle cut off": (
        lambda f: (as_pickle(f), cut(f / "pytorch_model.bin")),
        "{f}/pytorch_model.bin: the list of its parts is missing; .*copied in part",
    ),
}
OF_A_NETWORK = {
    "mask2former": (
        (
            without("class_predictor.weight"),
            "lacks 1 weights of InstanceNet, such as class_predictor.weight: take a whole",
        ),
        (
            narrower("class_predictor.bias"),
            r"lacks 1 .* class_predictor.bias, which is \[3\], wanted \[81\]: take a whole",
        ),
    ),
    "clip": ((without("logit_scale"), "lacks 1 weights of CLIPModel, such as logit_scale: take a whole checkpoint"),),
    "chat": (
        (
            lambda folder: edited(folder, num_hidden_layers=3),
            "lacks 18 weights of LlamaForCausalLM, such as model.layers.1.input_layernorm.weight: take a whole",
        ),
        (
            narrower("model.norm.weight"),
            r"lacks 1 weights of Llama.* model.norm.weight, which is \[3\], wanted \[16\]: take",
        ),
    ),
}


@pytest.mark.parametrize("name", ["mask2former", "clip", "chat"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_files_are_looked_at_before_they_are_loaded(sound, tmp_path, name, damage):
    folder = shutil.copytree(sound / name, tmp_path / name)
    change, words = DAMAGE[damage]
    change(folder)
    with pytest.raises(ValueError, match=words.format(f=folder)):
        if name == "chat":
            ChatModel(str(folder))
        else:
            photo_judge(*(str(folder if each == name else sound / each) for each in ("mask2former", "clip"))).check()


@pytest.mark.parametrize(
    ("name", "number"), [("mask2former", 0), ("mask2former", 1), ("clip", 0), ("chat", 0), ("chat", 1)]
)
def test_weights_are_compared_with_the_network(sound, tmp_path, name, number):
    folder = shutil.copytree(sound / name, tmp_path / name)
    change, words = OF_A_NETWORK[name][number]
    change(folder)
    with pytest.raises(ValueError, match=f"{folder}/model.safetensors {words}"):
        if name == "chat":
            ChatModel(str(folder))
        else:
            check_whole({"mask2former": InstanceNet, "clip": CLIPModel}[name], str(folder))


def test_weights_that_are_tied_are_not_missing(sound, tmp_path):
    """The embedding alone is in the file, as in the small chat models."""
    folder = shutil.copytree(sound / "chat", tmp_path / "chat")
    edited(folder, tie_word_embeddings=True)
    without("lm_head.weight")(folder)
    net = ChatModel(str(folder)).net
    assert net.lm_head.weight is net.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("mask2former", ("encoder_layers",)),
        ("mask2former", ("backbone_config", "depths", 1)),
        ("clip", ("vision_config", "num_hidden_layers")),
        ("chat", ("num_hidden_layers",)),
        ("qwen", ("num_hidden_layers",)),
    ],
)
def test_layers_without_end_are_refused_and_not_built(sound, tmp_path, name, at):
    """Damaged digits: a network of 2^31 layers takes all memory before any weight is missed."""
    folder = shutil.copytree(sound / name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    inner = config
    for part in at[:-1]:
        inner = inner[part]
    inner[at[-1]] = 2**31
    (folder / "config.json").write_text(json.dumps(config))
    words = f"{folder} has a field that cannot be .*{2**31}.*1000 layers are the most"
    with pytest.raises(ValueError, match=words):
        if name in ("chat", "qwen"):
            ChatModel(str(folder))
        else:
            photo_judge(*(str(folder if each == name else sound / each) for each in ("mask2former", "clip"))).check()


def test_only_counts_of_layers_are_limited():
    check_depths({"num_levels": [1024, 2], "codebook_blocks": 4096, "num_hidden_layers": 64, "depths": [2, 18]}, "f")
    for field in ({"stages": [{"num_layers": 1001}]}, {"depths": [2, 1001]}, {"a": {"n_layer": 1001}}):
        with pytest.raises(ValueError, match=r"^f has a field that cannot be .*is 1001"):
            check_depths(field, "f")


def test_sound_ones_pass_in_every_layout(sound, tmp_path):
    for change in (lambda folder: None, in_shards, as_pickle):
        for name, kind in (("mask2former", InstanceNet), ("clip", CLIPModel), ("chat", AutoModelForCausalLM)):
            folder = shutil.copytree(sound / name, tmp_path / f"{name}-{getattr(change, '__name__', '')}")
            change(folder)
            check_whole(kind, str(folder))


@pytest.mark.parametrize("flag", ["detector-weights", "color-weights", "llm-judge"])
def test_nothing_is_drawn_for_a_judge_that_cannot_judge(sound, tmp_path, capsys, monkeypatch, flag):
    def never(*_, **__):
        raise AssertionError("it drew")

    monkeypatch.setattr(Showo, "sample_images", never)
    names = {"detector-weights": "mask2former", "color-weights": "clip"}
    names |= {"llm-judge": "chat"} if flag == "llm-judge" else {}
    folder = shutil.copytree(sound / names[flag], tmp_path / "damaged")
    cut(folder / WHOLE)
    argv = ["evaluate", "tiny-showo", "--world", "geneval", "--settings", "showo-512", "--num-images", "1"]
    argv += ["--prompt-file", sound / "prompts.jsonl", "--output-dir", tmp_path / "out"]
    for name, source in names.items():
        argv += [f"--{name}", folder if name == flag else sound / source]
    assert main([str(each) for each in argv]) == 1
    told = capsys.readouterr().err
    assert f"{folder / WHOLE}: " in told and "get it again" in told and not (tmp_path / "out").exists()
    assert sum("get it again" in line for line in told.splitlines()) == 1
