"""Answers' memory: an end leaves no second cache behind, parts of a batch take less, and the plan sees it."""

from dataclasses import replace

import pytest
import torch

from memory import peak
from openunirl.config import ModelConfig
from openunirl.draws import KeyedDraws, key
from openunirl.models import answering
from openunirl.models.tiny import build
from openunirl.phases import ANSWERING, Rates
from openunirl.presets import PRESETS
from openunirl.rehearsal import rehearse
from openunirl.rollout import ask
from openunirl.tasks import shapes
from openunirl.types import AnswerSampling, ImageQuestion, Images

IMAGES, EACH = 2, 16
SAMPLING = AnswerSampling(max_new_tokens=8, temperature=1.0)
(PROMPT,) = shapes.prompts("train", 1, 0)


@pytest.fixture(scope="module", params=["tiny-showo", "tiny-janus"])
def measured(request):
    """(model, bytes): `bytes(ends, size)` is answering's peak, where the first answer ends at once or none does."""
    model = build(request.param, shapes.vocabulary(), seed=5)
    tokens_BN = torch.zeros(IMAGES, model.num_image_tokens, dtype=torch.int64)
    asked = [ImageQuestion(image=b, question=PROMPT.questions[0].question) for b in range(IMAGES) for _ in range(EACH)]

    def bytes_of(ends, size=IMAGES * EACH):
        class Made(KeyedDraws):
            def tokens(self, step, probs_BNV, at_BN=None):
                chosen_BN = torch.full(probs_BNV.shape[:2], 5)
                if ends and step == 0:
                    chosen_BN[0] = model.prompting.vocab.eos
                return chosen_BN

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(answering, "KeyedDraws", Made)
            keys_Q = key(0, torch.arange(len(asked)))
            return peak(lambda: ask(model, Images(tokens_BN=tokens_BN), asked, keys_Q, SAMPLING, size), model.device)

    return model, bytes_of


@pytest.fixture(autouse=True)
def not_packed(monkeypatch):
    monkeypatch.setattr("openunirl.models.packed_linear.SMALLEST", 2**62)


def test_an_answer_that_ends_is_computed_no_longer(measured, monkeypatch):
    """Images once, each distinct question once, and then a row for each answer that goes on."""
    model, bytes_of = measured
    rows, forward = [], model.net.forward
    monkeypatch.setattr(model.net, "forward", lambda ids, *a, **k: rows.append(len(ids)) or forward(ids, *a, **k))
    bytes_of(ends=True)
    assert rows == [IMAGES, IMAGES, *[IMAGES * EACH - 1] * (SAMPLING.max_new_tokens - 1)]


def test_an_end_copies_one_layer_of_the_cache_at_a_time(measured):
    _, bytes_of = measured
    assert bytes_of(ends=True) < 1.25 * bytes_of(ends=False)  # the models have four layers


def test_parts_of_a_batch_hold_their_own_cache_only(measured):
    _, bytes_of = measured
    assert bytes_of(ends=True, size=EACH // 2) < 0.5 * bytes_of(ends=True)


def test_the_plan_sees_an_end(measured, tmp_path):
    model, bytes_of = measured
    model.save(tmp_path / "model")
    preset = PRESETS["tiny-showo-grpo"]
    rollout = replace(
        preset.rollout, num_prompts=1, num_generations=IMAGES, num_questions=1, num_answers=EACH, batch_size=EACH,
        max_new_tokens=SAMPLING.max_new_tokens, answer_temperature=SAMPLING.temperature,
        sampling=replace(preset.rollout.sampling, num_timesteps=2),
    )  # fmt: skip
    train = replace(preset.train, mixed_precision="no")
    config = replace(preset, model=ModelConfig(weights=str(tmp_path / "model")), rollout=rollout, train=train)
    found = rehearse(config, Rates(madds=1e12, bytes=1e11), fused=False)
    assert found.phases[ANSWERING].beside == pytest.approx(bytes_of(ends=True, size=EACH), rel=0.05)
