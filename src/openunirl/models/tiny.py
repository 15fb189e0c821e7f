"""The tiny size of each family, with fresh weights: the same classes as the real checkpoints, only smaller.

In: the words of a world and a seed. Out: an untrained adapter. `pretrain.py` trains it; the results are in `assets/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import JanusConfig, PreTrainedTokenizerFast

from openunirl.models import janus_prompting
from openunirl.models.janus import Janus
from openunirl.models.janus_net import JanusNet
from openunirl.models.magvit import Magvit, MagvitConfig
from openunirl.models.protocol import UnifiedModel
from openunirl.models.showo import Showo
from openunirl.models.showo_net import ShowoNet, ShowoSizes
from openunirl.models.showo_prompting import Prompting
from openunirl.models.vq import JanusVQ

END = "<|endoftext|>"


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One id per word; "?" and ":" stand alone; <unk> is 0 and the end token comes last."""
    vocab = {"<unk>": 0} | {word: i for i, word in enumerate(sorted({*words, "USER", "ASSISTANT", ":"}), start=1)}
    vocab[END] = len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    split = pre_tokenizers.Split(Regex(r"[?:]"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token="<unk>", padding_side="left"
    )


def tiny_showo(words: Sequence[str]) -> Showo:
    """1.2 M parameters over 8x8 codes of 9 bits (64x64 pixels), 1.1 M in the image tokenizer."""
    magvit = Magvit(
        MagvitConfig(
            encoder_ch=16,
            encoder_ch_mult=(1, 2, 2, 4),
            encoder_num_res_blocks=(1, 1, 1, 1),
            decoder_ch=16,
            decoder_ch_mult=(1, 2, 4, 6),
            decoder_num_res_blocks=(1, 1, 1, 1),
            codebook_bits=9,
            norm_groups=8,
        )
    )
    prompting = Prompting(word_tokenizer(words), num_codes=magvit.config.codebook_size, max_text_len=16)
    sizes = ShowoSizes(
        vocab_size=prompting.vocab.size, hidden_size=128, intermediate_size=512, num_layers=5, num_heads=4
    )
    return Showo(ShowoNet(sizes, attn_implementation="eager"), magvit, prompting, num_image_tokens=64)


def tiny_janus(words: Sequence[str]) -> Janus:
    """1.2 M parameters in the language model, 0.4 M in the vision tower (64x64 pixels, 8x8 patches), 1.1 M in the image
    tokenizer (8x8 codes, 512 of 8 dimensions). It has no system text: the world has no words for one."""
    tokenizer = word_tokenizer(words)
    tokenizer.add_special_tokens(
        {"bos_token": janus_prompting.BOS, "eos_token": janus_prompting.EOS, "pad_token": janus_prompting.PAD}
    )
    images = (janus_prompting.PLACEHOLDER, janus_prompting.BEGIN_IMAGE, janus_prompting.END_IMAGE)
    tokenizer.add_tokens([*janus_prompting.TAGGED_ROLES, *images], special_tokens=True)
    config = JanusConfig.from_dict(
        {
            "text_config": {
                "model_type": "llama",
                "vocab_size": len(tokenizer),
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 5,
                "num_attention_heads": 4,
                "max_position_embeddings": 256,
            },
            "vision_config": {
                "hidden_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 8,
                "num_image_tokens": 64,
                "projection_dim": 128,
            },
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 512,
                "latent_channels": 64,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 2, 2],
                "num_res_blocks": 1,
                "projection_dim": 128,
                "image_token_embed_dim": 128,
            },
            "image_token_id": tokenizer.convert_tokens_to_ids(janus_prompting.PLACEHOLDER),
            "tie_word_embeddings": False,
        }
    )
    prompting = janus_prompting.Prompting(
        tokenizer,
        num_codes=512,
        num_image_tokens=64,
        max_text_len=32,
        roles=janus_prompting.TAGGED_ROLES,
        system="",
    )
    parts: Any = config
    net = JanusNet(config, attn_implementation="eager")
    table: Any = net.get_submodule("model.vision_model.embeddings.position_embedding").weight
    with torch.no_grad():
        table.copy_(0.3 * sines(math.isqrt(len(table)), table.shape[1]))
    return Janus(net, JanusVQ(parts.vq_config), prompting, config)


def sines(side: int, width: int) -> torch.Tensor:
    """[side * side, width]: sines and cosines of column and row, a start from which a vision tower that trains for
    minutes knows where a patch lies; learned from there on. Source: Attention Is All You Need (arXiv 1706.03762), in
    two dimensions as in MAE (arXiv 2111.06377), with wavelengths for a small grid."""
    at = torch.arange(side, dtype=torch.float32)
    angles = at[:, None] / 100 ** (torch.arange(width // 4) / (width // 4))
    coded = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = coded.repeat(side, 1), coded.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1)


TINY: dict[str, Callable[[Sequence[str]], UnifiedModel]] = {"tiny-showo": tiny_showo, "tiny-janus": tiny_janus}


def build(name: str, words: Sequence[str], seed: int) -> UnifiedModel:
    """A fresh tiny model; the same seed gives the same weights. Errors: ValueError for an unknown name."""
    if name not in TINY:
        raise ValueError(f"unknown tiny model {name!r}; known: {', '.join(TINY)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # transformers initialises from the global generator
        return TINY[name](words)
