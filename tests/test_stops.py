"""A run that cannot go on stops, says why, and keeps what it had."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from openunirl import checkpoint
from openunirl.config import (
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RelaxationConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from openunirl.guards import StepGuard, check_update, check_weights
from openunirl.models.tiny import build
from openunirl.optim import lr_factor
from openunirl.rewards import Rewards
from openunirl.run import Run
from openunirl.tasks import shapes
from openunirl.tasks.records import write_prompts
from openunirl.train import train
from openunirl.types import ImageSampling
from openunirl.validate import check


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    build("tiny-showo", shapes.vocabulary(), seed=9).save(folder)
    return str(folder)


def config(weights, out, **parts):
    default = {
        "rollout": RolloutConfig(
            num_prompts=1, num_generations=2, sampling=ImageSampling(num_timesteps=2), max_new_tokens=2
        ),
        "reward": RewardConfig(kind="probability"),
        "train": TrainConfig(max_steps=3, save_steps=1, report_to=()),
        "eval": EvalConfig(num_prompts=0),
        "optim": OptimConfig(lr=1e-3),
    }
    return RunConfig(model=ModelConfig(weights=weights), output_dir=str(out), **(default | parts))


def test_a_loss_that_is_not_a_number_stops_before_the_update(weights, tmp_path, monkeypatch):
    real = Run.update

    def poisoned(self, losses, step):
        if step == 2:
            kept = {n: p.detach().clone() for n, p in self.model.net.named_parameters()}
            try:
                return real(self, (loss * math.nan for loss in losses), step)
            finally:
                assert all(torch.equal(kept[n], p) for n, p in self.model.net.named_parameters())
        return real(self, losses, step)

    monkeypatch.setattr(Run, "update", poisoned)
    with pytest.raises(ValueError, match=r"step 2: the loss is nan.*step-000001"):
        train(config(weights, tmp_path / "run"))
    assert [p.name for p in checkpoint.saved(tmp_path / "run")] == ["step-000001"]


def test_a_gradient_that_is_always_zero_stops_the_run(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("openunirl.train.loss_parts", lambda *_, **__: iter([torch.zeros((), requires_grad=True) * 0]))
    long = TrainConfig(max_steps=9, save_steps=1, stall_steps=3, report_to=())
    with pytest.raises(ValueError, match=r"step 3: the gradient was exactly 0 for 3 steps.*step-000002"):
        train(config(weights, tmp_path / "run", train=long))


def test_the_guard_does_not_mind_steps_without_variance():
    guard = StepGuard(config("x", "y", train=TrainConfig(stall_steps=2)))
    for step in range(10):
        guard.check(step, {"grad_norm": 0.0, "advantage_abs": 0.0}, "none")


SFT = {
    "reward": RewardConfig(kind="answer"),
    "loss": LossConfig(method="sft", beta=0.0, gold_answers="kept"),
}


def test_an_update_that_breaks_the_weights_is_never_saved(weights, tmp_path, monkeypatch):
    real = Run.log

    def log(self, step, metrics):
        real(self, step, metrics)
        if step == 1:
            for group in self.optimizer.param_groups:
                group["eps"] = math.nan  # the next update is no number, its loss and gradient are

    monkeypatch.setattr(Run, "log", log)
    with pytest.raises(
        ValueError, match=r"step 2: after this update the weight \S+ is not finite.*step-000001"
    ) as told:
        train(config(weights, tmp_path / "run"))
    assert "a lower --optim.lr (now 0.001) or a higher --loss.beta" in str(told.value)
    assert [p.name for p in checkpoint.saved(tmp_path / "run")] == ["step-000001"]


@pytest.mark.parametrize(("parts", "beta"), [({}, True), (SFT, False)], ids=["grpo", "sft"])
def test_the_advice_is_one_that_the_method_takes(parts, beta):
    for fails in (
        lambda c: check_update(3, c, "none", loss=math.nan, norm=1.0),
        lambda c: check_weights(3, c, "none", broken="head.weight"),
    ):
        with pytest.raises(ValueError, match=r"try a lower --optim\.lr \(now 0\.001\)") as told:
            fails(config("x", "y", **parts))
        assert ("--loss.beta" in str(told.value)) == beta


def test_sft_that_keeps_nothing_warns_and_stops(weights, tmp_path, monkeypatch, capsys):
    """What a learning rate of 1000 leaves: a model that is never right."""
    monkeypatch.setattr(Rewards, "right_B", property(lambda self: torch.zeros(len(self.image_BJ), dtype=torch.bool)))
    long = TrainConfig(max_steps=9, save_steps=1, stall_steps=3, report_to=())
    with pytest.raises(ValueError, match=r"step 3: in 3 steps in a row no image was kept.*step-000002.*--optim\.lr"):
        train(config(weights, tmp_path / "run", train=long, **SFT))
    assert "warning: step 2: in 2 steps in a row no image was kept" in capsys.readouterr().err
    alone = RolloutConfig(num_prompts=1, num_generations=1, sampling=ImageSampling(num_timesteps=2), max_new_tokens=2)
    on = train(config(weights, tmp_path / "on", train=replace(long, stall_steps=0, max_steps=4), rollout=alone, **SFT))
    rows = [json.loads(line) for line in (on / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and not {"frac_reward_zero_std", "reward_std"} & rows[0].keys()  # groups of one


def test_gold_answers_of_all_images_are_learned_whatever_is_kept():
    said = []
    guard = StepGuard(config("x", "y", loss=LossConfig(method="sft", beta=0.0)), warn=said.append)
    for step in range(1, 9):
        guard.check(step, {"grad_norm": 1.0, "advantage_abs": 1.0, "sft/kept_share": 0.0}, "none")
    assert len(said) == 1 and said[0].endswith("the image half learns nothing")
    for step, share in enumerate((0.0, 0.1, 0.0, 0.1, 0.0, 0.1), start=9):
        guard.check(step, {"grad_norm": 1.0, "advantage_abs": 1.0, "sft/kept_share": share}, "none")
    assert guard.empty == 0 and len(said) == 1


def test_a_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(weights, tmp_path, monkeypatch):
    from openunirl.models.showo import Showo

    real, calls = Showo.save, []

    def full(self, path, dtype=None):
        calls.append(path)
        real(self, path, dtype)
        if len(calls) == 2:
            raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(Showo, "save", full)
    with pytest.raises(OSError, match=r"No space left on device; free some space: .*step-000002"):
        train(config(weights, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


def test_a_prompt_that_does_not_fit_leaves_no_run_directory(weights, tmp_path):
    prompt = shapes.prompts("train", 1, 0)[0]
    long = type(prompt)(
        tag=prompt.tag, include=prompt.include, questions=prompt.questions, prompt="a photo of " + "circle " * 90
    )
    write_prompts(tmp_path / "prompts.jsonl", [long])
    with pytest.raises(ValueError, match="a photo of circle circle"):
        train(config(weights, tmp_path / "run", prompt_file=str(tmp_path / "prompts.jsonl")))
    assert not (tmp_path / "run").exists()


def test_an_empty_prompt_file_is_named(weights, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"prompts\.jsonl"):
        train(config(weights, tmp_path / "run", prompt_file=str(tmp_path / "prompts.jsonl")))
    assert not (tmp_path / "run").exists()


def test_a_prompt_file_without_questions_leaves_no_run_directory(weights, tmp_path):
    first, second = shapes.prompts("train", 2, 5)
    write_prompts(tmp_path / "prompts.jsonl", [first, replace(second, questions=())])
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: the prompt 'a photo .* has no question.*\"answer\""):
        train(config(weights, tmp_path / "run", prompt_file=str(tmp_path / "prompts.jsonl")))
    assert not (tmp_path / "run").exists()


def test_words_that_the_tokenizer_does_not_know_are_told_once(weights, tmp_path, capsys):
    known = shapes.prompts("train", 2, 5)
    strange = [replace(prompt, prompt="a photo of a zebra and a giraffe") for prompt in known]
    for prompts in (known, strange):
        write_prompts(tmp_path / "prompts.jsonl", prompts)
        train(config(weights, tmp_path / prompts[0].prompt, prompt_file=str(tmp_path / "prompts.jsonl")))
        told = capsys.readouterr().err
        assert told.count("does not know the words") == (prompts is strange)
    assert f"{tmp_path}/prompts.jsonl: the tokenizer of {weights} does not know the words zebra, giraffe, so" in told


@pytest.mark.parametrize("family", ["tiny-showo", "tiny-janus"])
def test_a_world_has_no_word_that_its_models_do_not_know(family):
    model = build(family, shapes.vocabulary(), seed=9)
    prompts = shapes.prompts("train", 300, 0)
    assert model.unknown_words(q.question for p in prompts for q in p.questions) == []
    assert model.unknown_words([*(p.prompt for p in prompts), "a photo of a red Zebra?"]) == ["Zebra?"]


def test_the_users_own_prompts_are_trained_on(weights, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", shapes.prompts("train", 2, 5))
    out = train(config(weights, tmp_path / "run", prompt_file=str(tmp_path / "prompts.jsonl")))
    assert (out / "checkpoints" / "step-000003").exists()


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"train": TrainConfig(max_steps=0)}, "max-steps"),
        ({"train": TrainConfig(save_steps=-1)}, "save-steps"),
        ({"loss": LossConfig(image_coef=0, answer_coef=0)}, "both 0"),
        ({"optim": OptimConfig(gradient_accumulation_steps=99)}, "accumulation"),
        ({"rollout": RolloutConfig(sampling=ImageSampling(temperature=0.0))}, "temperature"),
        ({"rollout": RolloutConfig(answer_temperature=0.0)}, "answer-temperature"),
        ({"rollout": RolloutConfig(num_generations=1)}, "num-generations is 1.*sft"),
        ({"loss": LossConfig(method="sft")}, "beta is 0.02.*--loss.beta 0"),
        ({"loss": LossConfig(method="sft", beta=0.0)}, "reward.kind is probability"),
        ({"loss": LossConfig(method="sft", beta=0.0, end_to_end=True, answer_coef=0.0)}, "no-end-to-end"),
        (
            {
                "loss": LossConfig(method="sft", beta=0.0),
                "reward": RewardConfig(sources=("self", "frozen"), weights=(1.0, -0.5)),
            },
            "--reward.weights 1.0 -0.5: SFT keeps",
        ),
        ({"loss": LossConfig(method="sft", beta=0.0, loss_type="dapo")}, "loss-type is dapo.*GRPO"),
        (
            {"loss": LossConfig(method="sft", beta=0.0, importance_sampling_level="sequence")},
            "importance-sampling-level is sequence",
        ),
        ({"loss": LossConfig(method="sft", beta=0.0, epsilon_high=0.3)}, "epsilon-high is 0.3"),
        ({"loss": LossConfig(relaxation=RelaxationConfig(tau=0.0))}, "relaxation.tau is 0.0"),
        ({"loss": LossConfig(relaxation=RelaxationConfig(final_tau=-1.0))}, "relaxation.final-tau is -1.0"),
        ({"loss": LossConfig(beta=math.nan)}, "--loss.beta is nan, wanted a finite number"),
        ({"loss": LossConfig(beta=-0.1)}, "--loss.beta is -0.1"),
        ({"loss": LossConfig(reward_coef=math.inf)}, "--loss.reward-coef is inf"),
        ({"loss": LossConfig(reward_coef=-1.0)}, "--loss.reward-coef is -1.0"),
        ({"loss": LossConfig(epsilon_high=math.nan)}, "--loss.epsilon-high is nan"),
        ({"loss": LossConfig(epsilon_high=-0.1)}, "--loss.epsilon-high is -0.1"),
        ({"loss": LossConfig(relaxation=RelaxationConfig(tau=math.nan))}, "--loss.relaxation.tau is nan"),
        ({"optim": OptimConfig(adam_epsilon=math.nan)}, "--optim.adam-epsilon is nan"),
        ({"optim": OptimConfig(adam_epsilon=-1e-8)}, "--optim.adam-epsilon is -1e-08, wanted more than 0"),
        ({"optim": OptimConfig(adam_beta2=1.0)}, "--optim.adam-beta2 is 1.0"),
        ({"optim": OptimConfig(max_grad_norm=0.0)}, "--optim.max-grad-norm is 0.0, wanted more than 0"),
        ({"optim": OptimConfig(lr=math.inf)}, "--optim.lr is inf"),
        ({"rollout": RolloutConfig(answer_temperature=math.nan)}, "--rollout.answer-temperature is nan"),
        ({"eval": EvalConfig(sampling=ImageSampling(temperature=math.nan))}, "--eval.sampling.temperature is nan"),
        # settings that would do nothing
        ({"loss": LossConfig(end_to_end=True, image_coef=0.0)}, "--loss.end-to-end is True and --loss.image-coef 0"),
        (
            {"loss": LossConfig(end_to_end=True, image_coef=0.0, reward_coef=2.0)},
            "--loss.reward-coef is 2.0 and --loss.image-coef 0",
        ),
        ({"loss": LossConfig(end_to_end=True, answer_coef=0.0)}, "answer-coef 0 and --loss.reward-coef 0.*no-end-to"),
        (
            {"loss": LossConfig(method="sft", beta=0.0, end_to_end=True, image_coef=0.0)},
            "--loss.end-to-end is True and --loss.image-coef 0",
        ),
        (
            {
                "loss": LossConfig(end_to_end=True, logprob_guidance=False),
                "rollout": RolloutConfig(sampling=ImageSampling(guidance_scale=2.5)),
            },
            "--loss.no-logprob-guidance with --loss.end-to-end .*guidance-scale 2.5.*use --loss.logprob-guidance, or",
        ),
        # one weight for two sources, also where the soft judges are wanted
        (
            {
                "loss": LossConfig(end_to_end=True, reward_coef=1.0),
                "reward": RewardConfig(kind="probability", sources=("self", "frozen"), weights=(1.0,)),
            },
            "--reward.weights: 1.0 for --reward.sources self frozen; wanted one finite number for each",
        ),
    ],
)
def test_values_that_cannot_work_are_named(parts, word):
    with pytest.raises(ValueError, match=word):
        check(config("x", "y", **parts))


def test_settings_that_do_work_together_pass():
    verdicts = RewardConfig(kind="answer")
    alone = {"reward": verdicts, "rollout": RolloutConfig(num_generations=1, answer_temperature=0.0)}
    check(config("x", "y", loss=LossConfig(method="sft", beta=0.0, num_scored_steps=0), **alone))
    check(config("x", "y", loss=LossConfig(method="sft", beta=0.0, end_to_end=True)))
    check(config("x", "y", loss=LossConfig(method="sft", beta=0.0, image_coef=0.0)))
    check(config("x", "y", loss=LossConfig(end_to_end=True, answer_coef=0.0, reward_coef=1.0)))
    check(config("x", "y", rollout=RolloutConfig(num_generations=1, num_answers=2), loss=LossConfig(image_coef=0.0)))
    check(config("x", "y", loss=LossConfig(end_to_end=True, logprob_guidance=False)))  # nothing is guided
    guided = RolloutConfig(sampling=ImageSampling(guidance_scale=2.5))
    check(config("x", "y", rollout=guided, loss=LossConfig(logprob_guidance=False)))  # nothing is relaxed


def test_learning_rate_by_hand():
    assert [lr_factor(s, 4, decay=1.0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [lr_factor(s, 4, warmup=2, decay=0.0) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert [lr_factor(s, 4, decay=0.5) for s in range(4)] == [1.0, 1.0, 1.0, 0.5]
