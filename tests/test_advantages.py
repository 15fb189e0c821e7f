"""Advantages against numbers worked out by hand."""

import math

import torch

from openunirl.advantages import EPS, answer_advantages, group_advantages, image_advantages


def test_group_scaled_by_hand():
    # rewards 1 0 0 0: mean 1/4, deviations 3/4 -1/4 -1/4 -1/4, standard deviation (n - 1) = 1/2
    got = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), "group")
    torch.testing.assert_close(got, torch.tensor([[0.75, -0.25, -0.25, -0.25]]) / (0.5 + EPS))


def test_batch_and_none_by_hand():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    centred = torch.tensor([[0.5, -0.5], [0.0, 0.0]])
    torch.testing.assert_close(group_advantages(rewards, "none"), centred)
    # over the batch: mean 1/4, squared deviations 9/16 + 3/16 = 3/4, variance 1/4, deviation 1/2
    torch.testing.assert_close(group_advantages(rewards, "batch"), centred / (0.5 + EPS))


def test_equal_rewards_give_exactly_zero():
    for value in (0.1, 1 / 3, 0.7):
        rewards = torch.full((1, 7), value)
        for scale in ("group", "batch", "none"):
            assert (group_advantages(rewards, scale) == 0).all()


def test_images_are_compared_by_their_mean_over_questions():
    # two images of one prompt, two questions: means 1 and 1/2
    got = image_advantages(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), 2, "none")
    torch.testing.assert_close(got, torch.tensor([0.25, -0.25]))


def test_each_question_has_its_own_baseline():
    # image 1: right on both questions; image 2: right on the first only. The first question teaches nothing.
    got = answer_advantages(torch.tensor([1.0, 1.0, 1.0, 0.0]), 2, 2, 1, "none")
    torch.testing.assert_close(got, torch.tensor([0.0, 0.5, 0.0, -0.5]))


def test_several_answers_are_compared_within_their_image():
    # image 1 answers 1 0, image 2 answers 1 1: only the first image's answers differ
    got = answer_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2, 1, 2, "none")
    torch.testing.assert_close(got, torch.tensor([0.5, -0.5, 0.0, 0.0]))


def test_a_question_s_answers_on_one_image_are_not_compared_with_another_question_s():
    # one image, two questions, two answers each: 1 0 | 1 1
    got = answer_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 1, 2, 2, "none")
    torch.testing.assert_close(got, torch.tensor([0.5, -0.5, 0.0, 0.0]))


def test_k_answers_credit_the_image_by_their_mean():
    # two images, one question, r = 1 0 | 1 1: the images are worth 1/2 and 1
    image_BJ = torch.tensor([1.0, 0.0, 1.0, 1.0]).view(2, 1, 2).mean(-1)
    torch.testing.assert_close(image_advantages(image_BJ, 2, "none"), torch.tensor([-0.25, 0.25]))


def test_a_reward_that_does_not_apply_takes_no_part():
    nan = math.nan
    # 1 and 0 are compared as if the third image were not there: mean 1/2, standard deviation sqrt(1/2)
    got = group_advantages(torch.tensor([[1.0, nan, 0.0], [nan, nan, nan], [nan, 2.0, nan]]), "group")
    want = torch.tensor([[0.5, 0.0, -0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]) / (0.5**0.5 + EPS)
    torch.testing.assert_close(got, want)
    # an image's reward is the mean over the questions that apply: 1, 1/2
    got = image_advantages(torch.tensor([[1.0, nan], [0.0, 1.0]]), 2, "none")
    torch.testing.assert_close(got, torch.tensor([0.25, -0.25]))
    assert (group_advantages(torch.full((2, 3), nan), "batch") == 0).all()


def test_one_image_per_prompt_has_no_advantage():
    assert (image_advantages(torch.tensor([[1.0], [0.0]]), 1, "group") == 0).all()
