"""A model without its numbers: every size is right, nothing is read, downloaded or allocated.

In: a ModelConfig. Out: an adapter whose weights lie on torch's meta device. A bundled model or a local folder tells its
sizes itself; published ones have them here, so that `openunirl plan` needs neither weights nor network.

Sources, recalled from the published configurations and not downloaded again:
* Show-o: Phi-1.5 (hidden 2048, 24 layers, 32 heads, MLP 8192), 58,498 entries; MAGVIT-v2 as magvit.py has it.
* Janus-1.3B, Janus-Pro-1B: Llama 2048 x 24, 16 heads, MLP 5632; Janus-Pro-7B: 4096 x 30, 32 heads, MLP 11008; all:
  102,400 entries, SigLIP-L at 384 px in patches of 16, VQ-16 with 16,384 codes of 8 dimensions.

Departure: a published model's tokenizer is not here either; one that counts words (and ? and :) stands in for it, so
texts come out a little shorter than its own would make them. All rows of Janus' text head count as text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from openunirl.config import ModelConfig
from openunirl.models import janus_prompting, showo_prompting
from openunirl.models.janus import Janus
from openunirl.models.janus_net import JanusNet, sizes_of
from openunirl.models.magvit import Magvit, MagvitConfig
from openunirl.models.protocol import UnifiedModel, load_model
from openunirl.models.showo import Showo
from openunirl.models.showo_net import ShowoNet, ShowoSizes
from openunirl.models.tiny import word_tokenizer
from openunirl.models.vq import JanusVQ
from openunirl.presets import bundled


def blank_model(source: ModelConfig) -> UnifiedModel:
    """Errors: ValueError for a model whose sizes are neither here nor in a local folder."""
    weights = bundled(source.weights) or source.weights
    if not Path(weights).expanduser().exists() and weights not in SIZES:
        raise ValueError(
            f"the sizes of {source.weights} are not known without its files: give a local folder that holds them, or "
            f"one of {', '.join(SIZES)}"
        )
    with torch.device("meta"):
        return load_model(source) if Path(weights).expanduser().exists() else SIZES[weights](source)


def counting_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `count` entries that makes one token of each word."""
    fewer = len(word_tokenizer(()))
    tokenizer = word_tokenizer([f"~{i}" for i in range(count - fewer)])
    assert len(tokenizer) == count, f"{len(tokenizer)} entries, not {count}"
    return tokenizer


def _showo(source: ModelConfig) -> Showo:
    magvit = Magvit(MagvitConfig())
    prompting = showo_prompting.Prompting(
        counting_tokenizer(50295), num_codes=magvit.config.codebook_size, max_text_len=source.max_text_len or 128
    )
    sizes = ShowoSizes(
        vocab_size=prompting.vocab.size, hidden_size=2048, intermediate_size=8192, num_layers=24, num_heads=32
    )
    net = ShowoNet(sizes, attn_implementation=source.attn_implementation)
    return Showo(net, magvit, prompting, source.num_image_tokens or 256)


def _janus(hidden: int, layers: int, heads: int, mlp: int) -> Callable[[ModelConfig], Janus]:
    rows, codes, seen = 102_400, 16_384, 576

    def make(source: ModelConfig) -> Janus:
        special = (janus_prompting.PLACEHOLDER, janus_prompting.BEGIN_IMAGE, janus_prompting.END_IMAGE)
        named: Any = {
            "bos_token": janus_prompting.BOS,
            "eos_token": janus_prompting.EOS,
            "pad_token": janus_prompting.PAD,
        }
        added = (*named.values(), *janus_prompting.TAGGED_ROLES, *special)
        tokenizer = counting_tokenizer(rows - len(added))
        tokenizer.add_special_tokens(named)
        tokenizer.add_tokens([*janus_prompting.TAGGED_ROLES, *special], special_tokens=True)
        config: Any = sizes_of(
            {
                "text_config": {
                    "model_type": "llama",
                    "vocab_size": rows,
                    "hidden_size": hidden,
                    "intermediate_size": mlp,
                    "num_hidden_layers": layers,
                    "num_attention_heads": heads,
                    "max_position_embeddings": 16384,
                },
                "vision_config": {
                    "hidden_size": 1024,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                    "mlp_ratio": 4,
                    "image_size": 384,
                    "patch_size": 16,
                    "num_image_tokens": seen,
                    "projection_dim": hidden,
                },
                "vq_config": {
                    "embed_dim": 8,
                    "num_embeddings": codes,
                    "latent_channels": 256,
                    "base_channels": 128,
                    "channel_multiplier": [1, 1, 2, 2, 4],
                    "num_res_blocks": 2,
                    "projection_dim": hidden,
                    "image_token_embed_dim": hidden,
                },
                "image_token_id": tokenizer.convert_tokens_to_ids(janus_prompting.PLACEHOLDER),
            }
        )
        prompting = janus_prompting.Prompting(
            tokenizer,
            num_codes=codes,
            num_image_tokens=seen,
            max_text_len=source.max_text_len or 16384 - seen,
            roles=source.roles or janus_prompting.TAGGED_ROLES,
        )
        net = JanusNet(config, attn_implementation=source.attn_implementation)
        return Janus(net, JanusVQ(config.vq_config), prompting, config)

    return make


SIZES: dict[str, Callable[[ModelConfig], UnifiedModel]] = {
    "showlab/show-o": _showo,
    "showlab/show-o-512x512": _showo,
    "deepseek-ai/Janus-1.3B": _janus(2048, 24, 16, 5632),
    "deepseek-ai/Janus-Pro-1B": _janus(2048, 24, 16, 5632),
    "deepseek-ai/Janus-Pro-7B": _janus(4096, 30, 32, 11008),
}
"""hub id -> a model of its sizes."""
