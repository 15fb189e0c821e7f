"""A plan's numbers by hand, its advice, and that it needs no weights and no network."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from openunirl import rehearsal
from openunirl.cli import DOES_NOT_FIT, main
from openunirl.config import (
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PhotosConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from openunirl.models.blank import SIZES, blank_model
from openunirl.phases import ANSWERING, DRAWING, EVALUATING, OPTIMIZER, SCORING, UPDATE, Cost, Rates, Rehearsal
from openunirl.plan import RESERVE, Machine, changes, parse_memory, plan, share
from openunirl.presets import PRESETS
from openunirl.rehearsal import rehearse
from openunirl.run_world import evaluates, loads_detector

RATES = Rates(madds=1e12, bytes=1e11)
MACHINE = Machine(gpus=1, memory=24 * 10**9, tflops=100.0, bandwidth=1.0, utilization=0.5)
GB = 10**9
FOUND = Rehearsal(
    parameters=GB, trained=GB, weights=4 * GB, tokenizer=GB, base=4 * GB, gradients=4 * GB, optimizer=8 * GB,
    largest=GB // 10, loose=GB // 5,
    phases={name: Cost(beside=2 * GB, madds=1, seconds=1) for name in (DRAWING, ANSWERING, SCORING, UPDATE, OPTIMIZER)},
)  # fmt: skip
SMALL = RolloutConfig(num_prompts=2, num_generations=2, max_new_tokens=5)


def small(name="tiny-showo-grpo", **parts):
    preset = PRESETS[name]
    sampling = replace(preset.rollout.sampling, num_timesteps=4)
    return replace(preset, rollout=replace(SMALL, sampling=sampling), **parts)


def shallow(source):
    """One layer of each decoder and tower: as fast as a rehearsal can be."""
    model = blank_model(source)
    for module in model.net.modules():
        if isinstance(module, nn.ModuleDict) or not hasattr(module, "layers"):
            continue
        if isinstance(module.layers, nn.ModuleList):
            module.layers = module.layers[:1]
    return model


@pytest.fixture
def offline(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a plan needs no network")

    monkeypatch.setattr("openunirl.models.checkpoints.snapshot_download", forbidden)
    monkeypatch.setattr("socket.socket.connect", forbidden)


@pytest.mark.parametrize("name", list(SIZES))
def test_published_models_have_their_published_sizes(name, offline):
    model = blank_model(ModelConfig(weights=name))
    assert {p.device.type for p in model.net.parameters()} == {"meta"}
    count = sum(p.numel() for p in model.net.parameters()) / 1e9
    wanted = {"showlab/show-o": 1.448, "showlab/show-o-512x512": 1.448, "deepseek-ai/Janus-Pro-7B": 7.336}
    assert count == pytest.approx(wanted.get(name, 2.005), abs=1e-3)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(rehearsal, "blank_model", shallow)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_rehearsed_without_weights_and_network(name, offline):
    config = PRESETS[name]
    few = replace(config.rollout, num_prompts=1, num_generations=2, max_new_tokens=4)
    found = rehearse(replace(config, rollout=few, optim=replace(config.optim, gradient_accumulation_steps=2)), RATES)
    assert set(found.phases) == {DRAWING, ANSWERING, SCORING, UPDATE, OPTIMIZER, EVALUATING}
    assert found.phases[EVALUATING].beside > found.phases[ANSWERING].beside  # of more images
    assert found.phases[EVALUATING].madds > found.phases[DRAWING].madds
    assert found.detector == (rehearsal.DETECTOR if config.world == "geneval" else 0)
    assert found.optimizer == pytest.approx(2 * found.gradients, rel=0.35)  # two moments of all that is trained
    assert found.phases[DRAWING].madds > 0 and found.phases[UPDATE].madds > 0 and found.phases[UPDATE].beside > 0


def test_loops_that_are_left_early_cost_what_whole_ones_do(monkeypatch):
    """Counts exactly, bytes within 2 %: `_TAKEN` passes continued, and all of them taken."""
    left = rehearse(small(), RATES)
    monkeypatch.setattr(rehearsal, "_TAKEN", 99)
    whole = rehearse(small(), RATES)
    for name in (DRAWING, ANSWERING):
        assert left.phases[name].madds == pytest.approx(whole.phases[name].madds, rel=1e-3)
        assert left.phases[name].beside == pytest.approx(whole.phases[name].beside, rel=0.02)


def test_adapters_are_all_that_is_trained():
    full, lora = rehearse(small(), RATES), rehearse(small(lora=LoraConfig(rank=4)), RATES)
    assert lora.base == 0 and lora.trained < full.trained / 4
    assert lora.gradients == lora.trained * 4
    assert lora.optimizer == pytest.approx(2 * lora.gradients, rel=0.05)


def test_a_mean_of_weights_is_held_too():
    plain, mean = rehearse(small(), RATES), rehearse(small(train=TrainConfig(swa_steps=2)), RATES)
    assert mean.optimizer - plain.optimizer == pytest.approx(plain.gradients, rel=0.05)


def test_a_base_on_the_cpu_visits_while_it_scores():
    config = small()
    copy = rehearse(config, RATES)
    cpu = rehearse(replace(config, train=replace(config.train, reference="cpu")), RATES)
    assert cpu.base == 0
    assert cpu.held(SCORING) + cpu.phases[SCORING].beside == copy.held(SCORING) + copy.phases[SCORING].beside
    assert copy.held(UPDATE) - cpu.held(UPDATE) == copy.base


def test_smaller_parts_take_less_and_count_the_same():
    config = small()
    one = rehearse(config, RATES).phases[UPDATE]
    four = rehearse(replace(config, optim=OptimConfig(gradient_accumulation_steps=4)), RATES).phases[UPDATE]
    assert four.beside < 0.5 * one.beside
    assert four.madds == pytest.approx(one.madds, rel=0.3)  # how many tokens a part scores is drawn


def test_one_gpu_holds_all():
    own = share(FOUND, 1, False)
    assert own.peaks[UPDATE] == (4 + 1 + 4 + 8 + 4 + 2) * GB
    assert own.peaks[DRAWING] == (4 + 1 + 4 + 8 + 2) * GB
    assert own.peak == own.peaks[UPDATE] + RESERVE


def test_every_gpu_holds_a_detector_where_a_run_loads_one():
    found = replace(FOUND, detector=2 * GB, phases={**FOUND.phases, EVALUATING: FOUND.phases[DRAWING]})
    for gpus, sharded in ((1, False), (4, True)):
        own, without = share(found, gpus, sharded), share(FOUND, gpus, sharded)
        assert own.rows["detector"] == 2 * GB and own.peaks[UPDATE] == without.peaks[UPDATE] + 2 * GB
        assert own.peaks[EVALUATING] == own.peaks[DRAWING]
    geneval, never = PRESETS["showo-512-grpo"], EvalConfig(num_prompts=0)
    alone = replace(geneval, eval=never, train=TrainConfig(eval_steps=0))
    blind = replace(geneval, photos=PhotosConfig(detector_weights=None))
    rewarded = replace(alone, reward=RewardConfig(sources=("self", "detector")))
    assert [loads_detector(c) for c in (geneval, alone, blind, rewarded)] == [True, False, False, True]
    assert [evaluates(c) for c in (geneval, alone, blind, rewarded)] == [True, False, False, False]
    assert evaluates(PRESETS["tiny-showo-grpo"]) and not loads_detector(PRESETS["tiny-showo-grpo"])


def test_a_frozen_judge_that_rests_elsewhere_visits_while_it_answers():
    config = small()
    judged = replace(config, reward=RewardConfig(sources=("frozen",)))
    probable = replace(config, reward=RewardConfig(sources=("frozen",), kind="probability"))
    beside = [rehearsal._visiting(FOUND, c).phases[ANSWERING].beside for c in (config, judged, probable)]
    assert beside == [2 * GB, 6 * GB, 2 * GB]


def test_several_gpus_hold_copies_or_shares():
    assert share(FOUND, 4, False) == share(FOUND, 1, False)
    sharded = share(FOUND, 4, True)
    assert sharded.peaks[UPDATE] == (1 + 1 + 1 + 2 + 1 + 2) * GB + GB // 2  # 3 layers and what lies loose
    assert sharded.peaks[DRAWING] == (1 + 1 + 1 + 2 + 2 + 4) * GB  # whole weights while it draws
    assert sharded.peaks[OPTIMIZER] == (1 + 1 + 1 + 2 + 1) * GB + GB // 2


@pytest.mark.parametrize(
    ("text", "wanted"), [("24GB", 24 * 10**9), ("1.5 gib", 3 * 2**29), ("800MB", 8 * 10**8), ("2TB", 2 * 10**12)]
)
def test_memory_is_read_in_its_unit(text, wanted):
    assert parse_memory(text) == wanted


def test_a_gpu_that_is_too_small_gets_computed_advice():
    told = []
    assert plan(small(), replace(MACHINE, gpus=2, memory=RESERVE), told.append) is False
    advice = told[told.index("what to change, and the peak on each GPU that it would give") + 1 :]
    for flags in ("--train.gradient-checkpointing", "--optim.gradient-accumulation-steps 4", "--lora.rank 16"):
        assert any(line.strip().startswith(f"{flags}: 1.") and line.endswith("GB") for line in advice), flags
    assert any("--train.shard: " in line for line in advice)
    assert len(advice[-1].split("--")) > 3  # nothing fits alone, so all that goes together


def test_a_change_that_fits_alone_is_not_told_with_others():
    config, told = small(), []
    held = share(rehearse(config, MACHINE.rates), 1, False).peak
    assert plan(config, replace(MACHINE, memory=held - 1), told.append) is False
    assert any(line.endswith("which fits") for line in told)
    assert all(line.count("--") == 1 for line in told if line.startswith("  --"))


def test_an_evaluation_that_sets_the_peak_gets_advice():
    config = PRESETS["tiny-showo-sft"]
    config = replace(config, eval=replace(config.eval, batch_size=4096, num_prompts=4096))
    smaller = {change.flags: change.apply(config) for change in changes(config, gpus=1)}["--eval.batch-size 1"]
    whole, parts = (rehearse(one, MACHINE.rates).phases[EVALUATING].beside for one in (config, smaller))
    assert parts < whole / 100
    without = replace(config, eval=replace(config.eval, num_prompts=0), train=replace(config.train, eval_steps=0))
    assert all("eval" not in change.flags for change in changes(without, gpus=1))


def test_what_is_on_already_is_not_advised():
    config = PRESETS["showo-512-grpo"]
    config = replace(config, train=replace(config.train, gradient_checkpointing=True), lora=LoraConfig(rank=8))
    flags = " ".join(change.flags for change in changes(config, gpus=1))
    for absent in ("checkpointing", "accumulation", "bf16", "lora", "reference", "shard"):
        assert absent not in flags


def test_the_command_says_what_fits_and_what_does_not(capsys, monkeypatch):
    few = {"num-prompts": 1, "num-generations": 2, "sampling.num-timesteps": 2, "num-questions": 1, "max-new-tokens": 2}
    assert main(["plan", "tiny-showo-grpo", *(f"--rollout.{name}={value}" for name, value in few.items())]) == 0
    assert "fits 24.00 GB" in capsys.readouterr().out
    monkeypatch.setattr("openunirl.plan.plan", lambda *_: False)
    assert main(["plan", "tiny-showo-grpo"]) == DOES_NOT_FIT


@pytest.mark.parametrize(
    ("flags", "rate"),
    [(["--train.mixed-precision", "no"], 19.5), (["--train.mixed-precision", "bf16"], 312.0), (["--tflops", "7"], 7.0)],
)
def test_a_gpu_computes_at_the_rate_of_the_precision(monkeypatch, flags, rate):
    told = []
    monkeypatch.setattr("openunirl.plan.plan", lambda config, machine: told.append(machine.tflops) or True)
    assert main(["plan", "tiny-showo-grpo", *flags]) == 0 and told == [rate]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["tiny-showo-grop"], "did you mean tiny-showo-grpo"),
        (
            ["tiny-showo-grpo", "--memory", "lots"],
            "in MB, GB, MiB or GiB, such as 24GB, not 'lots'",
        ),
        (["tiny-showo-grpo", "--memory", "0GB"], "--memory wants a size above 0"),
        (["tiny-showo-grpo", "--gpus", "0"], "--gpus is 0, wanted at least 1"),
        (["tiny-showo-grpo", "--utilization", "2"], "--utilization is 2.0, wanted above 0 and at most 1"),
        ([], "openunirl plan wants a PRESET"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_sentence(capsys, flags, wanted):
    assert main(["plan", *flags]) == 2
    told = capsys.readouterr().err
    assert wanted in told and len(told.splitlines()) == 1


def test_a_model_of_unknown_sizes_is_refused(capsys):
    assert main(["plan", "showo-512-grpo", "--model.weights", "someone/else"]) == 1
    assert "the sizes of someone/else are not known" in capsys.readouterr().err


def test_a_folder_is_read_for_its_shapes_only(tmp_path):
    from openunirl.models.tiny import build
    from openunirl.tasks import shapes

    build("tiny-janus", shapes.vocabulary(), seed=0).save(tmp_path / "model")
    model = blank_model(ModelConfig(weights=str(tmp_path / "model")))
    assert {p.device for p in model.net.parameters()} == {torch.device("meta")}
    found = rehearse(small(model=ModelConfig(weights=str(tmp_path / "model"))), RATES)
    assert 0 < found.weights < 4 * sum(p.numel() for p in model.net.parameters())  # one layer of several
