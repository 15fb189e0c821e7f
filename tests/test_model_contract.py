"""What every model adapter promises. A new family is added to MODELS_UNDER_TEST and passes the same suite."""

import math

import pytest
import torch
from PIL import Image

from openunirl.config import ModelConfig
from openunirl.draws import key
from openunirl.evaluation.run import to_pixels
from openunirl.models.masked import Estimator
from openunirl.models.protocol import load_model
from openunirl.models.tiny import build
from openunirl.presets import BUNDLED
from openunirl.tasks import shapes
from openunirl.tasks.worlds import WORLDS
from openunirl.types import AnswerSampling, ImageQuestion, Images, ImageSampling

MODELS_UNDER_TEST = ["tiny-showo", "tiny-janus"]
PROMPTS = ("a photo of a red circle", "a photo of a circle", "a photo of a red circle left of a blue square")
SAMPLINGS = {
    "plain": ImageSampling(num_timesteps=5),
    "guided": ImageSampling(num_timesteps=5, guidance_scale=2.5),
    "warm": ImageSampling(num_timesteps=4, guidance_scale=1.5, temperature=0.7),
}


@pytest.fixture(scope="module", params=MODELS_UNDER_TEST)
def model(request):
    """Fresh weights, made larger so that probabilities are far from uniform."""
    model = build(request.param, shapes.vocabulary(), seed=3)
    with torch.no_grad():
        for name, weight in model.net.named_parameters():
            if weight.ndim == 2:
                weight.mul_(3.0 if "head" in name else 1.5)
    return model


@pytest.fixture(params=sorted(SAMPLINGS))
def sampling(request):
    return SAMPLINGS[request.param]


def seeds(count, first=0):
    return key(11, torch.arange(first, first + count))


def total(model, rollout, **options):
    passes = model.scoring_passes(rollout, Estimator(name="trajectory"), seeds(len(rollout.prompts)))
    scores = [model.score_images(rollout, one, **options) for one in passes]
    return sum(s.logprobs_BN for s in scores)


def questions_on(images, texts=("what is the main item in this image?", "how many circles are in this image?")):
    return [ImageQuestion(image=b, question=text) for b in range(images) for text in texts]


def test_logprobs_are_float32_under_bf16_autocast(model, monkeypatch):
    """As accelerate does it: the net's forward alone is under autocast."""
    tokens_BN = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["guided"]).tokens_BN
    monkeypatch.setattr(model.net, "forward", torch.autocast("cpu", torch.bfloat16)(model.net.forward))
    rollout = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["guided"])
    one = model.scoring_passes(rollout, Estimator(), seeds(3))[0]
    asked = questions_on(3)
    answers = model.sample_answers(rollout.images, asked, seeds(6), AnswerSampling(max_new_tokens=3))
    found = (
        rollout.logprobs_BN,
        model.score_images(rollout, one).logprobs_BN,
        answers.logprobs_QT,
        model.score_answers(rollout.images, asked, answers).logprobs_QT,
    )
    assert [logprobs.dtype for logprobs in found] == [torch.float32] * 4
    assert not torch.equal(rollout.tokens_BN, tokens_BN)  # the products were rounded


def test_recomputed_logprobs_equal_the_samplers(model, sampling):
    rollout = model.sample_images(PROMPTS, seeds(3), sampling)
    with torch.no_grad():
        again = total(model, rollout)
    torch.testing.assert_close(again, rollout.logprobs_BN, atol=1e-4, rtol=0)
    assert (rollout.logprobs_BN < 0).all()


def test_every_token_is_scored_exactly_once(model, sampling):
    rollout = model.sample_images(PROMPTS, seeds(3), sampling)
    passes = model.scoring_passes(rollout, Estimator(name="trajectory"), seeds(3))
    assert torch.equal(sum(one.scored_BN.int() for one in passes), torch.ones_like(rollout.tokens_BN).int())


def test_conditional_scoring_differs_under_guidance(model):
    rollout = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["guided"])
    with torch.no_grad():
        plain = total(model, rollout, logprob_guidance=False)
    assert not torch.allclose(plain, rollout.logprobs_BN, atol=1e-2)


def test_a_batch_equals_one_by_one(model, sampling):
    whole = model.sample_images(PROMPTS, seeds(3), sampling)
    for b, prompt in enumerate(PROMPTS):
        alone = model.sample_images([prompt], seeds(1, first=b), sampling)
        assert torch.equal(alone.tokens_BN[0], whole.tokens_BN[b])
        assert torch.equal(alone.reveal_step_BN[0], whole.reveal_step_BN[b])
        torch.testing.assert_close(alone.logprobs_BN[0], whole.logprobs_BN[b], atol=2e-5, rtol=0)


def test_sampling_is_deterministic_and_seeds_matter(model, sampling):
    first, second, other = (model.sample_images(PROMPTS, seeds(3, f), sampling).tokens_BN for f in (0, 0, 50))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("bad", [ImageSampling(top_k=-1), ImageSampling(top_p=0.0), ImageSampling(top_p=1.5)])
def test_a_sampling_that_cannot_be_followed_is_known_before_it_is(model, bad):
    for refuse in (model.check_sampling, lambda sampling: model.sample_images(PROMPTS[:1], seeds(1), sampling)):
        with pytest.raises(ValueError, match=rf"top_k={bad.top_k} must be 0.* top_p={bad.top_p}"):
            refuse(bad)
    for good in SAMPLINGS.values():
        model.check_sampling(good)


def test_a_prompt_that_does_not_fit_names_itself(model):
    with pytest.raises(ValueError, match="a photo of a red red"):
        model.check_prompts(["a photo of a red " + "red " * 400])


def test_sampled_answers_score_as_they_were_drawn(model):
    images = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["plain"]).images
    for temperature in (1.0, 0.5):
        rollout = model.sample_answers(
            images, questions_on(3), seeds(6), AnswerSampling(max_new_tokens=5, temperature=temperature)
        )
        scores = model.score_answers(images, questions_on(3), rollout, temperature=temperature)
        assert torch.equal(scores.mask_QT, rollout.mask_QT)
        torch.testing.assert_close(scores.logprobs_QT, rollout.logprobs_QT, atol=1e-4, rtol=0)


def test_answers_in_a_batch_equal_one_by_one(model):
    """Left padding, the shared prefix and early exits change nothing."""
    images = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["plain"]).images
    texts = ("what is the main item in this image?", "where is the red circle relative to the blue square?", "red")
    asked = questions_on(3, texts)
    whole = model.sample_answers(images, asked, seeds(9), AnswerSampling(max_new_tokens=6, temperature=1.0))
    for q, question in enumerate(asked):
        one = Images(tokens_BN=images.tokens_BN[question.image : question.image + 1])
        alone = model.sample_answers(
            one, [ImageQuestion(image=0, question=question.question)], seeds(1, first=q),
            AnswerSampling(max_new_tokens=6, temperature=1.0),
        )  # fmt: skip
        length = int(whole.mask_QT[q].sum())
        assert alone.texts[0] == whole.texts[q]
        assert alone.tokens_QT[0, :length].tolist() == whole.tokens_QT[q, :length].tolist()


def test_several_questions_on_one_image_equal_one_by_one(model):
    images = model.sample_images(PROMPTS[:1], seeds(1), SAMPLINGS["plain"]).images
    asked, gold = questions_on(1), ["circle", "left of"]
    together = model.score_answers(images, asked, gold)
    for q in range(2):
        alone = model.score_answers(images, [asked[q]], [gold[q]])
        length = int(alone.mask_QT.sum())
        torch.testing.assert_close(alone.logprobs_QT[0], together.logprobs_QT[q, :length], atol=1e-5, rtol=0)


def test_answers_stay_within_the_text(model):
    images = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["plain"]).images
    rollout = model.sample_answers(images, questions_on(3), seeds(6), AnswerSampling(max_new_tokens=8, temperature=5.0))
    full = model.score_answers(images, questions_on(3), rollout, support="full")
    text = model.score_answers(images, questions_on(3), rollout, support="text")
    assert (full.logprobs_QT[full.mask_QT] < text.logprobs_QT[text.mask_QT]).all()


def test_the_reference_is_the_base_and_stays_it(model):
    rollout = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["plain"])
    model.freeze_reference()
    with torch.no_grad():
        before = total(model, rollout)
        weight = next(p for n, p in model.net.named_parameters() if "mlp" in n and p.ndim == 2)
        kept = weight.clone()
        with model.reference():
            assert torch.equal(total(model, rollout), before)
        weight.mul_(1.5)
        moved = total(model, rollout)
        with model.reference():
            assert torch.equal(total(model, rollout), before)
        weight.copy_(kept)
    assert not torch.allclose(moved, before)


def test_decode_and_encode(model):
    """What was drawn can be seen: as pixels in 0..1, and read again from them."""
    images = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["plain"]).images
    pixels = model.decode(images)
    assert pixels.shape[:2] == (3, 3) and pixels.min() >= 0 and pixels.max() <= 1
    assert model.tokenize(pixels).shape == images.tokens_BN.shape
    seen = model.encode(pixels)
    assert len(seen) == 3
    if seen.pixels_BCHW is not None:
        assert torch.equal(model.decode(seen), pixels)
    else:
        assert torch.equal(seen.tokens_BN, model.tokenize(pixels))


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_a_bundled_models_codes_survive_the_way_through_pixels(name):
    """Codes of rendered pictures -> decode -> tokenize: 95 of 100 come back, and the pixels are nearly those of before.
    (Of what it draws itself, which no tokenizer made, about 70 do.)"""
    model, world = load_model(name), WORLDS["shapes"]()
    pictures = to_pixels(world.references(world.evaluation_prompts("heldout", 12, 0), 0))
    tokens_BN = model.tokenize(pictures)
    pixels = model.decode(Images(tokens_BN=tokens_BN))
    assert float((model.tokenize(pixels) == tokens_BN).float().mean()) >= 0.9
    assert float((pixels - pictures).abs().mean()) < 0.02


def test_a_token_lies_where_its_pixels_do(model):
    """Row by row from the top left: another code changes its own quarter of the picture most, and other pixels there
    the codes of that quarter."""
    side, rows = math.isqrt(model.num_image_tokens), torch.arange(8)
    generator = torch.Generator().manual_seed(0)
    tokens_BN = torch.randint(model.num_codes, (8, model.num_image_tokens), generator=generator)
    pixels = model.decode(Images(tokens_BN=tokens_BN))
    patch = pixels.shape[-1] // side
    pictures = torch.rand(pixels.shape, generator=generator)
    codes_BN = model.tokenize(pictures)
    for quarter, (row, column) in enumerate(((1, 1), (1, side - 2), (side - 2, 1), (side - 2, side - 2))):
        other_BN = tokens_BN.clone()
        other_BN[rows, row * side + column] += model.num_codes // 2
        moved = model.decode(Images(tokens_BN=other_BN % model.num_codes)) - pixels
        assert by_quarter(moved.abs().mean((0, 1))).argmax() == quarter
        around = (slice((row - 1) * patch, (row + 2) * patch), slice((column - 1) * patch, (column + 2) * patch))
        others = pictures.clone()
        others[:, :, *around] = 1 - others[:, :, *around]
        changed_BN = model.tokenize(others) != codes_BN
        assert by_quarter(changed_BN.float().mean(0).view(side, side)).argmax() == quarter


def by_quarter(table):
    """Means of a square table's quarters: top left, top right, bottom left, bottom right."""
    half = len(table) // 2
    return torch.stack([part.mean() for rows in table.split(half) for part in rows.split(half, dim=1)])


def test_pictures_of_any_size_can_be_read(model):
    colors = ((220, 20, 30), (20, 40, 220))
    pictures = [Image.new("RGB", size, color) for size, color in zip(((90, 50), (33, 120)), colors, strict=True)]
    answers = model.sample_answers(model.read_pictures(pictures), questions_on(2), seeds(4), AnswerSampling())
    assert len(answers.texts) == 4


def test_a_relaxed_image_is_the_sampled_image(model):
    """Straight-through one-hots have exactly the sampled image's pixels, and pass a gradient on."""
    images = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["plain"]).images
    codes = model.num_codes
    logits = torch.randn(*images.tokens_BN.shape, codes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    soft = logits.softmax(-1)
    relaxed = Images(onehots_BNV=torch.nn.functional.one_hot(images.tokens_BN, codes) + (soft - soft.detach()))
    assert torch.equal(model.decode(relaxed), model.decode(images))
    model.score_answers(relaxed, questions_on(3), ["circle", "two"] * 3).logprobs_QT.sum().backward()
    assert logits.grad.abs().sum() > 0


def test_one_hots_answer_like_tokens(model):
    images = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["plain"]).images
    codes = model.num_codes
    onehots = torch.nn.functional.one_hot(images.tokens_BN, codes).float().requires_grad_()
    relaxed = model.score_answers(Images(onehots_BNV=onehots), questions_on(3), ["circle", "two"] * 3)
    plain = model.score_answers(images, questions_on(3), ["circle", "two"] * 3)
    torch.testing.assert_close(relaxed.logprobs_QT, plain.logprobs_QT, atol=1e-5, rtol=0)
    relaxed.logprobs_QT.sum().backward()
    assert onehots.grad.abs().sum() > 0


def test_saved_and_loaded_equals_itself(model, tmp_path):
    model.save(tmp_path / "saved")
    again = load_model(ModelConfig(weights=str(tmp_path / "saved"), attn_implementation="eager"))
    for (name, a), (_, b) in zip(model.net.named_parameters(), again.net.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    want = model.sample_images(PROMPTS, seeds(3), SAMPLINGS["guided"])
    assert torch.equal(again.sample_images(PROMPTS, seeds(3), SAMPLINGS["guided"]).tokens_BN, want.tokens_BN)
    pixels = model.decode(want.images)
    assert torch.equal(again.decode(want.images), pixels) and torch.equal(
        again.tokenize(pixels), model.tokenize(pixels)
    )


def test_checkpoints_that_do_not_fit_say_why(model, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    state = load_file(path)
    name = next(n for n in state if n.endswith("fc2.weight"))
    for change, word in (
        ({k: v for k, v in state.items() if k != name}, "missing"),
        (state | {"extra.weight": torch.zeros(1)}, "extra"),
        (state | {name: torch.zeros(2, 2)}, "wrong shape"),
    ):
        save_file(change, path)
        with pytest.raises(ValueError, match=word):
            load_model(tmp_path / "saved")
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path / "saved")
    with pytest.raises(ValueError, match="no such file"):
        load_model(tmp_path / "nowhere" / "at" / "all")
