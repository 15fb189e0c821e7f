"""Adapters and the kinds of frozen base, on both families: where they start, what learns, what is saved."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from openunirl.config import (
    EvalConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from openunirl.draws import key
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals
from openunirl.models.lora import adapted, merged_state
from openunirl.models.masked import Estimator
from openunirl.models.protocol import load_model
from openunirl.models.tiny import build
from openunirl.objectives import Terms, loss_parts
from openunirl.optim import build_optimizer
from openunirl.rollout import roll_out
from openunirl.run import set_up
from openunirl.tasks import shapes
from openunirl.train import train
from openunirl.types import ImageSampling
from openunirl.validate import check

FAMILIES = ["tiny-showo", "tiny-janus"]
SAMPLING = ImageSampling(num_timesteps=3, guidance_scale=2.0, temperature=0.8)
ROLLOUT = RolloutConfig(num_prompts=2, num_generations=2, sampling=SAMPLING, max_new_tokens=3)
LORA = LoraConfig(rank=4, alpha=8.0)
UPS = torch.tensor([1.0, -1.0, 0.5, -0.5])


@pytest.fixture(params=FAMILIES)
def plain(request):
    return build(request.param, shapes.vocabulary(), seed=5)


@pytest.fixture
def model(plain):
    plain.add_adapters(LORA, seed=0)
    return plain


def left_base(model):
    """Adapters as training leaves them: not 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted(model.net).values():
            weight = layer.lora_B["default"].weight
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def rolled(model):
    return roll_out(model, shapes.prompts("train", 2, 0), ROLLOUT, seed=1, step=1)


def drawn(model):
    return model.sample_images(["a photo of a red circle"], key(1, torch.arange(1)), SAMPLING).tokens_BN


def backward(model, rollout, config, stats=None):
    experience = gather_experience(model, rollout, UPS, UPS, config, temperature=1.0)
    totals = Totals(samples=4, tokens=8, max_length=3)
    terms = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=stats or Stats())
    for part in loss_parts(model, experience, parts=1, terms=terms):
        part.backward()


@pytest.mark.parametrize("end_to_end", [False, True])
def test_the_policy_starts_as_its_base(model, end_to_end):
    """Exactly: the KL is 0 and no ratio is clipped, after which only adapters have a gradient."""
    stats = Stats()
    config = LossConfig(end_to_end=end_to_end, beta=0.1, num_scored_steps=0, num_iterations=2, epsilon=0.0)
    backward(model, rolled(model), config, stats)
    for name, (total, _) in stats.sums.items():
        assert total == 0 or ("kl" not in name and "clip" not in name), name
    assert "image/kl" in stats.sums and "answer/kl" in stats.sums
    reached = {name for name, weight in model.net.named_parameters() if weight.grad is not None}
    assert reached and all(".lora_" in name for name in reached)


def test_only_adapters_have_an_optimizer(model):
    optimizer = build_optimizer(model.net, lr=1e-3, weight_decay=0.0)[0]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    adapters = {id(p) for name, p in model.net.named_parameters() if ".lora_" in name}
    assert held == adapters and model.reference_net is None
    assert not any("vision" in name for name in adapted(model.net))


def test_the_base_is_the_network_without_adapters(plain):
    rollout, config = rolled(plain), LossConfig(num_scored_steps=0)

    def scored():
        return gather_experience(plain, rollout, UPS, UPS, config, temperature=1.0).reference_images[0]

    plain.freeze_reference()
    want = scored()
    plain.add_adapters(LORA, seed=0)
    left_base(plain)
    assert torch.equal(scored(), want)
    with torch.no_grad():
        now = plain.score_images(rollout.images, plain.scoring_passes(rollout.images, Estimator(), UPS)[0])
    assert not torch.allclose(now.logprobs_BN, want, atol=1e-3)
    trainable = [p.requires_grad for n, p in plain.net.named_parameters() if ".lora_" in n]
    assert all(trainable)


def test_checkpoints_are_plain_and_training_continues_from_them(model, tmp_path):
    left_base(model)
    model.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert not any("lora" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    assert torch.equal(drawn(again), drawn(model))
    base = build(f"tiny-{type(model).__name__.lower()}", shapes.vocabulary(), seed=5)
    base.add_adapters(LORA, seed=7)
    base.load_weights(tmp_path / "saved")
    for (name, a), (_, b) in zip(model.net.named_parameters(), base.net.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    before = {n: w.clone() for n, w in base.net.named_parameters()}
    merged_state(base.net)
    assert all(torch.equal(before[n], w) for n, w in base.net.named_parameters())
    other = build(f"tiny-{type(model).__name__.lower()}", shapes.vocabulary(), seed=5)
    with pytest.raises(ValueError, match=r"was trained with adapters.*--lora\.rank"):
        other.load_weights(tmp_path / "saved")
    other.add_adapters(replace(LORA, rank=2), seed=0)
    with pytest.raises(ValueError, match=r"do not fit --lora\.rank"):
        other.load_weights(tmp_path / "saved")
    build("tiny-showo", shapes.vocabulary(), seed=5).save(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"without adapters; leave --lora\.rank out"):
        other.load_weights(tmp_path / "plain")


def test_merged_weights_leave_the_device_one_by_one(model, monkeypatch):
    events, cpu, layer = [], torch.Tensor.cpu, type(next(iter(adapted(model.net).values())))
    made = layer.get_delta_weight
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (events.append("moved"), cpu(tensor))[1])
    monkeypatch.setattr(layer, "get_delta_weight", lambda *about: (events.append("made"), made(*about))[1])
    merged_state(model.net)
    assert events == ["made", "moved"] * len(adapted(model.net))


def test_peft_reads_our_adapters(tmp_path):
    from peft import PeftModel
    from transformers import JanusForConditionalGeneration

    model = build("tiny-janus", shapes.vocabulary(), seed=5)
    model.save(tmp_path / "base")
    model.add_adapters(LORA, seed=0)
    left_base(model).save(tmp_path / "tuned")
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(theirs, tmp_path / "tuned" / "adapter").merge_and_unload().state_dict()
    for name, want in merged_state(model.net).items():
        torch.testing.assert_close(merged[name], want)


def test_targets_name_layers(plain):
    plain.add_adapters(LoraConfig(rank=2, targets=("q_proj",)), seed=0)
    assert {name.rpartition(".")[2] for name in adapted(plain.net)} == {"q_proj"}
    assert len(adapted(plain.net)) == 5  # the decoder's layers, not the vision tower's


@pytest.mark.parametrize("target", ["nothing", "lm_head"])
def test_targets_that_cannot_carry_one_are_refused(plain, target):
    with pytest.raises(ValueError, match=rf"--lora\.targets {target}: .*known: .*q_proj"):
        plain.add_adapters(LoraConfig(rank=2, targets=(target,)), seed=0)


def test_gradient_checkpointing_changes_no_gradient(plain):
    plain.freeze_reference()
    rollout, config = rolled(plain), LossConfig(end_to_end=True, beta=0.1, num_scored_steps=0)
    found = []
    for kept in (True, False):
        if not kept:
            plain.recompute_activations()
        plain.net.zero_grad()
        backward(plain, rollout, config)
        found.append({n: w.grad.clone() for n, w in plain.net.named_parameters() if w.grad is not None})
        again = rolled(plain)
        assert torch.equal(again.images.tokens_BN, rollout.images.tokens_BN)
        assert torch.equal(again.answers.tokens_QT, rollout.answers.tokens_QT)
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)


def test_kinds_of_reference(plain):
    rollout, config = rolled(plain), LossConfig(num_scored_steps=0)
    scored = {}
    for kind in ("copy", "cpu", "bf16"):
        run = RunConfig(model=ModelConfig(weights=""), train=TrainConfig(reference=kind))
        own = copy.deepcopy(plain)
        set_up(own, run)
        scored[kind] = gather_experience(own, rollout, UPS, UPS, config, temperature=1.0).reference_images[0]
    assert torch.equal(scored["cpu"], scored["copy"])
    torch.testing.assert_close(scored["bf16"].float(), scored["copy"], rtol=0, atol=0.1)
    assert not torch.equal(scored["bf16"], scored["copy"])


@pytest.mark.parametrize(
    "change, told",
    [
        ({"lora": LoraConfig(targets=("q_proj",))}, "give a rank"),
        ({"lora": LoraConfig(rank=-1)}, r"--lora\.rank is -1"),
        ({"lora": LoraConfig(rank=4, alpha=0)}, r"--lora\.alpha is 0"),
        ({"lora": LORA, "train": TrainConfig(reference="cpu", report_to=())}, "no copy of the base"),
    ],
)
def test_what_does_nothing_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        check(RunConfig(model=ModelConfig(weights="x"), **change))


def test_a_run_with_adapters_resumes_bit_for_bit(tmp_path):
    build("tiny-showo", shapes.vocabulary(), seed=9).save(tmp_path / "model")
    config = RunConfig(
        model=ModelConfig(weights=str(tmp_path / "model")),
        lora=LORA,
        rollout=replace(ROLLOUT, num_prompts=1),
        reward=RewardConfig(kind="probability"),
        loss=LossConfig(beta=0.1),
        optim=OptimConfig(lr=1e-2, decay=0.0),
        train=TrainConfig(max_steps=2, save_steps=1, gradient_checkpointing=True, report_to=()),
        eval=EvalConfig(num_prompts=0),
    )
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    parts = replace(config, output_dir=str(tmp_path / "parts"))
    train(replace(parts, train=replace(config.train, max_steps=1)))
    train(parts, resume=True)
    found = [
        load_file(run / "checkpoints/step-000002/adapter/adapter_model.safetensors")
        for run in (whole, tmp_path / "parts")
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(value.abs().sum() > 0 for name, value in found[0].items() if "lora_B" in name)
