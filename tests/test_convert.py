"""Checkpoint conversion on tiny random networks: what is written, what transformers loads from it, what is refused."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    PhiForCausalLM,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from openunirl.models import checkpoints, convert, janus_layout
from openunirl.models.protocol import load_model
from openunirl.models.showo_net import ShowoNet, ShowoSizes

SPECIAL = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|User|>", "<|Assistant|>",
    "<image_placeholder>", "<begin_of_image>", "<end_of_image>",
)  # fmt: skip
WORDS = ("a", "photo", "of", "cat", "User", "Assistant", ":", "?")


@pytest.fixture(scope="module")
def janus() -> JanusForConditionalGeneration:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": 20, "intermediate_size": 40, "num_key_value_heads": 2, **sizes}
    vision = {"image_size": 24, "patch_size": 8, "projection_dim": 24, "num_image_tokens": 9, "mlp_ratio": 3, **sizes}
    vq = {
        "embed_dim": 4, "num_embeddings": 12, "latent_channels": 8, "base_channels": 32, "projection_dim": 24,
        "channel_multiplier": [1, 2, 1], "num_res_blocks": 1, "image_token_embed_dim": 24,
    }  # fmt: skip
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = JanusForConditionalGeneration(config).eval()
        for value in model.state_dict().values():  # also what is initialised to zeros and ones
            value.copy_(torch.randn_like(value) * 0.1)
    return model


@pytest.fixture
def hf_state(janus: JanusForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Stored in two dtypes: a conversion may not make them one."""
    state = {k: v.clone() for k, v in janus.state_dict().items()}
    return {k: v.to(torch.bfloat16) if "language_model" in k else v for k, v in state.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    same = [a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a.keys() & b.keys()]
    return a.keys() == b.keys() and all(same)


def words_into(folder: Path) -> None:
    vocab = {word: i for i, word in enumerate(("<unk>", *WORDS, *SPECIAL))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2], "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"tokenizer_class": "LlamaTokenizerFast"}))


@pytest.fixture
def official(janus: JanusForConditionalGeneration, hf_state: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A folder as deepseek-ai publishes them, sharded pickles and unused weights included."""
    folder = tmp_path / "Janus-1.3B"
    folder.mkdir()
    state = janus_layout.to_official(hf_state) | {
        "vision_model.vision_tower.attn_pool.q.weight": torch.ones(24, 24),
        "vision_model.vision_tower.attn_pool.latent": torch.ones(1, 1, 24),
        "gen_vision_model.quantize.codebook_used": torch.zeros(65536),
    }
    names = sorted(state)
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        torch.save({name: state[name] for name in part}, folder / f"pytorch_model-0000{i}-of-00002.bin")
    config = janus_layout.official_config(janus.config.to_dict())
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {"image_processor_type": "VLMImageProcessor", "image_size": 24, "image_mean": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    words_into(folder)
    return folder


# ------------------------------------------------------------------------------------------------- Janus, folders


def test_transformers_loads_a_converted_janus(official, janus, hf_state, tmp_path):
    folder = convert.convert(str(official), tmp_path / "hf", "hf", base_model="deepseek-ai/Janus-1.3B")
    assert equal(load_file(folder / "model.safetensors"), hf_state)
    model, report = JanusForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert model.generation_config.generation_kwargs == {"boi_token_id": 15}
    assert (model.generation_config.bos_token_id, model.generation_config.pad_token_id) == (9, 11)
    janus = copy.deepcopy(janus)
    janus.load_state_dict({k: v.float() for k, v in hf_state.items()})
    ids = torch.tensor([[9, *[14] * 9, 3, 4]])
    pixels = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = model.eval()(input_ids=ids, pixel_values=pixels).logits
        janus.config.image_token_id = janus.model.config.image_token_id = 14
        assert torch.equal(got, janus(input_ids=ids, pixel_values=pixels).logits)


def test_a_converted_janus_reads_texts_and_pictures(official, tmp_path):
    folder = convert.convert(str(official), tmp_path / "hf", "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = JanusImageProcessorPil.from_pretrained(folder)
    processor = JanusProcessor(images, tokenizer, num_image_tokens=9)
    read = processor(
        text="<|User|> <image_placeholder> a cat ?", images=torch.zeros(24, 24, 3, dtype=torch.uint8).numpy(),
        return_tensors="pt",
    )  # fmt: skip
    assert read.input_ids.tolist() == [[12, 15, *[14] * 9, 16, 1, 4, 8]]
    assert torch.equal(read.pixel_values, torch.full((1, 3, 24, 24), -1.0))  # (0 - 0.5) / 0.5
    assert json.loads((folder / "processor_config.json").read_text())["num_image_tokens"] == 9


def test_a_janus_folder_goes_there_and_back(official, hf_state, tmp_path):
    there = convert.convert(str(official), tmp_path / "hf", "hf")
    back = convert.convert(str(there), tmp_path / "back", "official")
    assert equal(load_file(back / "model.safetensors"), janus_layout.to_official(hf_state))
    was, now = (json.loads((f / "config.json").read_text()) for f in (official, back))
    ours = {"family": "janus", "roles": ["User", "Assistant"]}  # Janus-1.3B's, told from the source's name alone
    ids = {"bos_token_id": 9, "eos_token_id": 10, "pad_token_id": 11}
    assert now == was | ours | {"torch_dtype": "float32", "language_config": was["language_config"] | ids}
    pixels = json.loads((back / "preprocessor_config.json").read_text())
    assert (pixels["image_size"], pixels["min_size"]) == (24, 14)
    assert (back / "tokenizer.json").read_bytes() == (official / "tokenizer.json").read_bytes()
    third = convert.convert(str(back), tmp_path / "third", "hf")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert json.loads((third / name).read_text()) == json.loads((there / name).read_text()), name


def test_our_adapter_loads_both_layouts(official, tmp_path):
    there = convert.convert(str(official), tmp_path / "hf", "hf")
    back = convert.convert(str(there), tmp_path / "back", "official")
    a, b = load_model(there), load_model(back)
    assert equal(a.net.state_dict(), b.net.state_dict())
    assert equal(a.image_tokenizer.state_dict(), b.image_tokenizer.state_dict())
    a.save(tmp_path / "own")  # type: ignore[attr-defined]
    again = convert.convert(str(tmp_path / "own"), tmp_path / "again", "official")
    assert equal(checkpoints.read_state(again), checkpoints.read_state(back))
    assert json.loads((again / "config.json").read_text())["roles"] == ["User", "Assistant"]


def test_weights_of_another_size_are_refused(official, tmp_path):
    config = json.loads((official / "config.json").read_text())
    config["language_config"]["num_key_value_heads"] = 4
    (official / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj\.weight is \[12, 24\], wanted \[24, 24\]"):
        convert.convert(str(official), tmp_path / "hf", "hf")


def test_a_missing_shard_is_told(official, tmp_path):
    (official / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="missing"):
        convert.convert(str(official), tmp_path / "hf", "hf")


def test_janus_needs_a_tokenizer_of_its_own(official, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (official / name).rename(words / name)
    with pytest.raises(ValueError, match="has no tokenizer"):
        convert.convert(str(official), tmp_path / "hf", "hf")
    with pytest.raises(ValueError, match=r"has no tokenizer_config\.json"):
        convert.convert(str(official), tmp_path / "hf", "hf", tokenizer=str(official))
    folder = convert.convert(str(official), tmp_path / "hf", "hf", tokenizer=str(words))
    assert (folder / "tokenizer.json").exists()
    shutil.rmtree(folder)
    text = (words / "tokenizer.json").read_text().replace("<begin_of_image>", "<other>")
    (words / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="does not know <begin_of_image>"):
        convert.convert(str(official), tmp_path / "hf", "hf", tokenizer=str(words))


# --------------------------------------------------------------------------------------------------------- Show-o


@pytest.fixture
def showo(tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ShowoNet(
            ShowoSizes(vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4),
            attn_implementation="eager",
        )
        state = {k: torch.randn_like(v) * 0.1 for k, v in net.state_dict().items()}
    file = tmp_path / "unirl.pth"
    torch.save({"module": {k: v.to(torch.bfloat16) for k, v in state.items()}}, file)
    return file


def test_transformers_loads_a_converted_showo(showo, tmp_path):
    folder = convert.convert(str(showo), tmp_path / "hf", "hf", base_model="benzweijia/UniRL")
    model, report = PhiForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values()), report
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["qk_layernorm"], config["dtype"]) == ("phi", True, "bfloat16")
    assert (config["vocab_size"], config["partial_rotary_factor"]) == (50, 0.5)
    state = checkpoints.read_state(showo)
    net = ShowoNet(ShowoSizes.from_state_dict(state), attn_implementation="eager")
    checkpoints.load_strictly(net, state, showo)
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        assert (model.eval()(ids).logits - net.eval()(ids, causal)).abs().max() < 1e-5


def test_a_showo_goes_there_and_back_bit_for_bit(showo, tmp_path):
    stored = torch.load(showo, weights_only=True)["module"]
    there = convert.convert(str(showo), tmp_path / "hf", "hf")
    assert equal(load_file(there / "model.safetensors"), {k.removeprefix("showo."): v for k, v in stored.items()})
    back = convert.convert(str(there), tmp_path / "back", "official")
    assert equal(load_file(back / "model.safetensors"), stored)
    assert json.loads((back / "config.json").read_text()) == {"_class_name": "Showo", "vocab_size": 50}


def test_our_own_showo_folder_comes_back_whole(tmp_path):
    there = convert.convert("tiny-showo", tmp_path / "hf", "hf")
    assert PhiForCausalLM.from_pretrained(there, output_loading_info=True)[1]["missing_keys"] == set()
    assert len(AutoTokenizer.from_pretrained(there)) > 10
    back = convert.convert(str(there), tmp_path / "back", "official")
    was, now = load_model("tiny-showo"), load_model(back)
    assert equal(was.net.state_dict(), now.net.state_dict())
    assert equal(was.image_tokenizer.state_dict(), now.image_tokenizer.state_dict())
    assert ModelCard.load(back / "README.md").data.base_model is None  # a bundled name is no hub id


def test_a_phi_that_is_no_showo_is_refused(showo, tmp_path):
    there = convert.convert(str(showo), tmp_path / "hf", "hf")
    config = json.loads((there / "config.json").read_text())
    rope = config["rope_parameters"] | {"partial_rotary_factor": 0.25}
    (there / "config.json").write_text(json.dumps(config | {"rope_parameters": rope, "partial_rotary_factor": 0.25}))
    with pytest.raises(ValueError, match=r"rotary embedding is .*'partial_rotary_factor': 0.25"):
        convert.convert(str(there), tmp_path / "back", "official")
    (there / "config.json").write_text(json.dumps(config | {"qk_layernorm": False}))
    with pytest.raises(ValueError, match=r"qk_layernorm is True; config\.json says False"):
        convert.convert(str(there), tmp_path / "back", "official")
    assert not (tmp_path / "back").exists()


# -------------------------------------------------------------------------------------------------------- folders


def test_large_weights_are_sharded_with_an_index(showo, tmp_path):
    folder = convert.convert(str(showo), tmp_path / "hf", "hf", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    stored = torch.load(showo, weights_only=True)["module"]
    assert equal(
        checkpoints.read_state(folder, keep_dtype=True), {k.removeprefix("showo."): v for k, v in stored.items()}
    )
    assert PhiForCausalLM.from_pretrained(folder, output_loading_info=True)[1]["missing_keys"] == set()


def test_weights_that_share_storage_are_all_written(showo, tmp_path):
    stored = torch.load(showo, weights_only=True)["module"]
    flat = torch.cat([v.flatten() for v in stored.values()])
    views, start = {}, 0
    for name, value in stored.items():
        views[name] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    torch.save(views, tmp_path / "flat.bin")
    folder = convert.convert(str(tmp_path / "flat.bin"), tmp_path / "hf", "hf")
    assert equal(load_file(folder / "model.safetensors"), {k.removeprefix("showo."): v for k, v in stored.items()})


def test_the_model_card_names_the_base_model(showo, tmp_path):
    named = convert.convert(str(showo), tmp_path / "a", "hf", base_model="showlab/show-o-512x512")
    assert ModelCard.load(named / "README.md").data.base_model == "showlab/show-o-512x512"
    back = convert.convert(str(named), tmp_path / "b", "official")
    assert ModelCard.load(back / "README.md").data.base_model == "showlab/show-o-512x512"
    unnamed = convert.convert(str(showo), tmp_path / "c", "hf")
    card = ModelCard.load(unnamed / "README.md")
    assert card.data.base_model is None and "from `unirl.pth`, which" in card.text  # no hub id
    assert str(tmp_path) not in card.content
    (named / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n# x\n")
    again = ModelCard.load(convert.convert(str(named), tmp_path / "d", "official") / "README.md")
    assert (again.data.license, again.data.base_model) == ("mit", "a/b")


def test_what_cannot_be_converted_is_told_before_anything_is_written(showo, official, tmp_path):
    there = convert.convert(str(showo), tmp_path / "hf", "hf")
    full, file, new = tmp_path / "full", tmp_path / "file", tmp_path / "new"
    full.mkdir()
    (full / "kept.txt").write_text("kept")
    file.write_text("")
    for taken in (full, file):
        with pytest.raises(ValueError, match=f"{taken} exists and is not an empty folder"):
            convert.convert(str(showo), taken, "hf")
    with pytest.raises(ValueError, match="in the official layout of Janus already"):
        convert.convert(str(official), new, "official")
    with pytest.raises(ValueError, match="in the hf layout of Show-o already"):
        convert.convert(str(there), new, "hf")
    with pytest.raises(ValueError, match="unknown layout 'mine'; known: official, hf"):
        convert.convert(str(showo), new, "mine")  # type: ignore[arg-type]
    save_file({"conv.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint of showo or janus: its weights are called conv\.weight"):
        convert.convert(str(tmp_path / "other.safetensors"), new, "hf")
    torch.save(torch.load(showo, weights_only=True)["module"] | {"mm_projector.0.weight": torch.ones(1)}, showo)
    with pytest.raises(ValueError, match=r"extra: mm_projector\.0\.weight"):
        convert.convert(str(showo), new, "hf")
    with pytest.raises(ValueError, match="no such file or folder"):
        convert.convert(str(tmp_path / "nowhere"), new, "hf")
    assert not new.exists() and [p.name for p in full.iterdir()] == ["kept.txt"]


def test_a_folder_is_whole_or_not_there(showo, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (convert.convert(str(showo), empty, "hf") / "README.md").exists()

    def full_disk(state, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(convert, "save_torch_state_dict", full_disk)
    with pytest.raises(OSError, match="no space left"):
        convert.convert(str(showo), tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.partial").exists()
