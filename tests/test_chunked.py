"""Scores in chunks equal scores at once, gradients included, and no more logits than a chunk's are ever there."""

import pytest
import torch

from openunirl.draws import key
from openunirl.models import chunked, policy
from openunirl.models.masked import Estimator
from openunirl.models.tiny import build
from openunirl.relaxation import Relaxation
from openunirl.tasks import shapes
from openunirl.types import AnswerSampling, ImageQuestion, ImageSampling

PROMPTS = ("a photo of a red circle", "a photo of two stars", "a photo of a circle")
ASKED = [ImageQuestion(image=b, question="what is the main item in this image?") for b in range(3)]
SEEDS = key(3, torch.arange(3))


@pytest.fixture(scope="module", params=["tiny-showo", "tiny-janus"])
def setting(request):
    model = build(request.param, shapes.vocabulary(), seed=5)
    rollout = model.sample_images(PROMPTS, SEEDS, ImageSampling(num_timesteps=3, guidance_scale=2.0, temperature=0.8))
    return model, rollout, model.sample_answers(rollout.images, ASKED, SEEDS, AnswerSampling(temperature=1.0))


def scored(setting, relax):
    """(all scores, all gradients) of one loss that everything reaches."""
    model, rollout, answers = setting
    model.net.zero_grad()
    one = model.scoring_passes(rollout, Estimator(name="remask"), SEEDS)[0]
    images = model.score_images(rollout, one, relax=Relaxation(seeds_B=SEEDS) if relax else None)
    texts = model.score_answers(rollout.images, ASKED, answers)
    loss = images.logprobs_BN.square().sum() + texts.logprobs_QT.square().sum()
    if relax:
        loss = loss + (images.onehots_BNV * torch.linspace(-1, 1, model.num_codes)).sum()
    loss.backward()
    values = (images.logprobs_BN, images.entropy_BN, texts.logprobs_QT, texts.entropy_QT)
    return [v.detach() for v in values], {n: w.grad for n, w in model.net.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("relax", [False, True])
def test_chunks_change_no_score_and_no_gradient(setting, relax, monkeypatch):
    want, want_grads = scored(setting, relax)
    want_grads = {name: grad.clone() for name, grad in want_grads.items()}
    monkeypatch.setattr(chunked, "LARGEST", 7 * 2 * 512)
    got, grads = scored(setting, relax)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
    assert grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_no_chunk_is_larger_than_allowed(setting, monkeypatch):
    model, rollout, _ = setting
    seen, plain = [], policy.log_policy

    def seeing(logits, *about):
        seen.append(logits.numel())
        return plain(logits, *about)

    monkeypatch.setattr(policy, "log_policy", seeing)
    monkeypatch.setattr(chunked, "LARGEST", 4096)
    one = model.scoring_passes(rollout, Estimator(name="full_mask"), SEEDS)[0]
    model.score_images(rollout, one)
    assert len(seen) > 10 and max(seen) <= 4096


def test_nothing_to_score_is_no_error(setting):
    hidden_SH = torch.zeros(0, 4)
    (found,) = chunked.in_chunks(lambda h: h, hidden_SH, 4, lambda logits, at: (logits.sum(-1),), 2)
    assert found.shape == (0,)
