"""The tiny size of each family, with fresh weights: the same classes as the real checkpoints, only smaller.

In: the words of a world and a seed. Out: an untrained adapter. `pretrain.py` trains it; the results are in `assets/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openunirl.models.magvit import Magvit, MagvitConfig
from openunirl.models.protocol import UnifiedModel
from openunirl.models.showo import Showo
from openunirl.models.showo_net import ShowoNet, ShowoSizes
from openunirl.models.showo_prompting import Prompting

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


TINY: dict[str, Callable[[Sequence[str]], UnifiedModel]] = {"tiny-showo": tiny_showo}


def build(name: str, words: Sequence[str], seed: int) -> UnifiedModel:
    """A fresh tiny model; the same seed gives the same weights. Errors: ValueError for an unknown name."""
    if name not in TINY:
        raise ValueError(f"unknown tiny model {name!r}; known: {', '.join(TINY)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # transformers initialises from the global generator
        return TINY[name](words)
