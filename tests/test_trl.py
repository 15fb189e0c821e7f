"""The loss and the advantages against TRL's own GRPOTrainer on the same tensors, and its names.

TRL's trainer is made without its constructor, which would load a model and a dataset: the two methods under test read
the knobs from attributes, and log-probs and rewards from methods that are told here.
"""

import dataclasses
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from openunirl.advantages import group_advantages
from openunirl.config import LossConfig, RolloutConfig
from openunirl.experience import Experience
from openunirl.losses import Stats, Totals
from openunirl.objectives import Terms, loss_parts
from openunirl.types import ScorePass
from told import Told, untold_rollout

S, L, LONGEST = 6, 5, 7  # sequences, tokens, and the longest that max_completion_length allows
LENGTHS = torch.tensor([1, 5, 3, 4, 2, 5])
KINDS = ("grpo", "bnpo", "dr_grpo", "dapo")


def alone(value, **_):
    """What gathering and reducing are on one process."""
    return value


def trainer(config, num_processes=1, **more):
    """TRL's trainer with our knobs."""
    made = object.__new__(GRPOTrainer)
    accelerator = SimpleNamespace(
        num_processes=num_processes,
        process_index=0,
        is_main_process=True,
        device=torch.device("cpu"),
        gather=alone,
        reduce=alone,
    )
    args = SimpleNamespace(
        report_to=[],
        delta=None,
        use_bias_correction_kl=False,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=S,
        gradient_checkpointing_kwargs=None,
    )
    told = {
        "args": args,
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "state": SimpleNamespace(global_step=1),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LONGEST,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "loss_type": config.loss_type,
        "importance_sampling_level": config.importance_sampling_level,
        "beta": config.beta,
        "epsilon_low": config.epsilon,
        "epsilon_high": config.epsilon if config.epsilon_high is None else config.epsilon_high,
        "scale_rewards": config.scale_rewards,
    }
    vars(made).update(told | more)
    return made


@pytest.fixture
def tensors():
    """Log-probs of policy, old policy and base, advantages and mask; many ratios are beyond the clips."""
    generator = torch.Generator().manual_seed(3)
    old_SL, change_SL, apart_SL = torch.randn(3, S, L, generator=generator, dtype=torch.float64)
    old_SL = -old_SL.abs()
    return SimpleNamespace(
        logp_SL=(old_SL + 0.4 * change_SL).requires_grad_(),
        old_SL=old_SL,
        reference_SL=old_SL + 0.3 * apart_SL,
        advantages_S=torch.tensor([1.2, -0.7, 0.0, 0.4, -1.5, 0.6], dtype=torch.float64),
        mask_SL=torch.arange(L) < LENGTHS[:, None],
    )


def rows(tensors, part):
    return SimpleNamespace(**{name: value[part] for name, value in vars(tensors).items()})


def theirs(config, x, *, num_processes=1, all_tokens=None):
    """TRL's loss of these sequences."""
    told = (x.logp_SL, torch.zeros_like(x.logp_SL), None)
    made = trainer(config, num_processes, _get_per_token_logps_and_entropies=lambda *_, **__: told)
    nothing = torch.zeros(len(x.mask_SL), 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": x.mask_SL.long(),
        "completion_mask": x.mask_SL.long(),
        "advantages": x.advantages_S,
        "old_per_token_logps": x.old_SL,
        "ref_per_token_logps": x.reference_SL,
        "num_items_in_batch": x.mask_SL.sum() if all_tokens is None else all_tokens,
    }
    return made.compute_loss(made.model, inputs), {name: values[-1] for name, values in made._metrics["train"].items()}


def ours(config, x, totals=None):
    """Our loss of the same sequences, as answers."""
    totals = totals or Totals(samples=len(x.mask_SL), tokens=float(x.mask_SL.sum()), max_length=LONGEST)
    experience = Experience(
        rollout=untold_rollout(len(x.mask_SL), L),
        advantages_B=torch.zeros(len(x.mask_SL)),
        advantages_Q=x.advantages_S,
        passes=(),
        reference_answers=x.reference_SL,
        old_answers=x.old_SL,
    )
    terms = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    model = Told(logp_QT=x.logp_SL, mask_QT=x.mask_SL)
    (loss,) = loss_parts(model, experience, parts=1, terms=terms)
    return loss, terms.stats.means()


def gradient(loss, x):
    return torch.autograd.grad(loss, x.logp_SL, retain_graph=True)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("epsilon", "high"), [(0.2, None), (0.1, 0.28)])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_loss_of_answers_is_trls(tensors, kind, level, epsilon, high, beta):
    config = LossConfig(
        loss_type=kind,
        importance_sampling_level=level,
        epsilon=epsilon,
        epsilon_high=high,
        beta=beta,
        image_coef=0.0,
    )
    (want, their_stats), (got, our_stats) = theirs(config, tensors), ours(config, tensors)
    assert got.item() == pytest.approx(want.item(), abs=1e-12)
    assert gradient(want, tensors).abs().sum() > 0
    torch.testing.assert_close(gradient(got, tensors), gradient(want, tensors), atol=1e-14, rtol=1e-12)
    if beta:
        assert our_stats["answer/kl"] == pytest.approx(their_stats["kl"], abs=1e-6)  # TRL counts tokens in float32
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
        assert our_stats[name] == our_stats[f"answer/{name}"] == pytest.approx(their_stats[name], abs=1e-6)
        assert level == "sequence" or their_stats[name] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_loss_of_images_over_several_passes_is_trls(tensors, kind, level):
    """Three passes score an image's tokens; TRL sees them as one completion."""
    x = SimpleNamespace(**vars(tensors) | {"mask_SL": torch.ones(S, L, dtype=torch.bool)})
    config = LossConfig(loss_type=kind, importance_sampling_level=level, beta=0.04, answer_coef=0.0)
    want, _ = theirs(config, x)
    step_SL = torch.arange(L).expand(S, L) % 3
    passes = tuple(
        ScorePass(shown_BN=step_SL < k, scored_BN=step_SL == k, weight_BN=torch.ones(S, L)) for k in range(3)
    )
    experience = Experience(
        rollout=untold_rollout(S, L),
        advantages_B=x.advantages_S,
        advantages_Q=torch.zeros(S),
        passes=passes,
        reference_images=tuple(x.reference_SL * one.scored_BN for one in passes),
        old_images=tuple(x.old_SL * one.scored_BN for one in passes),
    )
    totals = Totals(samples=S, tokens=S * L, max_length=LONGEST)
    terms = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    parts = list(loss_parts(Told(logp_BN=x.logp_SL), experience, parts=1, terms=terms))
    assert len(parts) == 3
    assert sum(parts).item() == pytest.approx(want.item(), abs=1e-12)
    torch.testing.assert_close(gradient(sum(parts), x), gradient(want, x), atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_over_two_processes_bnpo_is_global_here_and_local_there(tensors, kind):
    """The mean over two processes with 9 and 11 tokens. Ours is the loss of the whole batch, in all four; TRL's bnpo
    divides by each process's own tokens."""
    config = LossConfig(loss_type=kind, beta=0.04, image_coef=0.0)
    whole, _ = theirs(config, tensors)
    halves = [rows(tensors, slice(0, 3)), rows(tensors, slice(3, 6))]
    assert [int(x.mask_SL.sum()) for x in halves] == [9, 11]
    totals = Totals(samples=S / 2, tokens=20 / 2, max_length=LONGEST)  # Processes.share of both
    got = sum(ours(config, x, totals)[0].item() for x in halves) / 2
    trl = sum(theirs(config, x, num_processes=2, all_tokens=torch.tensor(20))[0].item() for x in halves) / 2
    assert got == pytest.approx(whole.item(), abs=1e-12)
    if kind == "bnpo":
        assert abs(trl - whole.item()) > 1e-4
    else:
        assert trl == pytest.approx(whole.item(), abs=1e-12)


# -------------------------------------------------------------------------------------------------- advantages


def their_advantages(rewards_RG, scale):
    """TRL's advantages of completions with these rewards: [R, G] -> [R, G]."""
    count, group = rewards_RG.numel(), rewards_RG.shape[1]
    ids, texts = [[1]] * count, ["a"] * count
    generated = (ids, ids, None, texts, None, {}, None, None)
    made = trainer(
        LossConfig(scale_rewards=scale, beta=0.0),
        environment_factories=None,
        environments=None,
        tools=[],
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_iterations=1,
        num_generations=group,
        multi_objective_aggregation="sum_then_normalize",
        reward_funcs=[None],
        reward_func_names=["told"],
        reward_weights=torch.ones(1),
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *_: rewards_RG.flatten()[:, None].clone(),
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    made.model.is_gradient_checkpointing = False
    return made._generate_and_score_completions([{"prompt": "p"}] * count)["advantages"].view_as(rewards_RG)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale):
    nan = float("nan")
    rewards_RG = torch.tensor(
        [[1.0, 0, 0, 1], [0.3, 0.1, 0.8, 0.2], [1.0, 1, 1, 1], [nan, 1, 0, 0]], dtype=torch.float64
    )
    want_RG = their_advantages(rewards_RG, scale)
    assert want_RG[0].abs().sum() > 0 and want_RG[3, 0] == 0  # no reward applies to that one
    torch.testing.assert_close(
        group_advantages(rewards_RG, scale), want_RG, atol=1e-7, rtol=0
    )  # its Bessel correction is float32


# ------------------------------------------------------------------------------------------------------- names


def test_the_knobs_have_trls_names():
    known = {field.name for field in dataclasses.fields(GRPOConfig)}
    knobs = {"beta", "epsilon", "epsilon_high", "num_iterations", "scale_rewards", "loss_type",
             "importance_sampling_level", "num_generations", "reward_weights"}  # fmt: skip
    assert knobs <= known
    own = {field.name for kind in (LossConfig, RolloutConfig) for field in dataclasses.fields(kind)}
    assert knobs - {"reward_weights"} <= own  # --reward.weights
