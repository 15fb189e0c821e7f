"""The last step's blend with the base (WiSE-FT): weight by weight, with adapters, and in a run."""

import pytest
import torch
from safetensors.torch import load_file

from openunirl import checkpoint
from openunirl.cli import main
from openunirl.config import LoraConfig
from openunirl.models.lora import adapted, merged_state
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from test_resuming import FLAGS

FAMILIES = ["tiny-showo", "tiny-janus"]


def shifted(weights):
    """Weights as training leaves them: elsewhere."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in weights:
            weight.add_(torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blend_lies_between_the_base_and_the_policy(family):
    base, model = (build(family, shapes.vocabulary(), seed=5) for _ in range(2))
    model.freeze_reference()
    shifted(p for p in model.net.parameters() if p.requires_grad)
    trained = [p.detach().clone() for p in model.net.parameters()]
    model.blend_with_base(0.25, lambda: base)
    for weight, went, began in zip(model.net.parameters(), trained, base.net.parameters(), strict=True):
        assert torch.allclose(weight, 0.75 * began + 0.25 * went, atol=1e-6)
        assert not torch.equal(weight, went) or torch.equal(began, went)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_become_a_share_of_themselves(family):
    base, model = (build(family, shapes.vocabulary(), seed=5) for _ in range(2))
    model.add_adapters(LoraConfig(rank=2), seed=0)
    shifted(layer.lora_B["default"].weight for layer in adapted(model.net).values())
    trained, began = merged_state(model.net), base.net.state_dict()
    model.blend_with_base(0.25, lambda: pytest.fail("adapters need no second copy of the base"))
    moved = 0
    for name, weight in merged_state(model.net).items():
        assert torch.allclose(weight, 0.75 * began[name] + 0.25 * trained[name], atol=1e-5), name
        moved += not torch.equal(weight, began[name])
    assert moved >= len(adapted(model.net))


def test_a_run_ends_with_the_blend_and_goes_on_from_it(tmp_path):
    weights = tmp_path / "model"
    build("tiny-showo", shapes.vocabulary(), seed=9).save(weights)
    base = load_file(weights / "model.safetensors")

    def run(name, *more):
        argv = ["train", "tiny-showo-grpo", "--model.weights", str(weights), "--output-dir", str(tmp_path / name)]
        assert main([*argv, *FLAGS, "--optim.decay", "0", *more]) == 0
        return {p.name: load_file(p / "model.safetensors") for p in checkpoint.saved(tmp_path / name)}

    two = ("--train.max-steps", "2")
    plain, half = run("plain", *two), run("half", *two, "--train.wise-ft-alpha", "0.5")
    assert all(torch.equal(half["step-000001"][name], weight) for name, weight in plain["step-000001"].items())
    for name, weight in plain["step-000002"].items():
        assert torch.allclose(half["step-000002"][name], (weight + base[name]) / 2, atol=1e-7), name
    assert main(["train", "--output-dir", str(tmp_path / "half"), "--resume", "--train.max-steps", "3"]) == 0
    assert checkpoint.latest(tmp_path / "half").name == "step-000003"


def test_a_base_that_followed_is_not_what_is_blended_with():
    base, model = (build("tiny-showo", shapes.vocabulary(), seed=5) for _ in range(2))
    model.freeze_reference()
    shifted(model.net.parameters())
    model.sync_reference()
    shifted(model.net.parameters())
    trained = [p.detach().clone() for p in model.net.parameters()]
    model.blend_with_base(0.5, lambda: base)
    for weight, went, began in zip(model.net.parameters(), trained, base.net.parameters(), strict=True):
        assert torch.allclose(weight, (began + went) / 2, atol=1e-6)


def test_a_run_without_a_step_left_cannot_be_blended(tmp_path, capsys):
    """Its configuration would tell of a blend that its weights do not have."""
    weights, folder = tmp_path / "model", tmp_path / "run"
    build("tiny-showo", shapes.vocabulary(), seed=9).save(weights)
    argv = ["train", "tiny-showo-grpo", "--model.weights", str(weights), "--output-dir", str(folder), *FLAGS]
    assert main([*argv, "--train.max-steps", "1"]) == 0
    resume = ["train", "--output-dir", str(folder), "--resume", "--train.wise-ft-alpha", "0.5"]
    assert main(resume) != 0
    told = " ".join(capsys.readouterr().err.split())
    assert "--train.wise-ft-alpha is 0.5" in told and "--train.max-steps more than 1" in told
    assert main([*resume, "--train.max-steps", "2"]) == 0
    assert main(["train", "--output-dir", str(folder), "--resume"]) == 0


@pytest.mark.parametrize("alpha", ["0", "1.5", "nan"])
def test_an_alpha_that_cannot_be_is_refused(alpha, tmp_path, capsys):
    argv = ["train", "tiny-showo-sft", "--output-dir", str(tmp_path / "run"), "--train.wise-ft-alpha", alpha]
    assert main(argv) != 0
    assert "--train.wise-ft-alpha is" in capsys.readouterr().err and not (tmp_path / "run").exists()
