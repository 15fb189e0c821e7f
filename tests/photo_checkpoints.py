"""Small random Mask2Former, CLIP and chat checkpoints in transformers' layout; real class counts and file names."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mask2FormerConfig,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from openunirl.evaluation.detectors import InstanceNet
from openunirl.models.janus import Janus
from openunirl.models.showo import Showo
from openunirl.tasks.geneval import COLORS, GENEVAL_OBJECTS, evaluation_prompts
from openunirl.types import AnswerRollout

HUB_NAMES = {3: "motorbike", 4: "aeroplane", 57: "sofa", 58: "pottedplant", 60: "diningtable", 62: "tvmonitor"}
"""Where the published checkpoint spells a class otherwise than GenEval."""


def name_answers(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """From here on models answer with a thing's name, which the rules can settle; random weights and a model of another
    world would mumble, and that is no score. `put` is setattr, or a monkeypatch's."""
    for family in (Showo, Janus):
        put(family, "sample_answers", _named(family.sample_answers))


def _named(real: Callable[..., AnswerRollout]) -> Callable[..., AnswerRollout]:
    def sample_answers(self: Any, *args: Any, **more: Any) -> AnswerRollout:
        told = real(self, *args, **more)
        return dataclasses.replace(told, texts=tuple(("handbag", "giraffe")[len(text) % 2] for text in told.texts))

    return sample_answers


def save_mask2former(folder: Path, *, classes: int = 80, seed: int = 0, scale: float = 4.0) -> Path:
    """Random weights, class logits spread by `scale` so that some instances pass GenEval's threshold."""
    torch.manual_seed(seed)
    names = {i: HUB_NAMES.get(i, GENEVAL_OBJECTS[i % 80]) for i in range(classes)}
    swin = SwinConfig(
        embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=7, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=3, num_attention_heads=2, num_queries=20, id2label=names,
        label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    net = InstanceNet(config)
    with torch.no_grad():
        net.class_predictor.weight.mul_(scale / net.class_predictor.weight.std() / 32**0.5)
        net.class_predictor.bias[-1] -= 4
    net.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file) | {"criterion.empty_weight": torch.ones(classes + 1)}  # as the published files have it
    save_file(weights, file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["architectures"] = ["Mask2FormerForUniversalSegmentation"]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@cache
def _english() -> list[tuple[str, str]]:
    """Merges that make whole words of GenEval's texts."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [prompt.prompt.lower() for prompt in evaluation_prompts()]
    texts += [f"a photo of a {color}-colored object" for color in COLORS] * 3
    alphabet = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    trainer = trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def save_clip(
    folder: Path,
    *,
    seed: int = 0,
    side: int = 32,
    patch: int = 16,
    words: Sequence[str] = (),
    entries: int | None = None,
) -> Path:
    """Random weights and a byte-level CLIP tokenizer (vocab.json, merges.txt) whose only merges make `words`; or,
    where the vocabulary has to hold so many `entries`, GenEval's words and then what no English text has."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    rare = [chr(c) for c in (*range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144))] if entries else []
    letters += rare
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], ["#version: 0.2"]
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(parts)):
            left = "".join(parts[:end])
            merges.append(f"{left} {parts[end]}")
            tokens.append(left + parts[end])
    for first, second in _english() if entries else ():
        merges.append(f"{first} {second}")
        tokens.append(first + second)
    for first, second in itertools.product(rare, [*rare, *(f"{letter}</w>" for letter in rare)]):
        if entries is None or len(tokens) == entries - 2:
            break
        merges.append(f"{first} {second}")
        tokens.append(first + second)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("".join(f"{merge}\n" for merge in merges))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    torch.manual_seed(seed)
    ids = (len(tokens) - 2, len(tokens) - 1, len(tokens) - 1)
    begin, end, pad = (0, 2, 1) if entries else ids  # the published configuration's are not its tokenizer's
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, bos_token_id=begin, eos_token_id=end, pad_token_id=pad, max_position_embeddings=77,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=side,
        patch_size=patch, projection_dim=16,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    net = CLIPModel(config)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(4.0)  # transformers' first weights are so small that all pictures look alike
    net.save_pretrained(folder)
    return folder


def save_chat(folder: Path) -> Path:
    """A random Llama with a chat template; it says nothing that can be read."""
    words = ["<unk>", "<end>", "<user>", "same", "different", "well", "a"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    fast.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
