"""The autoregressive family's own promises, on the tiny size: padding, sharing, truncation, caching, gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from openunirl.draws import key
from openunirl.models.autoregressive import causal_mask, keep_likely, left_padded, positions
from openunirl.models.janus_prompting import PLAIN_ROLES, TAGGED_ROLES, chat, roles_of
from openunirl.models.layers import PrefixCache
from openunirl.models.masked import Estimator
from openunirl.models.packing import pack
from openunirl.models.policy import log_policy
from openunirl.models.protocol import PretrainBatch
from openunirl.models.static_cache import StaticCache
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from openunirl.types import AnswerSampling, ImageQuestion, Images, ImageSampling

SHORT, LONG = "a photo of a circle", "a photo of a red circle left of a blue square"
SAME_LENGTH = "a photo of a star"


def fresh(seed=3):
    """Fresh weights, made larger so that probabilities are far from uniform."""
    model = build("tiny-janus", shapes.vocabulary(), seed=seed)
    with torch.no_grad():
        for name, weight in model.net.named_parameters():
            if weight.ndim == 2:
                weight.mul_(3.0 if "head" in name else 1.5)
    return model


@pytest.fixture(scope="module")
def model():
    return fresh()


class Watched(nn.Module):
    """The net, and the number of rows and positions of every call, and of the prefixes where there are any."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, ids_BL, *args, **options):
        codes_BN = options.get("codes_BN")
        parts = [part for part in (ids_BL, codes_BN) if part is not None]
        prefix = tuple(options["prefix"].ids_DP.shape) if "prefix" in options else ()
        self.calls.append((parts[0].shape[0], sum(part.shape[1] for part in parts), *prefix))
        return self.net(ids_BL, *args, **options)


@pytest.fixture
def watched(model):
    net, model.net = model.net, Watched(model.net)
    yield model
    model.net = net


def seeds(count, first=0):
    return key(11, torch.arange(first, first + count))


# ----------------------------------------------------------------------------------------------------- drawing


def test_left_padding_changes_nothing(model):
    """Teacher-forced logits of a short prompt are those beside a long one, with and without its own pads."""
    tokens_BN = torch.randint(model.image_tokenizer.num_codes, (1, 64), generator=torch.Generator().manual_seed(0))
    short, long = model.prompting.t2i(SHORT), model.prompting.t2i(LONG)
    bare = model.prompting.unconditional(len(short))
    with torch.no_grad():
        together = model._drawn_logits([short, long, bare], tokens_BN.repeat(3, 1)).view(3, 64, -1)
        for row, want in zip((short, long, bare), together, strict=True):
            torch.testing.assert_close(model._drawn_logits([row], tokens_BN), want, atol=2e-5, rtol=0)


def test_pads_inside_an_unconditional_row_are_attended_to(model):
    """As officially: an unconditional row of another length is another row."""
    tokens_BN = torch.zeros(1, 64, dtype=torch.int64)
    with torch.no_grad():
        five, nine = (model._drawn_logits([model.prompting.unconditional(n)], tokens_BN) for n in (5, 9))
    assert not torch.allclose(five, nine, atol=1e-2)


@pytest.mark.parametrize(("scale", "prefilled", "drawn"), [(1.0, 3, 6), (2.5, 5, 12)])
def test_images_of_one_prompt_share_its_prefill(watched, scale, prefilled, drawn):
    """Six images of three prompts of two lengths: three conditional rows and, guided, one unconditional per length;
    then one position a step for every image."""
    prompts = [SHORT, SHORT, LONG, SAME_LENGTH, SHORT, LONG]
    length = len(watched.prompting.t2i(LONG))
    watched.sample_images(prompts, seeds(6), ImageSampling(guidance_scale=scale))
    assert watched.net.calls == [(prefilled, length)] + [(drawn, 1)] * 63


def test_scoring_is_one_pass_that_reads_each_prompt_once(watched):
    """Three images of two prompts, and, guided, an unconditional row of each length; boi stands in each image's row."""
    rollout = watched.sample_images([SHORT, LONG, SHORT], seeds(3), ImageSampling(guidance_scale=2.0))
    watched.net.calls.clear()
    (one,) = watched.scoring_passes(rollout, None, None)
    assert one.scored_BN.all() and one.shown_BN.all() and (one.weight_BN == 1).all()
    watched.score_images(rollout, one)
    watched.score_images(rollout, one, logprob_guidance=False)
    prompt = len(watched.prompting.t2i(LONG)) - 1
    assert watched.net.calls == [(6, 64, 4, prompt), (3, 64, 2, prompt)]


def test_guidance_one_is_the_conditional_policy(model):
    rollout = model.sample_images([SHORT, LONG], seeds(2), ImageSampling(temperature=0.8))
    rows = [model.prompting.t2i(prompt) for prompt in (SHORT, LONG)]
    with torch.no_grad():
        logp = (model._drawn_logits(rows, rollout.tokens_BN).view(2, 64, -1) / 0.8).log_softmax(-1)
    want = logp.gather(2, rollout.tokens_BN[..., None])[..., 0]
    torch.testing.assert_close(rollout.logprobs_BN, want, atol=1e-4, rtol=0)
    assert torch.equal(rollout.reveal_step_BN, torch.arange(64).repeat(2, 1))


def test_the_policy_by_hand():
    """cond (1, 0), uncond (0, 0), w = 3: (3, 0); at temperature 2 the odds are e^1.5."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    got = log_policy(logits, ImageSampling(temperature=2.0), 3.0).exp()
    odds = 2.718281828459045**1.5
    torch.testing.assert_close(got, torch.tensor([[odds / (1 + odds), 1 / (1 + odds)]]))


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0.1, 0.5, 0.15, 0.25]),
        (2, 1.0, [0.0, 0.5, 0.0, 0.25]),
        (0, 0.5, [0.0, 0.5, 0.0, 0.0]),
        (0, 0.6, [0.0, 0.5, 0.0, 0.25]),
        (3, 0.8, [0.0, 0.5, 0.0, 0.25]),  # 0.75 of 0.9 is already more than 0.8 of it
        (9, 0.99, [0.1, 0.5, 0.15, 0.25]),
    ],
)
def test_top_k_and_top_p_by_hand(top_k, top_p, kept):
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert keep_likely(probs, top_k, top_p).tolist() == torch.tensor([kept]).tolist()


def test_truncation_limits_draws_but_not_logprobs(model):
    prompts = [SHORT] * 3
    free = model.sample_images(prompts, seeds(3), ImageSampling(temperature=1.5))
    greedy = model.sample_images(prompts, seeds(3), ImageSampling(temperature=1.5, top_k=1))
    nucleus = model.sample_images(prompts, seeds(3), ImageSampling(temperature=1.5, top_p=1e-6))
    assert torch.equal(greedy.tokens_BN, nucleus.tokens_BN) and not torch.equal(free.tokens_BN, greedy.tokens_BN)
    assert (greedy.tokens_BN == greedy.tokens_BN[0]).all()
    again = model.score_images(greedy, model.scoring_passes(greedy, None, None)[0])
    torch.testing.assert_close(again.logprobs_BN.detach(), greedy.logprobs_BN, atol=1e-4, rtol=0)
    assert (greedy.logprobs_BN < -0.1).any()  # not the log-probs of a truncated policy, which would be 0


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_samplings_that_mean_nothing_are_refused(model, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        model.sample_images([SHORT], seeds(1), ImageSampling(**wrong))


# ------------------------------------------------------------------------------------------------------ caches


def test_the_static_cache_equals_a_growing_one_and_never_moves():
    generator = torch.Generator().manual_seed(0)
    static, growing = StaticCache(7), PrefixCache()
    for count in (4, 1, 2):
        for layer in range(2):
            keys, values = torch.randn(2, 3, 2, count, 5, generator=generator)
            for got, want in zip(static.update(keys, values, layer), growing.update(keys, values, layer), strict=True):
                assert torch.equal(got, want)
                assert got.data_ptr() in [part.data_ptr() for part in static.layers[layer]]
    assert static.get_seq_length() == growing.get_seq_length() == 7
    with pytest.raises(AssertionError, match="do not fit"):
        static.update(keys, values, 0)
    was = growing.layers[0][0]
    static.keep(torch.tensor([2, 0, 2]), 8)
    growing.keep(torch.tensor([2, 0, 2]))
    got, _ = static.update(torch.ones(3, 2, 1, 5), torch.ones(3, 2, 1, 5), 0)
    assert torch.equal(got[:, :, :7], was[[2, 0, 2]]) and (got[:, :, 7] == 1).all()
    assert torch.equal(growing.layers[0][0], was[[2, 0, 2]])


def test_masks_by_hand():
    ids_RL, real_RL = left_padded([[5], [6, 7, 8]], pad=0)
    assert ids_RL.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert positions(real_RL).tolist() == [[0, 0, 0], [0, 1, 2]]
    assert causal_mask(real_RL)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert causal_mask(real_RL)[1, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_a_causal_prefix_sees_only_what_stands_before():
    options = {"num_images": 1, "prefix_len": 2, "width": 1, "pad": 0}
    seen, causal = (pack([0], [[1]], [[2]], **options, causal_prefix=c).mask[0, 0].int().tolist() for c in (0, 1))
    assert seen == [[1, 1, 0], [1, 1, 0], [1, 1, 1]] and causal == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_under_bf16_what_is_drawn_and_what_is_scored_have_one_residual_stream(model, monkeypatch):
    """As accelerate does it: the net's forward alone is under autocast."""
    monkeypatch.setattr(model.net, "forward", torch.autocast("cpu", torch.bfloat16)(model.net.forward))
    seen, layer = set(), model.net.get_submodule(model.trunk).layers[1]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    rollout = model.sample_images([SHORT], seeds(1), ImageSampling(guidance_scale=2.0))
    (one,) = model.scoring_passes(rollout, Estimator(), seeds(1))
    with torch.no_grad():
        scored = model.score_images(rollout, one).logprobs_BN
    hook.remove()
    assert seen == {torch.float32}
    torch.testing.assert_close(scored, rollout.logprobs_BN, atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------------- answering


def test_the_prefix_of_an_image_is_computed_once(watched):
    images = watched.encode(torch.rand(2, 3, 64, 64))
    asked = [ImageQuestion(image=b, question="how many circles are in this image?") for b in (0, 1, 1)]
    watched.sample_answers(images, asked, seeds(3), AnswerSampling(max_new_tokens=2, temperature=1.0))
    prefix, question = len(watched.prompting.image_prefix), len(watched.prompting.question(asked[0].question))
    assert watched.net.calls[:3] == [(2, prefix), (2, question), (3, 1)]  # asked twice, read once


def test_answers_never_hold_image_specials(model):
    images = model.encode(torch.rand(1, 3, 64, 64))
    asked = [ImageQuestion(image=0, question="a star")] * 200
    answers = model.sample_answers(images, asked, seeds(200), AnswerSampling(max_new_tokens=3, temperature=50.0))
    drawn = set(answers.tokens_QT[answers.mask_QT].tolist())
    assert len(drawn) > 40 and not drawn & set(model.prompting.vocab.image_ids)
    row = torch.tensor([model.prompting.t2i(SHORT)])
    with torch.no_grad():
        logits = model._text_logits(
            row, causal_mask(torch.ones_like(row, dtype=torch.bool)), positions_BL=torch.arange(row.shape[1])[None]
        )
    probs_V = logits[0, -1].softmax(-1)
    assert [i for i, p in enumerate(probs_V.tolist()) if p == 0] == list(model.prompting.vocab.image_ids)


def test_answers_reach_image_logits_through_the_decoder_and_the_tower():
    """Finite differences, in double precision: image logits -> softmax -> VQ decoder -> SigLIP -> language model."""
    model = fresh()
    for part in (model.net, model.image_tokenizer):
        nn.Module.to(part, torch.float64)
    for config in (model.net.model["language_model"].config, model.net.model["vision_model"].config):
        config._attn_implementation = "sdpa"  # the eager kernel takes its softmax in float32
    model.freeze_reference()
    asked = [ImageQuestion(image=0, question="what is the main item in this image?")]
    generator = torch.Generator().manual_seed(1)
    logits_BNV = torch.randn(1, 64, 512, generator=generator, dtype=torch.float64) * 3
    logits_BNV.requires_grad_()

    def answer(logits):
        return model.score_answers(Images(onehots_BNV=logits.softmax(-1)), asked, ["red circle"]).logprobs_QT.sum()

    value = answer(logits_BNV)
    assert value.dtype == torch.float64
    value.backward()
    gradient = logits_BNV.grad
    assert gradient is not None and (gradient.abs().sum(-1) > 0).all()  # every image token matters
    assert all(p.grad is None for p in model.image_tokenizer.parameters())
    assert all(p.grad is None for p in model.net.model["vision_model"].parameters())
    directions = [torch.randn(gradient.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    top = F.one_hot(gradient.abs().flatten().argmax(), gradient.numel()).view(gradient.shape).double()
    for direction in [*directions, top]:
        with torch.no_grad():
            ahead, behind = (answer(logits_BNV + sign * 1e-4 * direction) for sign in (1, -1))
        measured = float(ahead - behind) / 2e-4
        assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ texts


def test_chat_by_hand():
    assert chat([("User", " hi\n"), ("Assistant", "")], "") == "User: hi\n\nAssistant:"
    assert chat([("User", "hi"), ("Assistant", "yes")], "Be kind.") == (
        "Be kind.\n\nUser: hi\n\nAssistant: yes<｜end▁of▁sentence｜>"
    )


def test_roles_follow_the_checkpoint(model):
    tokenizer = model.prompting.tokenizer
    assert roles_of("Janus-1.3B", tokenizer) == PLAIN_ROLES
    assert roles_of("Janus-Pro-7B", tokenizer) == roles_of("anything", tokenizer) == TAGGED_ROLES
    assert roles_of("abc", tokenizer, "/hub/models--deepseek-ai--Janus-1.3B/snapshots/abc") == PLAIN_ROLES
    assert roles_of("/like/janus-1.3b/Janus-Pro-1.3B", tokenizer) == TAGGED_ROLES  # what comes last counts
    assert roles_of("mine", tokenizer, "/janus-pro/mine", "deepseek-ai/Janus-1.3B") == PLAIN_ROLES


@pytest.mark.parametrize("text", ["a <begin_of_image> circle", "<image_placeholder>"])
def test_texts_must_not_hold_image_tokens(model, text):
    with pytest.raises(ValueError, match="take it out"):
        model.prompting.question(text)
    with pytest.raises(ValueError, match="take it out"):
        model.check_prompts([text])


def test_pictures_of_another_size_are_refused(model):
    for use in (model.encode, model.tokenize):
        with pytest.raises(ValueError, match="sees \\[3, 64, 64\\]"):
            use(torch.zeros(1, 3, 48, 64))
    with pytest.raises(ValueError, match="multiples of 8"):
        model.tokenizer_loss(torch.zeros(1, 3, 12, 16))


# ------------------------------------------------------------------------------------------------- pre-training


def batch_of(model, prompts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(model.image_tokenizer.num_codes, (len(prompts), 64), generator=generator)
    return PretrainBatch(
        prompts=tuple(prompts),
        drawn=Images(tokens_BN=drawn),
        seeds_B=seeds(len(prompts)),
        asked=Images(pixels_BCHW=torch.rand(2, 3, 64, 64, generator=generator)),
        questions=(ImageQuestion(image=0, question="a star"), ImageQuestion(image=1, question="a circle")),
        answers=("red", "blue circle"),
    )


def test_the_drawing_loss_is_the_mean_over_all_tokens(model):
    batch = batch_of(model, [SHORT, LONG])
    rows = [model.prompting.t2i(prompt) for prompt in batch.prompts]
    with torch.no_grad():
        logp = model._drawn_logits(rows, batch.drawn.tokens_BN).view(2, 64, -1).log_softmax(-1)
        loss, _ = model.pretrain_loss(batch)
    assert loss.item() == pytest.approx(-logp.gather(2, batch.drawn.tokens_BN[..., None]).mean().item(), abs=1e-5)


def test_an_empty_prompt_trains_an_unconditional_row_of_a_length_in_use(model, monkeypatch):
    seen = []
    drawn_logits = model._drawn_logits
    monkeypatch.setattr(model, "_drawn_logits", lambda rows, tokens: (seen.append(rows), drawn_logits(rows, tokens))[1])
    with torch.no_grad():
        model.pretrain_loss(batch_of(model, ["", LONG, "", SHORT]))
        model.pretrain_loss(batch_of(model, ["", ""]))
    rows = seen[0]
    lengths = {len(model.prompting.t2i(prompt)) for prompt in (SHORT, LONG)}
    for row in (rows[0], rows[2]):
        assert row == model.prompting.unconditional(len(row)) and len(row) in lengths
    assert rows[1] == model.prompting.t2i(LONG) and rows[3] == model.prompting.t2i(SHORT)
    assert all(row == model.prompting.unconditional(len(row)) for row in seen[1])


def test_pretraining_trains_every_part_and_self_improvement_leaves_the_tower():
    model = fresh()
    sum(model.pretrain_loss(batch_of(model, [SHORT, LONG, ""]))).backward()
    unused = [name for name, p in model.net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == [n for n in unused if n.endswith("k_proj.bias")]  # a key's bias never matters to a softmax
    model.freeze_reference()
    frozen = {name for name, p in model.net.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith("model.vision_model.") for name in frozen)


def test_the_image_tokenizer_learns_and_passes_gradients_straight_through():
    model = fresh()
    vq = model.image_tokenizer.requires_grad_(True).train()
    pictures = torch.rand(4, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)  # half-size crops are taken too
    optimizer = torch.optim.AdamW(vq.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = model.tokenizer_loss(pictures)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for part in (vq.encoder.conv_in, vq.decoder.conv_out, vq.quantize.embedding):
        assert part.weight.grad is not None and part.weight.grad.abs().sum() > 0


def test_nearest_codes_are_nearest_in_angle(model):
    vq = model.image_tokenizer
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        latents_NE = vq.latents(pictures)[0].flatten(1).T
        angles_NV = F.cosine_similarity(latents_NE[:, None], vq.quantize.embedding.weight[None], dim=-1)
    assert torch.equal(model.tokenize(pictures)[0], angles_NV.argmax(1))


def test_tiny_janus_fits_in_8_megabytes(model, tmp_path):
    model.save(tmp_path / "saved", torch.float16)
    assert sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*") if path.is_file()) <= 8e6
