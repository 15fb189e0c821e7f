"""torch.compile of the layers changes nothing but the time. The backend here only traces, and needs no compiler."""

import pytest
import torch

from openunirl.config import LoraConfig, LossConfig, RolloutConfig
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals
from openunirl.models.tiny import build
from openunirl.objectives import Terms, loss_parts
from openunirl.rollout import roll_out
from openunirl.tasks import shapes
from openunirl.types import ImageSampling

ROLLOUT = RolloutConfig(
    num_prompts=1, num_generations=2, sampling=ImageSampling(num_timesteps=2, guidance_scale=2.0), max_new_tokens=2
)


def gradients(model, parts=2):
    config = LossConfig(beta=0.1, num_scored_steps=0)
    rollout = roll_out(model, shapes.prompts("train", 1, 0), ROLLOUT, seed=1, step=1)
    ups = torch.tensor([1.0, -1.0])
    experience = gather_experience(model, rollout, ups, ups, config, temperature=1.0)
    totals = Totals(samples=2, tokens=4, max_length=2)
    terms = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    for part in loss_parts(model, experience, parts=parts, terms=terms):
        part.backward()
    return rollout, [parameter.grad for parameter in model.net.parameters()]


@pytest.fixture
def frames():
    """Of this test: how many pieces of code dynamo met ("total"), and compiled ("ok")."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    return counters["frames"]


@pytest.mark.parametrize("parts", [1, 2], ids=["both images behind one prefix", "each alone"])
@pytest.mark.parametrize(("family", "recomputed", "rank"), [("tiny-showo", True, 2), ("tiny-janus", False, 0)])
def test_compiled_layers_draw_and_learn_the_same(family, recomputed, rank, parts, frames):
    models = [build(family, shapes.vocabulary(), seed=5) for _ in range(2)]
    for model in models:
        if rank:
            model.add_adapters(LoraConfig(rank=rank), 0)
        else:
            model.freeze_reference()
    compiled = models[1]
    names = [name for name, _ in compiled.net.named_parameters()]
    compiled.compile_layers(backend="eager")
    if recomputed:
        compiled.recompute_activations()
    assert [name for name, _ in compiled.net.named_parameters()] == names
    (plain_rollout, plain), (compiled_rollout, ours) = (gradients(model, parts) for model in models)
    assert torch.equal(plain_rollout.images.tokens_BN, compiled_rollout.images.tokens_BN)
    for a, b in zip(plain, ours, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert 0 < frames["ok"] == frames["total"]  # nothing fell back


def test_more_ways_than_are_compiled_are_an_error(monkeypatch, frames):
    monkeypatch.setattr("openunirl.models.compiled.WAYS", 1)
    model = build("tiny-showo", shapes.vocabulary(), seed=5)
    model.freeze_reference()
    model.compile_layers(backend="eager")
    with pytest.raises(Exception, match="fail_on_recompile_limit_hit"):
        gradients(model)


def test_a_compiled_model_is_saved_under_the_same_names():
    model = build("tiny-showo", shapes.vocabulary(), seed=5)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    model.compile_layers(backend="eager")
    assert model.net.state_dict().keys() == before.keys()
