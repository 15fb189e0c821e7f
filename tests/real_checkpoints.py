"""Show-o, MAGVIT-v2 and Janus as their authors publish them: file names, key names, vocabulary, codebook and image
sizes, tokenizers of the real shape; hidden sizes and depths are tiny and all weights random."""

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import JanusConfig, JanusForConditionalGeneration

from openunirl.models import janus_layout
from openunirl.models.janus_prompting import BEGIN_IMAGE, BOS, END_IMAGE, EOS, PAD, PLACEHOLDER, TAGGED_ROLES
from openunirl.models.magvit import Magvit, MagvitConfig
from openunirl.models.showo_net import ShowoNet, ShowoSizes
from openunirl.tasks.geneval import evaluation_prompts

PHI_WORDS, PHI_SPACES = 50257, 38  # 50295 in all; the last word is the end token, id 50256
DEEPSEEK_WORDS, JANUS_ROWS = 100_000, 102_400


@cache
def _learned() -> dict:
    """A small byte-level BPE that knows GenEval's words, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [prompt.prompt for prompt in evaluation_prompts()] + ["USER: ASSISTANT: What color is the"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=800, initial_alphabet=letters))
    return json.loads(tokenizer.to_str())


def _save_words(folder: Path, size: int, added: list[str], settings: dict) -> None:
    """A tokenizer of `size` words, most of which no text has, and then the added tokens."""
    content = json.loads(json.dumps(_learned()))
    vocab = content["model"]["vocab"]
    vocab |= {f"unused{i}": i for i in range(len(vocab), size)}
    content["added_tokens"] = [
        {"id": size + i, "content": text, "special": text.startswith("<"), "normalized": False, "lstrip": False,
         "rstrip": False, "single_word": False}
        for i, text in enumerate(added)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save_phi_tokenizer(folder: Path) -> Path:
    """microsoft/phi-1_5: 50295 entries, one token for begin, end and unknown."""
    end = "<|endoftext|>"
    spaces = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    settings = {"bos_token": end, "eos_token": end, "unk_token": end, "tokenizer_class": "CodeGenTokenizer"}
    _save_words(folder, PHI_WORDS - 1, [end, *spaces], settings | {"model_max_length": 2048})
    return folder


def _shaken(module: torch.nn.Module, scale: float = 0.15) -> dict[str, torch.Tensor]:
    """Weights far enough from nothing that pictures and answers differ."""
    with torch.no_grad():
        for weight in module.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise * scale if weight.ndim > 1 else weight + 0.02 * noise)
    return {name: value.clone() for name, value in module.state_dict().items()}


def save_showo(folder: Path, *, tokens: int, seed: int = 0) -> Path:
    """showlab/show-o and show-o-512x512: pytorch_model.bin and config.json; 58498 entries."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    sizes = ShowoSizes(vocab_size=58498, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2)
    torch.save(_shaken(ShowoNet(sizes)), folder / "pytorch_model.bin")
    config = {"_class_name": "Showo", "w_clip_vit": False, "vocab_size": 58498, "llm_vocab_size": 50295}
    config |= {"llm_model_path": "microsoft/phi-1_5", "codebook_size": 8192, "num_vq_tokens": tokens}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_magvit(folder: Path, *, seed: int = 0) -> Path:
    """showlab/magvitv2: 13 bits, 16 pixels a token; pytorch_model.bin and config.json."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    flat = {"encoder_ch": 32, "decoder_ch": 32, "encoder_ch_mult": (1,) * 5, "decoder_ch_mult": (1,) * 5}
    flat |= {"encoder_num_res_blocks": (1,) * 5, "decoder_num_res_blocks": (1,) * 5}
    torch.save(_shaken(Magvit(MagvitConfig(**flat))), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"_class_name": "MAGVITv2"}))
    return folder


def save_janus(folder: Path, *, seed: int = 0, tagged: bool = True, width: int = 16, layers: int = 2) -> Path:
    """deepseek-ai/Janus-Pro-1B (or, wider and deeper, -7B), or, without tokens for roles (`tagged`),
    deepseek-ai/Janus-1.3B: 102400 rows, 16384 codes of 8 dimensions, 384 pixels, 576 tokens, two shards."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    text = {"model_type": "llama", "vocab_size": JANUS_ROWS, "hidden_size": width, "intermediate_size": 2 * width}
    text |= {"num_hidden_layers": layers, "num_attention_heads": 2, "max_position_embeddings": 16384}
    vision = {"image_size": 384, "patch_size": 16, "num_image_tokens": 576, "hidden_size": 16, "mlp_ratio": 2}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": width}
    vq = {"embed_dim": 8, "num_embeddings": 16384, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 1}
    vq |= {"channel_multiplier": [1, 1, 1, 1, 1], "projection_dim": width, "image_token_embed_dim": width}
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False)
    network = JanusForConditionalGeneration(config)
    state = janus_layout.to_official(_shaken(network))
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        torch.save({n: state[n].contiguous() for n in part}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    (folder / "config.json").write_text(json.dumps(janus_layout.official_config(config.to_dict())))
    pixels = {"image_processor_type": "VLMImageProcessor", "image_size": 384, "image_mean": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "tokenizer_class": "LlamaTokenizerFast"}
    added = [BOS, EOS, PAD, *(TAGGED_ROLES if tagged else ()), PLACEHOLDER, BEGIN_IMAGE, END_IMAGE]
    _save_words(folder, DEEPSEEK_WORDS, added, named)
    return folder
