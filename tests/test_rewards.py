"""Rewards: every source, sums with weights, None, and what is said of a reward that misbehaves."""

import importlib
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from openunirl import checkpoint
from openunirl.config import EvalConfig, ModelConfig, RewardConfig, RolloutConfig, RunConfig, TrainConfig
from openunirl.evaluation.geneval import judge_pictures
from openunirl.evaluation.run import to_uint8
from openunirl.models.tiny import build
from openunirl.rewards import REWARDS, check_sources, score
from openunirl.rollout import roll_out
from openunirl.tasks import shapes
from openunirl.tasks.shapes_oracle import Oracle
from openunirl.tasks.worlds import WORLDS
from openunirl.train import train
from openunirl.types import ImageSampling

WORLD = WORLDS["shapes"]()
ROLLOUT = RolloutConfig(
    num_prompts=2,
    num_generations=3,
    num_questions=2,
    num_answers=2,
    sampling=ImageSampling(num_timesteps=3),
    max_new_tokens=3,
)  # 6 images, 12 questions, 24 answers

MINE = '''
"""Rewards of a test."""
import asyncio
import math

import numpy as np
import torch

seen = {}

def images_first(prompts, images, answers, **columns):
    seen.update(columns, prompts=prompts, images=images, answers=answers)
    return [float(image.size[0]) for image in images]

async def numbers(prompts, images, answers, image_indices, **_):
    await asyncio.sleep(0)
    return np.array(image_indices, dtype=np.float32)

def tensors(prompts, **_):
    return torch.arange(len(prompts))

def first_question_only(answers, **_):
    return [2.0 if i % 4 < 2 else None for i in range(len(answers))]

def nothing(prompts, **_):
    return [None] * len(prompts)

def first_image_only(image_indices, **_):
    return [1.0 if index == 0 else None for index in image_indices]

def raises(image_indices, **_):
    if 3 in image_indices:
        raise KeyError("no color")
    return [0.0] * len(image_indices)

async def raises_later(image_indices, **_):
    raises(image_indices)

def raises_in_company(image_indices, **_):
    return [0.0] if len(image_indices) == 1 else [][0]

def short(prompts, **_):
    return [1.0] * (len(prompts) - 5)

def long(prompts, **_):
    return [1.0] * (len(prompts) + 1)

def scalar(prompts, **_):
    return 1.0

def word(prompts, **_):
    return [1.0, "good"] + [1.0] * (len(prompts) - 2)

def nan(prompts, **_):
    return [1.0] * (len(prompts) - 1) + [math.nan]

def inf(prompts, **_):
    return [torch.tensor(-math.inf)] + [True] * (len(prompts) - 1)

def huge(prompts, **_):
    return [1.0] * (len(prompts) - 2) + [1e39, 0.0]

calls = []

def stops_at_the_third_step(prompts, **_):
    calls.append(len(prompts))
    if len(calls) > 2:
        raise RuntimeError("the judge is gone")
    return [float(i) for i in range(len(prompts))]

def takes_nothing_else(prompts, images, answers):
    return []

not_a_function = 3
'''


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """Each test imports its own copy of MINE from the working directory, as a user's file is found."""
    name = f"mine_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    importlib.invalidate_caches()
    return name


@pytest.fixture(scope="module", params=["tiny-showo", "tiny-janus"])
def model(request):
    """A fresh tiny model beside its frozen base."""
    model = build(request.param, shapes.vocabulary(), seed=5)
    model.freeze_reference()
    return model


@pytest.fixture(scope="module")
def rollout(model):
    return roll_out(model, shapes.prompts("train", 2, 0), ROLLOUT, seed=1, step=1)


def scored(model, rollout, *sources, **more):
    return score(model, rollout, WORLD, RewardConfig(sources=sources or ("self",), **more), ROLLOUT)


# ------------------------------------------------------------------------------------------------ the sources


def test_the_dict_names_every_source():
    assert list(REWARDS) == ["self", "frozen", "detector"]


def test_hard_rewards_are_the_matchers(model, rollout):
    rewards = scored(model, rollout)
    for q, text in enumerate(rollout.answers.texts):
        assert rewards.answer_Q[q].item() == float(shapes.match("", rollout.gold[q], text).same)
    right = replace(rollout, gold=rollout.answers.texts)  # had the prompt asked for what was answered
    assert scored(model, right).answer_Q.tolist() == [1.0] * 24
    # one reward per image and question: the mean over its two answers
    torch.testing.assert_close(rewards.image_BJ, rewards.answer_Q.view(6, 2, 2).mean(-1))
    assert torch.equal(rewards.by_source["self"], rewards.answer_Q)


def test_a_frozen_judge_answers_for_itself(model, rollout):
    """The judge's answers are its own draws; the policy's right answers are not credited to its images."""
    right = replace(rollout, gold=rollout.answers.texts)
    rewards = scored(model, right, "frozen")
    assert rewards.answer_Q.tolist() == [1.0] * 24
    assert set(rewards.by_source["frozen"].tolist()) <= {0.0, 1.0} and rewards.image_BJ.mean() < 1


def test_probability_rewards_are_the_judges_own(model, rollout):
    rewards = scored(model, rollout, kind="probability")
    scores = model.score_answers(rollout.images.images, rollout.answers.questions, rollout.gold)
    q = 6  # image 1, second question, first answer
    want = scores.logprobs_QT[q].sum().div(int(scores.mask_QT[q].sum())).exp().item()
    assert rewards.image_BJ[1, 1].item() == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(scored(model, rollout, "frozen", kind="probability").image_BJ, rewards.image_BJ)


def test_the_detector_s_reward_is_the_evaluation_s_verdict(model, rollout):
    pictures = to_uint8(model.decode(rollout.images.images))
    metadata = [prompt.metadata() for prompt in rollout.prompts for _ in range(3)]
    verdicts = judge_pictures(Oracle(), metadata, list(pictures))
    rewards = scored(model, rollout, "detector")
    assert rewards.image_BJ.tolist() == [[float(verdict.correct)] * 2 for verdict in verdicts]
    assert torch.equal(rewards.answer_Q, scored(model, rollout).answer_Q)


def test_the_detector_calls_the_right_picture_right(model, rollout, monkeypatch):
    """Right pictures of the prompts in place of the model's: all verdicts are 1; with the prompts exchanged, 0."""
    prompts = [prompt for prompt in rollout.prompts for _ in range(3)]
    drawn = [torch.from_numpy(p).permute(2, 0, 1) / 255 for p in WORLD.references(prompts, 0)]
    monkeypatch.setattr(type(model), "decode", lambda self, images: torch.stack(drawn))
    assert scored(model, rollout, "detector").image_BJ.tolist() == [[1.0, 1.0]] * 6
    assert rollout.prompts[0].tag != rollout.prompts[1].tag
    other = replace(rollout, prompts=rollout.prompts[::-1])
    assert scored(model, other, "detector").image_BJ.mean() < 1


def test_a_function_sees_one_row_per_answer(model, rollout, module):
    rewards = scored(model, rollout, f"{module}:images_first")
    seen = importlib.import_module(module).seen
    width = seen["images"][0].size[0]
    assert rewards.image_BJ.tolist() == [[float(width)] * 2] * 6
    assert {name: len(column) for name, column in seen.items()} == dict.fromkeys(seen, 24)
    assert all(isinstance(image, Image.Image) for image in seen["images"])
    assert seen["images"][0] is seen["images"][3] and seen["images"][0] is not seen["images"][4]
    assert seen["image_indices"] == [b for b in range(6) for _ in range(4)]
    assert seen["prompts"] == [rollout.prompts[b // 3].prompt for b in range(6) for _ in range(4)]
    assert seen["answers"] == list(rollout.answers.texts) and seen["gold"] == list(rollout.gold)
    assert seen["metadata"][23] == rollout.prompts[1].metadata() and seen["tags"][0] == rollout.prompts[0].tag
    picture = to_uint8(model.decode(rollout.images.images))[5]
    assert np.array_equal(np.asarray(seen["images"][23]), picture)


def test_async_arrays_and_tensors_are_rewards_too(model, rollout, module):
    for _ in range(2):  # one event loop for the whole run
        assert scored(model, rollout, f"{module}:numbers").image_B.tolist() == [0, 1, 2, 3, 4, 5]
    assert scored(model, rollout, f"{module}:tensors").by_source["tensors"].tolist() == list(range(24))


# --------------------------------------------------------------------------------------- several, and None


def test_several_add_up_with_their_weights(model, rollout, module):
    own = scored(model, rollout)
    both = scored(model, rollout, "self", f"{module}:numbers", weights=(2.0, -0.5))
    torch.testing.assert_close(both.image_BJ, 2 * own.image_BJ - 0.5 * torch.arange(6.0)[:, None])
    assert list(both.by_source) == ["self", "numbers"]
    assert torch.equal(both.by_source["numbers"], torch.arange(6.0).repeat_interleave(4))  # unweighted
    plain = scored(model, rollout, "self", f"{module}:numbers")
    torch.testing.assert_close(plain.image_BJ, own.image_BJ + torch.arange(6.0)[:, None])


def test_right_is_what_every_source_that_applies_calls_right(model, rollout, module):
    right = replace(rollout, gold=rollout.answers.texts)  # the model's own verdicts are all 1
    assert scored(model, right, weights=(0.5,)).right_B.all()
    some = scored(model, right, "self", f"{module}:first_image_only", weights=(0.1, 0.2))
    assert some.right_B.all() and some.full_BJ[:2, 0].tolist() == pytest.approx([0.3, 0.1])
    assert not scored(model, right, "self", "frozen").right_B.any()  # the base says 0 to most, which was enough before
    assert not scored(model, right, f"{module}:nothing").right_B.any()


def test_none_leaves_the_others(model, rollout, module):
    own, some = scored(model, rollout), f"{module}:first_question_only"
    both = scored(model, rollout, "self", some)
    torch.testing.assert_close(both.image_BJ, own.image_BJ + torch.tensor([2.0, 0.0]))
    alone = scored(model, rollout, some)
    assert (alone.image_BJ[:, 0] == 2).all() and alone.image_BJ[:, 1].isnan().all() and (alone.image_B == 2).all()
    assert alone.by_source["first_question_only"].isnan().sum() == 12
    assert scored(model, rollout, f"{module}:nothing").image_B.isnan().all()


# --------------------------------------------------------------------------------------------- bad rewards


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", ["raised KeyError: 'no color'", "sample 12", "fails on alone"]),
        ("raises_later", ["raised KeyError: 'no color'", "sample 12"]),
        ("raises_in_company", ["raised IndexError", "on each of the 24 samples alone it does not"]),
        ("short", ["returned 19 values for 24 samples", "without one is sample 19"]),
        ("long", ["returned 25 values for 24 samples"]),
        ("scalar", ["returned 1.0, wanted a list of 24 numbers"]),
        ("word", ["returned 'good' for sample 1", "finite number, or None"]),
        ("nan", ["returned nan for sample 23"]),
        ("inf", ["returned -inf for sample 0"]),
        ("huge", ["returned 1e+39 for sample 22", "at most 1e+12 in size"]),  # float32 would make it inf
    ],
)
def test_a_bad_result_is_named_with_its_sample(model, rollout, module, function, words):
    with pytest.raises(ValueError) as caught:
        scored(model, rollout, "self", f"{module}:{function}")
    told = str(caught.value)
    assert told.startswith(f"reward {module}:{function} ")
    assert all(word in told for word in words), told
    if "sample 12" in words:  # image 3, the first of the second prompt
        assert repr(rollout.prompts[1].prompt) in told and repr(rollout.answers.texts[12]) in told


def test_a_judge_that_gives_no_number_is_named_too(model, rollout, monkeypatch):
    real = type(model).score_answers

    def poisoned(self, *args, **kwargs):
        scores = real(self, *args, **kwargs)
        scores.logprobs_QT[5] = math.nan
        return scores

    monkeypatch.setattr(type(model), "score_answers", poisoned)
    with pytest.raises(ValueError, match=r"reward frozen returned nan for sample 10 \(prompt 'a photo"):
        scored(model, rollout, "frozen", kind="probability")


@pytest.mark.parametrize(
    ("sources", "weights", "words"),
    [
        ((), (), ["--reward.sources is empty", "detector", "module:function"]),
        (("slef",), (), ["unknown reward 'slef'", "self, frozen, detector"]),
        (("self", "self"), (), ["two of them are called 'self'"]),
        (("self", "frozen"), (1.0,), ["--reward.weights: 1.0", "self frozen", "one finite number for each"]),
        (("self",), (math.nan,), ["--reward.weights: nan"]),
        (("self",), (0.0,), ["not all 0"]),
        (("self",), (1e39,), ["--reward.weights: 1e+39", "at most 1e+06 in size"]),
        (("no_such_module:f",), (), ["reward no_such_module:f", "cannot be imported", "ModuleNotFoundError"]),
        (("MINE:absent",), (), ["MINE:absent", "no function 'absent'"]),
        (("MINE:not_a_function",), (), ["no function 'not_a_function'"]),
        (("MINE:takes_nothing_else",), (), ["another shape", "'questions'", "(prompts, images, answers, **_)"]),
    ],
)
def test_sources_that_cannot_work_are_named(module, sources, weights, words):
    sources = tuple(source.replace("MINE", module) for source in sources)
    with pytest.raises(ValueError) as caught:
        check_sources(RewardConfig(sources=sources, weights=weights), WORLD)
    assert all(word.replace("MINE", module) in str(caught.value) for word in words), caught.value


def test_a_world_without_a_detector_cannot_reward_with_it():
    with pytest.raises(ValueError, match=r"GenEval has no detector; give --photos\.detector-weights"):
        check_sources(RewardConfig(sources=("detector",)), WORLDS["geneval"]())


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    build("tiny-showo", shapes.vocabulary(), seed=9).save(folder)
    return str(folder)


def config(weights, out, *sources, evaluated=0):
    return RunConfig(
        model=ModelConfig(weights=weights),
        output_dir=str(out),
        rollout=RolloutConfig(
            num_prompts=1,
            num_generations=2,
            num_answers=2,
            sampling=ImageSampling(num_timesteps=2),
            max_new_tokens=2,
        ),
        reward=RewardConfig(sources=sources),
        train=TrainConfig(max_steps=4, save_steps=1, report_to=()),
        eval=EvalConfig(
            num_prompts=evaluated, num_references=evaluated, sampling=ImageSampling(num_timesteps=2), max_new_tokens=2
        ),
    )


def test_a_reward_that_raises_stops_the_run_and_keeps_its_checkpoint(weights, tmp_path, module):
    with pytest.raises(ValueError) as caught:
        train(config(weights, tmp_path / "run", "self", f"{module}:stops_at_the_third_step"))
    told = str(caught.value)
    assert told.startswith(f"step 3: reward {module}:stops_at_the_third_step raised RuntimeError: the judge is gone")
    assert "sample 0 (prompt 'a photo" in told and "step-000002, and --resume" in told
    assert [p.name for p in checkpoint.saved(tmp_path / "run")] == ["step-000001", "step-000002"]


def test_a_bad_source_leaves_no_run_directory(weights, tmp_path):
    with pytest.raises(ValueError, match="unknown reward 'oracle'"):
        train(config(weights, tmp_path / "run", "oracle"))
    assert not (tmp_path / "run").exists()


def test_metrics_have_trl_s_names(weights, tmp_path, module):
    some = (f"{module}:tensors", f"{module}:nothing", f"{module}:first_image_only")
    out = train(config(weights, tmp_path / "run", *some))
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    # samples 0 1 | 2 3, and 1 more for the first image: the images are worth 1.5 and 2.5
    assert row["rewards/tensors/mean"] == pytest.approx(1.5)
    assert row["rewards/tensors/std"] == pytest.approx(math.sqrt(5 / 3))
    assert row["rewards/first_image_only/mean"] == 1 and row["rewards/first_image_only/std"] == 0
    assert "rewards/nothing/mean" not in row
    assert row["reward"] == pytest.approx(2.0) and row["reward_std"] == pytest.approx(math.sqrt(0.5))


def test_a_step_without_any_reward_trains_on_its_kl_alone(weights, tmp_path, module):
    out = train(config(weights, tmp_path / "run", f"{module}:nothing"))
    text = (out / "metrics.jsonl").read_text()
    row = json.loads(text.splitlines()[-1])
    assert "reward" not in row and "NaN" not in text and row["frac_reward_zero_std"] == 1 and math.isfinite(row["loss"])


def test_a_run_rewarded_by_the_detector_says_so(weights, tmp_path, capsys):
    out = train(config(weights, tmp_path / "run", "self", "detector", evaluated=6))
    for name in ("before", "after"):
        assert json.loads((out / "evaluation" / f"{name}.json").read_text())["reward_sources"] == ["self", "detector"]
    assert "This run was rewarded by the detector" in (out / "report.html").read_text()
    assert "rewarded by the detector" in capsys.readouterr().err
    other = train(config(weights, tmp_path / "other", "self", evaluated=6))
    assert "rewarded by the detector" not in (other / "report.html").read_text() + capsys.readouterr().err
