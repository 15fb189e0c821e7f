"""Janus' names and configuration in both layouts, on a tiny random network and on the golden weights."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import JanusConfig, JanusForConditionalGeneration

from openunirl.models import janus_layout
from openunirl.models.janus_layout import SpecialTokens

GOLDEN = (
    Path(os.environ.get("OPENUNIRL_GOLDEN") or Path(__file__).parent / "golden") / "janus" / "state_dict.safetensors"
)
TOKENS = SpecialTokens(bos=9, eos=10, pad=11, begin_of_image=15, placeholder=14)

# Worked out by hand from the two sets of modules.
PAIRS = {
    "vision_model.vision_tower.patch_embed.proj.weight": "model.vision_model.embeddings.patch_embedding.weight",
    "vision_model.vision_tower.blocks.1.norm2.bias": "model.vision_model.encoder.layers.1.layer_norm2.bias",
    "vision_model.vision_tower.blocks.0.attn.proj.bias": (
        "model.vision_model.encoder.layers.0.self_attn.projection_layer.bias"
    ),
    "vision_model.vision_tower.norm.weight": "model.vision_model.post_layernorm.weight",
    "aligner.layers.2.bias": "model.aligner.hidden_layers.0.bias",
    "gen_aligner.layers.0.weight": "model.generation_aligner.fc1.weight",
    "gen_head.output_mlp_projector.bias": "model.generation_head.proj_out.bias",
    "gen_embed.weight": "model.generation_embeddings.weight",
    "gen_vision_model.encoder.conv_blocks.1.res.0.conv2.bias": "model.vqmodel.encoder.down.1.block.0.conv2.bias",
    "gen_vision_model.encoder.conv_blocks.2.attn.0.k.weight": "model.vqmodel.encoder.down.2.attn.0.k.weight",
    "gen_vision_model.decoder.conv_blocks.0.upsample.conv.bias": "model.vqmodel.decoder.up.0.upsample.conv.bias",
    "gen_vision_model.decoder.mid.0.norm1.weight": "model.vqmodel.decoder.mid.block_1.norm1.weight",
    "gen_vision_model.decoder.mid.1.q.weight": "model.vqmodel.decoder.mid.attn_1.q.weight",
    "gen_vision_model.encoder.mid.2.conv1.bias": "model.vqmodel.encoder.mid.block_2.conv1.bias",
    "gen_vision_model.quantize.embedding.weight": "model.vqmodel.quantize.embedding.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
    "language_model.lm_head.weight": "lm_head.weight",
}


@pytest.fixture(scope="module")
def janus() -> JanusForConditionalGeneration:
    """Grouped heads, an uneven VQ and a rotary base of its own, so that no size can be guessed from another."""
    text = {
        "model_type": "llama", "vocab_size": 20, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 5000.0, "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    vision = {
        "image_size": 24, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "mlp_ratio": 3, "projection_dim": 24, "num_image_tokens": 9,
    }  # fmt: skip
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


# ------------------------------------------------------------------------------------------------------ names


def test_names_are_translated_as_worked_out_by_hand(hf_state):
    official_state = janus_layout.to_official(hf_state)
    for name, hf_name in PAIRS.items():
        assert name in official_state, name
        assert torch.equal(official_state[name], hf_state[hf_name]), name


def test_query_key_value_and_positions_change_shape(hf_state):
    official_state = janus_layout.to_official(hf_state)
    joined = official_state["vision_model.vision_tower.blocks.1.attn.qkv.weight"]
    assert joined.shape == (48, 16)
    for i, letter in enumerate("qkv"):
        part = hf_state[f"model.vision_model.encoder.layers.1.self_attn.{letter}_proj.weight"]
        assert torch.equal(joined[16 * i : 16 * (i + 1)], part)
    assert official_state["vision_model.vision_tower.pos_embed"].shape == (1, 9, 16)


def test_names_go_both_ways_bit_for_bit(hf_state):
    official_state = janus_layout.to_official(hf_state)
    assert equal(janus_layout.to_hf(official_state), hf_state)
    unused = {
        "gen_vision_model.quantize.codebook_used": torch.zeros(8),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    assert equal(janus_layout.to_official(janus_layout.to_hf(official_state | unused)), official_state)
    assert janus_layout.is_official(official_state) and not janus_layout.is_hf(official_state)
    assert janus_layout.is_hf(hf_state) and not janus_layout.is_official(hf_state)
    assert not janus_layout.is_hf({"lm_head.weight": torch.ones(1), "model.embed_tokens.weight": torch.ones(1)})


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden weights of Janus are not there")
def test_golden_weights_go_both_ways():
    golden = load_file(GOLDEN)
    state = janus_layout.to_hf(golden)
    back = janus_layout.to_official(state)
    dropped = {k for k in golden if "attn_pool" in k} | {"gen_vision_model.quantize.codebook_used"}
    assert equal(back, {k: v for k, v in golden.items() if k not in dropped})
    tower = "vision_model.vision_tower."
    assert torch.equal(
        state["model.vision_model.encoder.layers.1.self_attn.v_proj.bias"],
        golden[f"{tower}blocks.1.attn.qkv.bias"][64:],
    )


def test_a_name_that_no_rule_knows_is_refused(hf_state):
    with pytest.raises(ValueError, match=r"gen_vision_model\.encoder\.conv_blocks\.0\.foo"):
        janus_layout.to_hf({"gen_vision_model.encoder.conv_blocks.0.foo": torch.ones(1)})
    with pytest.raises(ValueError, match=r"model\.aligner\.hidden_layers\.1\.weight"):
        janus_layout.to_official(hf_state | {"model.aligner.hidden_layers.1.weight": torch.ones(1)})


def test_parts_that_do_not_fit_together_are_refused(hf_state):
    lone = "model.vision_model.encoder.layers.0.self_attn.{}_proj.bias"
    with pytest.raises(ValueError, match=re.escape(f"its partner {lone.format('k')}")):
        janus_layout.to_official({k: v for k, v in hf_state.items() if k != lone.format("k")})
    with pytest.raises(ValueError, match="32 rows, wanted three equal parts"):
        janus_layout.to_hf({"vision_model.vision_tower.blocks.0.attn.qkv.bias": torch.ones(32)})
    with pytest.raises(ValueError, match=r"\[9, 16\], wanted \[1, patches, width\]"):
        janus_layout.to_hf({"vision_model.vision_tower.pos_embed": torch.ones(9, 16)})


# ------------------------------------------------------------------------------------------------- configuration


def test_configuration_goes_both_ways(janus, hf_state):
    official = janus_layout.official_config(janus.config.to_dict())
    assert official["gen_head_config"]["params"] == {"image_token_embed": 24, "image_token_size": 12, "n_embed": 24}
    assert official["language_config"]["rope_theta"] == 5000.0
    config = janus_layout.hf_config(official, janus_layout.to_official(hf_state), TOKENS)
    assert (config["tie_word_embeddings"], config["dtype"], config["image_token_id"]) == (False, "float32", 14)
    back = JanusConfig.from_dict(config).to_dict()
    wanted = janus.config.to_dict()
    for part in ("text_config", "vision_config", "vq_config"):
        changed = {k for k in wanted[part] if back[part][k] != wanted[part][k]}
        assert changed <= {"bos_token_id", "eos_token_id", "pad_token_id"}, part


def test_the_real_sizes_get_the_authors_own_configuration():
    text = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 102400, "max_position_embeddings": 16384,
    }  # fmt: skip
    config = JanusConfig(text_config=text, tie_word_embeddings=False)
    official = janus_layout.official_config(config.to_dict())
    assert official["model_type"] == "multi_modality"
    assert official["vision_config"] == {
        "cls": "CLIPVisionTower",
        "model_type": "vision",
        "params": {
            "image_size": 384,
            "model_name": "siglip_large_patch16_384",
            "select_feature": "same",
            "select_layer": -1,
        },
    }
    assert official["aligner_config"]["params"] == {
        "depth": 2, "input_dim": 1024, "n_embed": 2048, "projector_type": "mlp_gelu",
    }  # fmt: skip
    assert official["gen_vision_config"]["params"] == {"image_token_size": 16384, "n_embed": 8}
    with torch.device("meta"):
        state = JanusForConditionalGeneration(config).state_dict()
    back = janus_layout.hf_config(official, janus_layout.to_official(state))
    assert back["vq_config"]["channel_multiplier"] == [1, 1, 2, 2, 4]
    assert (back["vq_config"]["num_res_blocks"], back["vq_config"]["latent_channels"]) == (2, 256)
    assert (back["vision_config"]["num_attention_heads"], back["vision_config"]["num_image_tokens"]) == (16, 576)


def test_a_configuration_that_does_not_tell_is_refused(janus, hf_state):
    official, state = janus_layout.official_config(janus.config.to_dict()), janus_layout.to_official(hf_state)
    params = official["vision_config"]["params"]
    with pytest.raises(ValueError, match="head count of the vision tower 'mine' is not known"):
        without = {k: v for k, v in params.items() if k != "heads"} | {"model_name": "mine"}
        janus_layout.hf_config(official | {"vision_config": {"params": without}}, state)
    with pytest.raises(ValueError, match="384 pixels a side, the weights 24"):
        janus_layout.hf_config(official | {"vision_config": {"params": params | {"image_size": 384}}}, state)
    with pytest.raises(ValueError, match="not a whole Janus checkpoint: 'language_config'"):
        janus_layout.hf_config({k: v for k, v in official.items() if k != "language_config"}, state)
