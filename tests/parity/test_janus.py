"""Janus against the official code's inputs and outputs. Every size is read from the data."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from openunirl.config import ModelConfig
from openunirl.draws import GeneratorDraws, KeyedDraws
from openunirl.evaluation.run import to_uint8
from openunirl.models import janus_layout
from openunirl.models.answering import decode_answers
from openunirl.models.autoregressive import causal_mask, left_padded
from openunirl.models.janus import Janus
from openunirl.models.janus_prompting import chat, read_picture
from openunirl.models.static_cache import StaticCache
from openunirl.types import AnswerSampling, ImageQuestion, ImageRollout, Images, ImageSampling, ScorePass

CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def data(golden):
    folder = golden / "janus"
    tensors = {p.stem: load_file(p) for p in folder.glob("*.safetensors")}
    return folder, *(json.loads((folder / f"{name}.json").read_text()) for name in ("meta", "prompts")), tensors


@pytest.fixture(scope="module")
def official(data, tmp_path_factory):
    """A folder in deepseek-ai's layout; the tower's sizes are not one of their named ones, so its heads are written."""
    folder, meta, _, _ = data
    path = tmp_path_factory.mktemp("official")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "tokenizer" / name, path / name)
    shutil.copy(folder / "state_dict.safetensors", path / "model.safetensors")
    config = {
        "model_type": "multi_modality",
        "language_config": meta["llama"] | {"model_type": "llama"},
        "vision_config": {"params": {"image_size": meta["siglip"]["image_size"], "heads": meta["siglip"]["heads"]}},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def load(path, attn="sdpa", roles=None):
    return Janus.load(path, ModelConfig(weights=str(path), attn_implementation=attn, roles=roles))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(official, request):
    return load(official, request.param)


def turns(conversation):
    return [(message["role"], message["content"]) for message in conversation]


def with_roles(model, conversation):
    """The adapter under a conversation's own role words."""
    model.prompting.roles = (conversation[0]["role"], conversation[1]["role"])
    model.prompting.image_prefix = model.prompting._understanding("")[0]
    return model


def question(conversation):
    return conversation[0]["content"].removeprefix("<image_placeholder>").strip()


def pixels(data):
    return (data[3]["processor"]["batch.pixel_values"][:, 0] + 1) / 2


# ---------------------------------------------------------------------------------------------------- processor


def test_special_ids(data, model):
    _, meta, _, _ = data
    ids, vocab = meta["special_ids"], model.prompting.vocab
    assert (vocab.placeholder, vocab.boi, vocab.eoi) == tuple(
        ids[f"<{name}>"] for name in ("image_placeholder", "begin_of_image", "end_of_image")
    )
    bos, eos, pad = (next(v for k, v in ids.items() if word in k) for word in ("begin▁", "end▁", "pad"))
    assert (vocab.bos, vocab.eos, vocab.pad) == (bos, eos, pad)
    assert vocab.num_codes == meta["vq"]["codebook_size"] and model.num_image_tokens == meta["num_image_tokens"]


def test_texts_and_ids(data, model):
    _, _, prompts, tensors = data
    want, prompting, rows = tensors["processor"], model.prompting, []
    for j, conversation in enumerate(prompts["conversations"]):
        assert chat(turns(conversation), prompting.system) == prompts["sft_format"][j]
        rows.append(prompting.conversation(turns(conversation)))
        assert rows[-1] == want[f"{j}.input_ids"].tolist()
        own = with_roles(model, conversation).prompting
        assert own.image_prefix + own.question(question(conversation)) == rows[-1]
    two = prompting.conversation(turns(prompts["two_images"]["conversation"]))
    assert two == want["two_images.input_ids"].tolist()
    ids_RL, real_RL = left_padded(rows, prompting.vocab.pad)
    assert torch.equal(ids_RL, want["batch.input_ids"])
    assert torch.equal(real_RL.long(), want["batch.attention_mask"])
    assert torch.equal(ids_RL == prompting.vocab.placeholder, want["batch.images_seq_mask"])


def test_drawing_rows(data, model):
    _, _, prompts, tensors = data
    conversation = prompts["generation"]["conversation"]
    prompting = with_roles(model, conversation).prompting
    row = prompting.t2i(conversation[0]["content"])
    assert row == tensors["processor"]["gen_prompt.input_ids"].tolist()
    for i, want in enumerate(tensors["generation"]["prompt_rows"].tolist()):
        assert want == (prompting.unconditional(len(row)) if i % 2 else row)


def test_pictures_become_exactly_the_official_pixels(data, model):
    want = data[3]["processor"]
    pictures = [Image.fromarray(want[f"{j}.image_uint8_hwc"].numpy()) for j in range(len(want["batch.pixel_values"]))]
    got = torch.stack([read_picture(picture, model.image_size) for picture in pictures])
    assert torch.equal(got * 2 - 1, want["batch.pixel_values"][:, 0])
    images = model.read_pictures(pictures)
    assert images.pixels_BCHW is not None and torch.equal(images.pixels_BCHW, got)


# ------------------------------------------------------------------------------------------------- understanding


@torch.no_grad()
def test_vision_features(data, model):
    want, parts = data[3]["understanding"], model.net.model
    seen = parts["vision_model"](data[3]["processor"]["batch.pixel_values"][:, 0]).last_hidden_state
    torch.testing.assert_close(seen, want["vision_features"], **CLOSE)
    torch.testing.assert_close(parts["aligner"](seen), want["aligned_features"], **CLOSE)


@torch.no_grad()
def test_text_logits_of_one_conversation(data, model):
    _, _, prompts, tensors = data
    for j in range(len(prompts["conversations"])):
        ids_BL = tensors["processor"][f"{j}.input_ids"][None]
        logits = model.net(
            ids_BL,
            causal_mask(torch.ones_like(ids_BL, dtype=torch.bool)),
            positions_BL=torch.arange(ids_BL.shape[1])[None],
            pixels_BCHW=pixels(data)[j : j + 1],
            pixels_start=int((ids_BL[0] == model.prompting.vocab.placeholder).int().argmax()),
        )
        torch.testing.assert_close(logits, tensors["understanding"][f"{j}.logits"], **CLOSE)


def prefilled(data, model):
    """The batch's image prefixes in a cache, their logits, and what follows in each conversation."""
    _, _, prompts, tensors = data
    rows = [tensors["processor"][f"{j}.input_ids"].tolist() for j in range(len(prompts["conversations"]))]
    ends = {row.index(model.prompting.vocab.eoi) + 1 for row in rows}
    assert len(ends) == 1
    end = ends.pop()
    prefix_BL = torch.tensor([row[:end] for row in rows])
    cache = StaticCache(end)
    logits = model.net(
        prefix_BL,
        causal_mask(torch.ones_like(prefix_BL, dtype=torch.bool)),
        positions_BL=torch.arange(end)[None],
        cache=cache,
        pixels_BCHW=pixels(data),
        pixels_start=model.prompting.pixels_start,
    )
    return cache, logits, [row[end:] for row in rows]


@torch.no_grad()
def test_text_logits_of_the_batch(data, model):
    """Image prefix from the cache, questions padded on the left: every position that is not a pad."""
    want, real_BL = (data[3][name] for name in ("understanding", "processor"))
    want_BLV, real_BL = want["batch.logits"], real_BL["batch.attention_mask"].bool()
    cache, prefix_BLV, rest = prefilled(data, model)
    count, length = prefix_BLV.shape[:2]
    ids_BL, seen_BL = left_padded(rest, model.prompting.vocab.pad)
    mask = torch.cat([torch.ones(count, 1, ids_BL.shape[1], length, dtype=torch.bool), causal_mask(seen_BL)], dim=-1)
    cache.keep(torch.arange(count), length + ids_BL.shape[1])
    text_BLV = model.net(
        ids_BL,
        mask,
        positions_BL=length + (seen_BL.cumsum(1) - 1).clamp_min(0),
        cache=cache,
    )
    for b in range(count):
        got_LV = torch.cat([prefix_BLV[b], text_BLV[b][seen_BL[b]]])
        torch.testing.assert_close(got_LV, want_BLV[b][real_BL[b]], **CLOSE)


def until(ids, end):
    return ids[: ids.index(end) + 1] if end in ids else ids


def test_greedy_answers(data, model):
    """The adapter itself, each conversation alone and those of one pair of role words together."""
    _, _, prompts, tensors = data
    together = {}
    for j, conversation in enumerate(prompts["conversations"]):
        together.setdefault(tuple(role for role, _ in turns(conversation)), []).append(j)
    for chosen in [[j] for j in range(len(prompts["conversations"]))] + list(together.values()):
        with_roles(model, prompts["conversations"][chosen[0]])
        asked = [ImageQuestion(image=i, question=question(prompts["conversations"][j])) for i, j in enumerate(chosen)]
        want = [tensors["understanding"][f"{j}.greedy_tokens"].tolist() for j in chosen]
        answers = model.sample_answers(
            Images(pixels_BCHW=pixels(data)[chosen]), asked, torch.zeros(len(chosen), dtype=torch.int64),
            AnswerSampling(max_new_tokens=len(want[0])),
        )  # fmt: skip
        for row, mask_T, ids in zip(answers.tokens_QT, answers.mask_QT, want, strict=True):
            assert row[mask_T].tolist() == until(ids, model.prompting.vocab.eos)


@pytest.mark.parametrize("name", ["batch", "batch_with_stop"])
def test_greedy_answers_of_the_whole_batch(data, model, name):
    """All conversations together over the full vocabulary, with and without a stop token."""
    want = data[3]["understanding"]
    stop = int(want[f"{name}.stop_token"]) if name.endswith("stop") else model.prompting.vocab.eos
    with torch.no_grad():
        cache, _, rest = prefilled(data, model)
        count, width = want[f"{name}.greedy_tokens"].shape
        cache.keep(torch.arange(count), cache.length + max(map(len, rest)) + width)
        got = decode_answers(
            model.net,
            cache,
            questions=tuple(ImageQuestion(image=i, question="") for i in range(count)),
            prompt_ids=rest,
            draws=KeyedDraws(torch.zeros(count, dtype=torch.int64)),
            sampling=AnswerSampling(max_new_tokens=width),
            rows=(0, data[1]["llama"]["vocab_size"]),
            end=stop,
            pad=model.prompting.vocab.pad,
            text=str,
        )
    for b, ids in enumerate(want[f"{name}.greedy_tokens"].tolist()):
        assert got.tokens_QT[b][got.mask_QT[b]].tolist() == until(ids, stop)
        first = want[f"{b}.logits"][0, -1].log_softmax(-1).max()
        torch.testing.assert_close(got.logprobs_QT[b, 0], first, **CLOSE)


# ------------------------------------------------------------------------------------------------ image tokenizer


def test_codes_are_exact_and_pictures_close(data, model):
    want = data[3]["vq"]
    pixels_BCHW = (want["pixel_values"] + 1) / 2
    tokens_BN = model.tokenize(pixels_BCHW)
    assert torch.equal(tokens_BN.flatten(), want["indices"])
    vq = model.image_tokenizer
    with torch.no_grad():
        latents = vq.latents(pixels_BCHW)
    torch.testing.assert_close(latents, F.normalize(want["latent_before_quantize"], dim=1), **CLOSE)
    grid = want["quantized"].shape[2:]
    codes = F.embedding(tokens_BN, vq.unit_codes()).transpose(1, 2).unflatten(2, grid)
    torch.testing.assert_close(codes, want["quantized"], **CLOSE)
    whole = ((want["decoded"] + 1) / 2).clamp(0, 1)
    decoded = model.decode(Images(tokens_BN=tokens_BN))
    torch.testing.assert_close(decoded, whole, **CLOSE)
    grey_levels = torch.from_numpy(to_uint8(decoded)).int() - want["uint8_image_nhwc"].int()
    assert grey_levels.abs().max() <= 1  # floats are truncated, so a last bit may cost a level
    onehots = F.one_hot(tokens_BN, vq.num_codes).float()
    torch.testing.assert_close(model.decode(Images(onehots_BNV=onehots)), whole, **CLOSE)


def test_stored_codes_keep_their_length(data, model):
    stored = data[3]["state_dict"]["gen_vision_model.quantize.embedding.weight"].float()
    assert not torch.allclose(stored.norm(dim=1), torch.ones(len(stored)), atol=0.1)
    assert torch.equal(model.image_tokenizer.state_dict()["quantize.embedding.weight"], stored)


# ----------------------------------------------------------------------------------------------------- drawing


def drawing(data, model):
    settings = data[2]["generation"]
    prompt = with_roles(model, settings["conversation"]).prompting and settings["conversation"][0]["content"]
    sampling = ImageSampling(guidance_scale=settings["cfg_weight"], temperature=settings["temperature"])
    return [prompt] * settings["parallel_size"], sampling


def test_forced_tokens(data, model):
    """The sampler, its cache and its guidance under imposed tokens: probabilities at every step."""
    want = data[3]["generation"]
    prompts, sampling = drawing(data, model)

    class Forced:
        def tokens(self, step, probs_BNV):
            torch.testing.assert_close(probs_BNV[:, 0], want["forced.probs"][:, step], **CLOSE)
            return want["forced.tokens"][:, step : step + 1]

        def uniform(self, step, count):
            raise AssertionError("an autoregressive sampler draws tokens only")

    rollout = model.sample_images(prompts, torch.zeros(len(prompts), dtype=torch.int64), sampling, Forced())
    assert torch.equal(rollout.tokens_BN, want["forced.tokens"])
    chosen = want["forced.probs"].gather(2, want["forced.tokens"][..., None])[..., 0].log()
    torch.testing.assert_close(rollout.logprobs_BN, chosen, **CLOSE)


@torch.no_grad()
def test_one_teacher_forced_pass(data, model):
    want = data[3]["generation"]
    prompts, sampling = drawing(data, model)
    tokens_BN = want["forced.tokens"]
    rows = [model.prompting.t2i(prompt) for prompt in prompts]
    rows += [model.prompting.unconditional(len(row)) for row in rows]
    cond, uncond = model._drawn_logits(rows, tokens_BN).view(2, *want["forced.cond_logits"].shape)
    torch.testing.assert_close(cond, want["forced.cond_logits"], **CLOSE)
    torch.testing.assert_close(uncond, want["forced.uncond_logits"], **CLOSE)
    rollout = ImageRollout(
        prompts=tuple(prompts), tokens_BN=tokens_BN, reveal_step_BN=torch.zeros_like(tokens_BN),
        logprobs_BN=torch.zeros(tokens_BN.shape), sampling=sampling,
    )  # fmt: skip
    everything = torch.ones_like(tokens_BN, dtype=torch.bool)
    one = ScorePass(shown_BN=everything, scored_BN=everything, weight_BN=everything.float())
    guided = want["forced.uncond_logits"] + sampling.guidance_scale * (
        want["forced.cond_logits"] - want["forced.uncond_logits"]
    )
    logp = (guided / sampling.temperature).log_softmax(-1)
    scores = model.score_images(rollout, one)
    torch.testing.assert_close(scores.logprobs_BN, logp.gather(2, tokens_BN[..., None])[..., 0], **CLOSE)
    torch.testing.assert_close(scores.entropy_BN, -(logp.exp() * logp).sum(-1), **CLOSE)


def test_sampled_tokens_of_the_same_seed(data, model):
    want = data[3]["generation"]
    prompts, sampling = drawing(data, model)
    generator = torch.Generator().manual_seed(data[2]["generation"]["seed_torch_manual_seed"])
    draws = GeneratorDraws(generator, len(prompts))
    rollout = model.sample_images(prompts, torch.zeros(len(prompts), dtype=torch.int64), sampling, draws)
    assert torch.equal(rollout.tokens_BN, want["sampled.tokens"].long())
    decoded = ((want["sampled.decoded"] + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(model.decode(rollout.images), decoded, **CLOSE)


# ----------------------------------------------------------------------------------------------------- layouts


def test_all_layouts_give_the_same_model(data, official, tmp_path):
    """deepseek-ai's folder, the same weights in transformers' layout, and what `save` writes of either."""
    state = load_file(official / "model.safetensors")
    config = json.loads((official / "config.json").read_text())
    hf = tmp_path / "hf"
    hf.mkdir()
    save_file(janus_layout.to_hf(state), hf / "model.safetensors")
    (hf / "config.json").write_text(json.dumps(janus_layout.hf_config(config, state)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(official / name, hf / name)
    first = load(official)
    second = load(hf)
    first.save(tmp_path / "saved")
    for other in (second, load(tmp_path / "saved")):
        assert other.prompting.roles == first.prompting.roles and other.prompting.system == first.prompting.system
        for part in ("net", "image_tokenizer"):
            mine, its = getattr(first, part).state_dict(), getattr(other, part).state_dict()
            assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def test_a_saved_folder_loads_in_transformers_with_an_untied_head(data, official, tmp_path):
    from transformers import JanusForConditionalGeneration

    load(official).save(tmp_path / "saved")
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids_BL = data[3]["processor"]["0.input_ids"][None]
    with torch.no_grad():
        logits = theirs(input_ids=ids_BL, pixel_values=data[3]["processor"]["batch.pixel_values"][0]).logits
    torch.testing.assert_close(logits, data[3]["understanding"]["0.logits"], **CLOSE)
