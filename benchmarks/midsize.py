"""Random models of a size between tiny and real: hidden 512, 8 layers, 8 heads, real vocabularies, 256 image tokens.

Only what a benchmark does not time is small: the image tokenizers and the vision tower's depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from transformers import JanusConfig, PreTrainedTokenizerFast

from floor import Decoder
from openunirl.models import janus_prompting, packed_linear, showo_prompting
from openunirl.models.janus import Janus
from openunirl.models.janus_net import JanusNet
from openunirl.models.magvit import Magvit, MagvitConfig
from openunirl.models.showo import Showo
from openunirl.models.showo_net import ShowoNet, ShowoSizes
from openunirl.models.tiny import word_tokenizer
from openunirl.models.vq import JanusVQ
from openunirl.tasks import shapes

HIDDEN, LAYERS, HEADS = 512, 8, 8
JANUS_TEXT, JANUS_CODES, JANUS_GATED = 102400, 16384, 1408  # Janus-1.3B: 5632 of 2048
SHOWO_TEXT, SHOWO_CODE_BITS, SHOWO_MLP = 50295, 13, 2048

LEAST_EQUAL = 0.99  # share of tokens; rounding may turn a tie

PROMPTS = (
    "a photo of a circle",
    "a photo of a red circle left of a blue square",
    "a photo of two stars",
    "a photo of a green triangle and a yellow star",
)
QUESTIONS = (
    "what color is the circle?",
    "how many stars are in this image?",
    "what is the main item in this image?",
    "where is the red circle relative to the blue square?",
)


def prompts(count: int) -> list[str]:
    """Prompts of different lengths, in turn."""
    return [PROMPTS[i % len(PROMPTS)] for i in range(count)]


def questions(count: int) -> list[str]:
    return [QUESTIONS[i % len(QUESTIONS)] for i in range(count)]


def decoder(model: Showo | Janus) -> Decoder:
    """The sizes of a model of this file."""
    mlp = (SHOWO_MLP,) if isinstance(model, Showo) else (JANUS_GATED,) * 2
    return Decoder(hidden=HIDDEN, layers=LAYERS, heads=HEADS, mlp=mlp)


def image_prefix(model: Showo | Janus) -> int:
    """Positions before a question: the image and what stands around it."""
    return model.num_image_tokens + 3 if isinstance(model, Showo) else len(model.prompting.image_prefix)


def not_packed(work: Callable[[], Any]) -> Any:
    """The result of `work`, during which our samplers leave all weights in their own layout."""
    with mock.patch.object(packed_linear, "SMALLEST", 2**62):
        return work()


def check_equal(name: str, share: float) -> None:
    """Prints the share of equal tokens and refuses to compare the times of two samplers that draw different images."""
    print(f"equal tokens for equal random numbers, {name}: {share:.2%}")
    assert share >= LEAST_EQUAL, (
        f"{name} draws other images: {share:.2%} equal tokens, at least {LEAST_EQUAL:.0%} wanted"
    )


def janus(side: int = 16, seed: int = 0) -> Janus:
    """Draws side x side tokens of 16,384 codes; answers are drawn from 102,400 words."""
    ends = {"bos_token": janus_prompting.BOS, "eos_token": janus_prompting.EOS, "pad_token": janus_prompting.PAD}
    images = (janus_prompting.PLACEHOLDER, janus_prompting.BEGIN_IMAGE, janus_prompting.END_IMAGE)
    own = [*janus_prompting.TAGGED_ROLES, *images]
    tokenizer = _words(JANUS_TEXT - len(ends) - len(own))
    tokenizer.add_special_tokens(ends)
    tokenizer.add_tokens(own, special_tokens=True)
    sizes: Any = {
        "text_config": {
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": JANUS_GATED,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 2048,
        },
        "vision_config": {
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": side * 16,
            "patch_size": 16,
            "num_image_tokens": side * side,
            "projection_dim": HIDDEN,
        },
        "vq_config": {
            "embed_dim": 8,
            "num_embeddings": JANUS_CODES,
            "latent_channels": 64,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 2, 2],
            "num_res_blocks": 1,
            "projection_dim": HIDDEN,
            "image_token_embed_dim": HIDDEN,
        },
        "image_token_id": tokenizer.convert_tokens_to_ids(janus_prompting.PLACEHOLDER),
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    config: Any = JanusConfig.from_dict(sizes)
    prompting = janus_prompting.Prompting(
        tokenizer,
        num_codes=JANUS_CODES,
        num_image_tokens=side * side,
        max_text_len=64,
        roles=janus_prompting.TAGGED_ROLES,
        system="",
    )
    model = Janus(JanusNet(config), JanusVQ(config.vq_config), prompting, config)
    model.net.eval()
    return model


def showo(side: int = 16, seed: int = 0) -> Showo:
    """58,498 entries: 50,295 of text, 10 of its own, 8,192 codes, the mask."""
    torch.manual_seed(seed)
    magvit = Magvit(
        MagvitConfig(
            encoder_ch=16,
            encoder_ch_mult=(1, 1, 1, 2, 2),
            encoder_num_res_blocks=(1, 1, 1, 1, 1),
            decoder_ch=16,
            decoder_ch_mult=(1, 1, 1, 2, 2),
            decoder_num_res_blocks=(1, 1, 1, 1, 1),
            codebook_bits=SHOWO_CODE_BITS,
            norm_groups=8,
        )
    )
    prompting = showo_prompting.Prompting(_words(SHOWO_TEXT), num_codes=2**SHOWO_CODE_BITS, max_text_len=128)
    sizes = ShowoSizes(
        vocab_size=prompting.vocab.size,
        hidden_size=HIDDEN,
        intermediate_size=SHOWO_MLP,
        num_layers=LAYERS,
        num_heads=HEADS,
    )
    model = Showo(ShowoNet(sizes), magvit, prompting, num_image_tokens=side * side)
    model.net.eval()
    return model


def _words(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `count` words, most of which no prompt holds."""
    words = list(shapes.vocabulary())
    fewer = len(word_tokenizer(words))
    tokenizer = word_tokenizer([*words, *(f"~{i}" for i in range(count - fewer))])
    assert len(tokenizer) == count, f"{len(tokenizer)} words, not {count}"
    return tokenizer
