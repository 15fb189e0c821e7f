"""Questions and answers behind an image: their tree by hand, and scores, gradients and draws of many answers."""

import pytest
import torch

from openunirl.models.packing import pack
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from openunirl.types import AnswerSampling, ImageQuestion, Images

OPTIONS = {"num_images": 2, "prefix_len": 2, "width": 3, "pad": 0}


def test_a_tree_by_hand():
    """Question [5, 6] with answers [7, 1], [7, 8, 1] and [1]; [5, 9] with [1]; another image: [5] with [6, 1]."""
    answers = [[7, 1], [7, 8, 1], [1], [1], [6, 1]]
    packed = pack([0, 0, 0, 0, 1], [[5, 6], [5, 6], [5, 6], [5, 9], [5]], answers, **OPTIONS)
    assert packed.text_BL.tolist() == [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]
    assert packed.positions_BL.tolist() == [[0, 1, 2, 3, 4, 5, 3], [0, 1, 2, 3, 1, 1, 1]]
    sees = packed.mask[0, 0, 2:, 2:].int().tolist()
    assert sees == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 1]]
    assert packed.mask[0, 0, :, :2].all() and not packed.mask[0, 0, :2, 2:].any()
    assert packed.mask[1, 0, 2:, 2:].int().tolist()[:2] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert packed.select_U.tolist() == [3, 4, 5, 6, 7 + 2, 7 + 3]
    assert packed.read_S.tolist() == [0, 1, 0, 1, 2, 0, 3, 4, 5]
    assert packed.slot_S.tolist() == [0, 1, 3, 4, 5, 6, 9, 12, 13]


def test_an_empty_question_is_answered_from_the_prefix():
    packed = pack([1], [[]], [[4, 1]], **OPTIONS)
    assert packed.text_BL.tolist() == [[0], [4]] and packed.select_U.tolist() == [3 + 1, 3 + 2]


def test_an_answer_without_tokens_has_no_score():
    packed = pack([0, 0], [[5], [5]], [[], [7, 1]], **OPTIONS)
    assert packed.select_U.tolist() == [2, 3] and packed.read_S.tolist() == [0, 1] and packed.slot_S.tolist() == [3, 4]


@pytest.fixture(params=["tiny-showo", "tiny-janus"])
def asked(request):
    """(model, all but its rotation in double precision; images, questions, answers): two questions, 4 and 2 times."""
    model = build(request.param, shapes.vocabulary(), seed=3)
    for part in (model.net, model.image_tokenizer):
        part.double()
    tokens_BN = torch.randint(model.num_codes, (2, model.num_image_tokens), generator=torch.Generator().manual_seed(0))
    texts = ["how many circles are in this image?"] * 4 + ["what is the color of the star?"] * 2
    questions = [ImageQuestion(image=b, question=text) for b in (0, 1) for text in texts]
    return model, Images(tokens_BN=tokens_BN), questions, ["one", "two", "one", "circle and ring", "red", "red"] * 2


def test_scores_and_gradients_of_a_tree_are_those_of_each_answer_alone(asked):
    model, images, questions, answers = asked
    lengths, forward = [], model.net.forward
    model.net.forward = lambda ids_BL, *given, **named: (
        lengths.append(tuple(ids_BL.shape)) or forward(ids_BL, *given, **named)
    )
    weight_Q = torch.linspace(-1, 1, len(answers), dtype=torch.float64)
    together = model.score_answers(images, questions, answers)
    (together.logprobs_QT.sum(1) * weight_Q).sum().backward()
    both = [p.grad.clone() for p in model.net.parameters() if p.grad is not None]
    model.net.zero_grad()
    for q, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        alone = model.score_answers(images, [question], [answer])
        count = int(alone.mask_QT.sum())
        torch.testing.assert_close(together.logprobs_QT[q, :count], alone.logprobs_QT[0], atol=1e-7, rtol=0)
        (alone.logprobs_QT.sum() * weight_Q[q]).backward()
    each = [p.grad for p in model.net.parameters() if p.grad is not None]
    for got, want in zip(both, each, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    segments = [
        [*model.prompting.question(question.question), *model.prompting.answer(answer)[:-1]]
        for question, answer in zip(questions, answers, strict=True)
    ]
    prefix = lengths[1][1] - len(segments[0])
    once = {tuple(ids[: i + 1]) for ids in segments for i in range(len(ids))}
    assert lengths[0] == (2, prefix + len(once)) and len(once) < sum(map(len, segments[:6])) / 2


def test_answers_to_a_question_asked_several_times_are_drawn_as_if_asked_alone(asked):
    model, images, questions, _ = asked
    sampling, keys_Q = AnswerSampling(max_new_tokens=3, temperature=3.0), torch.arange(len(questions))
    together = model.sample_answers(images, questions, keys_Q, sampling)
    assert len({tuple(row) for row in together.tokens_QT.tolist()}) > 4  # they differ
    for q, question in enumerate(questions):
        alone = model.sample_answers(images, [question], keys_Q[q : q + 1], sampling)
        count = int(alone.mask_QT.sum())
        assert alone.tokens_QT[0].tolist() == together.tokens_QT[q, :count].tolist()
        torch.testing.assert_close(alone.logprobs_QT[0], together.logprobs_QT[q, :count], atol=1e-5, rtol=0)
