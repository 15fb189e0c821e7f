"""Show-o against the official code's inputs and outputs. Every size is read from the data."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from openunirl.draws import GeneratorDraws, KeyedDraws
from openunirl.models import masked
from openunirl.models.answering import decode_answers
from openunirl.models.magvit import Magvit, MagvitConfig
from openunirl.models.policy import drawing_loss
from openunirl.models.showo import Showo
from openunirl.models.showo_net import ShowoNet, ShowoSizes
from openunirl.models.showo_prompting import Prompting
from openunirl.models.static_cache import StaticCache
from openunirl.types import AnswerSampling, ImageQuestion, ImageSampling

_SMALL = {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": (1, 1)}


@pytest.fixture(scope="module")
def data(golden):
    folder = golden / "showo"
    meta = json.loads((folder / "meta.json").read_text())
    tensors = {p.stem: load_file(p) for p in folder.glob("*.safetensors")}
    texts = json.loads((folder / "prompting_texts.json").read_text())["texts"]
    return folder, meta, tensors, texts


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(data, request):
    _folder, meta, tensors, _ = data
    state = {k: v.float() for k, v in tensors["state_dict"].items()}
    told = ("partial_rotary_factor", "rope_theta", "layer_norm_eps")  # the weights' shapes tell the rest
    sizes = replace(ShowoSizes.from_state_dict(state), **{name: meta["model"]["phi"][name] for name in told})
    net = ShowoNet(sizes, attn_implementation=request.param)
    net.load_state_dict(state)
    prompting = _prompting(data)
    bits = int(math.log2(meta["model"]["codebook_size"]))
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in _SMALL.items()}
    tokenizer = Magvit(MagvitConfig(**sizes, codebook_bits=bits))
    return Showo(net, tokenizer, prompting, meta["model"]["num_vq_tokens"])


def _prompting(data, name="tokenizer"):
    folder, meta, _, _ = data
    return Prompting(
        AutoTokenizer.from_pretrained(folder / name),
        num_codes=meta["model"]["codebook_size"],
        max_text_len=meta["max_text_len"],
    )


def test_vocabulary_layout(data):
    _, meta, _, _ = data
    for name in ("tokenizer", "tokenizer_after"):
        vocab = _prompting(data, name).vocab
        assert vocab.size == meta["model"]["vocab_size"]
        assert vocab.mask == meta["model"]["mask_token_id"]
        assert vocab.code_offset == meta["model"]["image_token_offset"]
        assert vocab.pad == meta["special_token_ids"]["<|pad|>"]
        for short in ("soi", "eoi", "t2i", "mmu", "lvg"):
            assert vocab.special(short) == meta["special_token_ids"][f"<|{short}|>"]


def test_prompting_ids_and_labels(data):
    _, _, tensors, texts = data
    want, prompting = tensors["prompting"], _prompting(data)
    ids = prompting.t2i(texts, want["t2i.image_ids"], truncate=True)
    assert torch.equal(ids, want["t2i.input_ids"])
    assert torch.equal(prompting.t2i_labels(ids, want["t2i.image_labels"]), want["t2i.labels"])
    dropped = prompting.t2i([""] * len(texts), want["t2i.image_ids"])
    assert torch.equal(dropped, want["t2i_all_dropped.input_ids"])
    assert want["t2i_gen.input_ids"].shape == ids.shape
    assert torch.equal(
        prompting.t2i_prefix(texts, truncate=True), want["t2i_gen.input_ids"][:, : prompting.max_text_len + 1]
    )
    ids = prompting.mmu(texts, want["mmu.image_ids"], truncate=True)
    assert torch.equal(ids, want["mmu.input_ids"])
    assert torch.equal(prompting.mmu_labels(ids, want["mmu.image_ids"].shape[1]), want["mmu.labels"])
    for key in ("lm", "lm_short6"):
        ids = prompting.lm(texts, want[f"{key}.input_ids"].shape[1])
        assert torch.equal(ids, want[f"{key}.input_ids"])
        assert torch.equal(prompting.lm_labels(ids), want[f"{key}.labels"])


def test_a_text_that_does_not_fit_is_refused(data):
    _, _, _, texts = data
    with pytest.raises(ValueError, match="max_text_len"):
        _prompting(data).t2i_prefix(texts)


def test_masks(data):
    _, _, tensors, _texts = data
    want, prompting = tensors["prompting"], _prompting(data)
    assert torch.equal(prompting.t2i_mask(want["t2i.input_ids"]), want["mask4d.t2i_rm_pad_bool"])
    assert torch.equal(prompting.t2i_mask(want["t2i.input_ids"], hide_pads=False), want["mask4d.t2i_keep_pad_bool"])
    assert torch.equal(prompting.mmu_mask(want["mmu.input_ids"]), want["mask4d.mmu_bool"])
    assert torch.equal(prompting.t2i_mask(want["lm.input_ids"], hide_pads=False), want["mask4d.lm_bool"])


def test_logits_and_losses(data, model):
    _, meta, tensors, _ = data
    forward = tensors["forward"]
    for key in ("t2i", "mmu", "mixed"):
        with torch.no_grad():
            logits = model.net(forward[f"{key}.input_ids"], forward[f"{key}.attention_mask"] >= 0)
        torch.testing.assert_close(logits, forward[f"{key}.logits"], atol=1e-4, rtol=0)
    batch, labels = meta["mixed_batch"], forward["mixed.labels"]
    drawn, said = batch["batch_size_t2i"], batch["batch_size_t2i"] + batch["batch_size_lm"]
    image = slice(batch["max_seq_length"] + 1, None)

    def loss(rows, shift):
        kept, wanted = (logits[rows, :-1], labels[rows, 1:]) if shift else (logits[rows, image], labels[rows, image])
        return drawing_loss(kept[wanted >= 0], wanted[wanted >= 0], None).item()

    assert loss(slice(0, drawn), False) == pytest.approx(meta["losses"]["loss_t2i"], abs=1e-4)
    assert loss(slice(drawn, said), True) == pytest.approx(meta["losses"]["loss_lm"], abs=1e-4)
    assert loss(slice(said, None), True) == pytest.approx(meta["losses"]["loss_mmu"], abs=1e-4)


def test_adapter_logits_equal_the_full_forward(data, model):
    """Cut pads, sliced rows and selected positions change nothing: against the golden full logits."""
    _, _meta, tensors, texts = data
    forward, prompting, vocab = tensors["forward"], model.prompting, model.prompting.vocab
    ids = forward["t2i.input_ids"]
    start = prompting.max_text_len + 2
    tokens = ids[:, start:-1] - vocab.code_offset
    shown = torch.where(ids[:, start:-1] == vocab.mask, masked.MASKED, tokens)
    by_row = {
        tuple(row.tolist()): text for row, text in zip(prompting.t2i_prefix(texts, truncate=True), texts, strict=True)
    }
    prompts = [by_row.get(tuple(row.tolist())) for row in ids[:, : start - 1]]
    known = [i for i, p in enumerate(prompts) if p is not None and p in texts and _fits(prompting, p)]
    assert known
    picked = torch.arange(len(known) * shown.shape[1])
    with torch.no_grad():
        logits = model._masked_logits([prompts[i] for i in known], shown[known], picked, 1.0)
    want = forward["t2i.logits"][known, start:-1, vocab.code_offset : vocab.mask]
    torch.testing.assert_close(logits.view(want.shape), want, atol=1e-4, rtol=0)


def _fits(prompting, text):
    try:
        prompting.t2i_prefix([text])
    except ValueError:
        return False
    return True


def test_schedules(data):
    _, meta, tensors, _ = data
    schedules, schedule = tensors["schedules"], meta["t2i_generate"]["noise_schedule"]
    for key, value in schedules.items():
        kind, _, rest = key.partition(".")
        if kind == "schedule":
            torch.testing.assert_close(
                masked.mask_ratio(rest, schedules["t"]).to(value.dtype), value, atol=1e-6, rtol=0
            )
        elif kind == "mask_len_raw":
            num, steps = (int(part[1:]) for part in rest.split("."))
            ratio = torch.stack([masked.mask_ratio(schedule, torch.tensor((k + 1) / steps)) for k in range(steps)])
            assert torch.equal(torch.floor(num * ratio), value.float())
        elif kind == "temperature_cumulative":
            steps = int(rest[1:])
            assert masked.confidence_temperatures(1.0, steps) == pytest.approx(value.tolist(), abs=1e-12)


@pytest.mark.parametrize("name", ["t2i_generate_nocfg", "t2i_generate_cfg"])
def test_every_step_of_the_sampler(data, model, name):
    _, meta, tensors, _ = data
    run, settings, vocab = tensors[name], meta["t2i_generate"], model.prompting.vocab
    guidance = (
        settings["guidance_scale_cfg"]
        if name.endswith("_cfg") and "nocfg" not in name
        else settings["guidance_scale_nocfg"]
    )
    sampling = ImageSampling(
        num_timesteps=settings["timesteps"],
        guidance_scale=1 + guidance,
        confidence_temperature=settings["temperature_start"],
    )
    seen = []

    class Watched(GeneratorDraws):
        def tokens(self, step, probs_BNV):
            drawn = super().tokens(step, probs_BNV)
            assert torch.equal(drawn, run[f"step{step}.multinomial_sample"]), f"draws of step {step}"
            cond = run[f"step{step}.cond_logits"]
            logits = cond if guidance == 0 else (1 + guidance) * cond - guidance * run[f"step{step}.uncond_logits"]
            torch.testing.assert_close(probs_BNV, logits.softmax(-1), atol=1e-4, rtol=0)
            return drawn

        def uniform(self, step, count):
            noise = super().uniform(step, count)
            torch.testing.assert_close(masked.gumbel(noise), run[f"step{step}.gumbel_noise"], atol=1e-5, rtol=0)
            seen.append(step)
            return noise

    fits = [p for p in settings["prompts"] if _fits(model.prompting, p)]
    monkey = model.prompting.t2i_prefix
    model.prompting.t2i_prefix = lambda texts, truncate=False: monkey(texts, truncate=True)  # as the official code cuts
    try:
        generator = torch.Generator().manual_seed(settings["generator_seed"])
        draws = Watched(generator, len(settings["prompts"]))
        rollout = model.sample_images(settings["prompts"], torch.zeros(len(settings["prompts"])), sampling, draws)
    finally:
        del model.prompting.t2i_prefix
    assert fits and seen == list(range(settings["timesteps"]))
    assert torch.equal(rollout.tokens_BN, run["output_tokens"])
    for step in range(settings["timesteps"]):
        ids = run[f"step{step}.model_input_ids"][: len(rollout.tokens_BN), -model.num_image_tokens - 1 : -1]
        assert torch.equal(ids == vocab.mask, rollout.reveal_step_BN >= step), f"trajectory before step {step}"
        if step < settings["timesteps"] - 1:
            unknown = ids == vocab.mask
            drawn = torch.where(unknown, run[f"step{step}.multinomial_sample"], ids - vocab.code_offset)
            ratio = masked.mask_ratio(settings["noise_schedule"], torch.tensor((step + 1) / settings["timesteps"]))
            got = masked.remask(
                run[f"step{step}.selected_probs"].masked_fill(~unknown, 0.5), unknown,
                run[f"step{step}.gumbel_noise"], float(run[f"step{step}.temperature"]), ratio,
            )  # fmt: skip
            assert torch.equal(got, run[f"step{step}.masking"]) and drawn.shape == got.shape


@pytest.mark.parametrize("name", ["t2i_generate_nocfg", "t2i_generate_cfg"])
def test_the_sampler_at_masked_tokens_only(data, model, name):
    """Our own path, which has no logits of known tokens: given the official draws, it must reveal the official ones."""
    _, meta, tensors, _ = data
    run, settings = tensors[name], meta["t2i_generate"]
    guidance = settings["guidance_scale_nocfg" if name.endswith("nocfg") else "guidance_scale_cfg"]
    sampling = ImageSampling(
        num_timesteps=settings["timesteps"],
        guidance_scale=1 + guidance,
        confidence_temperature=settings["temperature_start"],
    )
    read = []

    class Replayed:
        everywhere = False

        def tokens(self, step, probs_BNV, at_BN=None):
            cond, every_BN = run[f"step{step}.cond_logits"], torch.arange(model.num_image_tokens)[None]
            logits = cond if guidance == 0 else (1 + guidance) * cond - guidance * run[f"step{step}.uncond_logits"]
            at_BN = every_BN.expand(len(cond), -1) if at_BN is None else at_BN
            want = logits.softmax(-1).gather(1, at_BN[..., None].expand(-1, -1, logits.shape[-1]))
            torch.testing.assert_close(probs_BNV, want, atol=1e-4, rtol=0)
            read.append(at_BN.shape[1])
            return run[f"step{step}.multinomial_sample"].gather(1, at_BN)

        def uniform(self, step, count):
            return (-(-run[f"step{step}.gumbel_noise"].double()).exp()).exp()

    whole = model.prompting.t2i_prefix
    model.prompting.t2i_prefix = lambda texts, truncate=False: whole(texts, truncate=True)  # as the official code cuts
    try:
        rollout = model.sample_images(settings["prompts"], torch.zeros(len(settings["prompts"])), sampling, Replayed())
    finally:
        del model.prompting.t2i_prefix
    assert torch.equal(rollout.tokens_BN, run["output_tokens"])
    assert read == masked.masked_counts(model.num_image_tokens, settings["timesteps"]) and read[-1] < read[0]


def test_greedy_answers(data, model):
    """Batched, left-padded, cached - against the official batch-1 loop without cache, over the full vocabulary."""
    folder, meta, tensors, _ = data
    run, texts = tensors["mmu_generate"], json.loads((folder / "mmu_generate.json").read_text())
    prompting, vocab, rows = model.prompting, model.prompting.vocab, sorted(texts)
    length = meta["model"]["num_vq_tokens"] + 3
    for key in rows:
        ids = run[f"{key}.input_ids"][0]
        assert ids[length:].tolist() == prompting.question(texts[key]["question"])
    prefix = torch.cat([run[f"{key}.input_ids"][:, :length] for key in rows])
    for end_key in ("output_tokens", "output_tokens_with_stop"):
        for chosen in [rows] if end_key == "output_tokens" else [[key] for key in rows]:
            cache = StaticCache(length + 100)
            part = prefix[[rows.index(key) for key in chosen]]
            mask = torch.ones(1, 1, length, length, dtype=torch.bool)
            end = int(run[f"{chosen[0]}.stop_token"]) if end_key != "output_tokens" else -1
            with torch.no_grad():
                model.net(part, mask, cache=cache, **model._nothing)
                got = decode_answers(
                    model.net, cache,
                    questions=tuple(ImageQuestion(image=i, question="") for i in range(len(chosen))),
                    prompt_ids=[prompting.question(texts[key]["question"]) for key in chosen],
                    draws=KeyedDraws(torch.zeros(len(chosen), dtype=torch.int64)),
                    sampling=AnswerSampling(max_new_tokens=len(run[f"{chosen[0]}.output_tokens"])),
                    rows=(0, vocab.size), end=end, pad=vocab.pad, text=str,
                )  # fmt: skip
            for row, mask_T, key in zip(got.tokens_QT, got.mask_QT, chosen, strict=True):
                assert row[mask_T].tolist() == run[f"{key}.{end_key}"].tolist()
            if end_key == "output_tokens":
                for row, key in zip(got.logprobs_QT, rows, strict=True):
                    want = run[f"{key}.last_logits"].log_softmax(-1).amax(-1)
                    torch.testing.assert_close(row, want, atol=1e-4, rtol=0)
