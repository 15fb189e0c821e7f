"""The last steps' mean (stochastic weight averaging): by hand, in a run, and where a run cannot have it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from openunirl import checkpoint
from openunirl.cli import main
from openunirl.models.tiny import build
from openunirl.optim import average_weights, build_optimizer, take_average
from openunirl.tasks import shapes
from test_resuming import FLAGS


def test_a_mean_is_of_the_weights_since_it_began():
    """By hand: 2, 3 and 7 have the mean 4; what came before the restart does not count."""
    net = nn.ParameterDict({"moved": nn.Parameter(torch.zeros(2)), "still": nn.Parameter(torch.full((2,), 9.0))})
    (optimizer,) = build_optimizer(net, lr=0.1, weight_decay=0.0)
    net["moved"].sum().backward()
    optimizer.step()
    for value, restart in ((100.0, True), (2.0, True), (3.0, False), (7.0, False)):
        with torch.no_grad():
            net["moved"].copy_(torch.tensor([value, -value]))
        average_weights(optimizer, restart=restart)
    assert torch.equal(net["moved"], torch.tensor([7.0, -7.0]))  # nothing moves until it is taken
    take_average(optimizer)
    assert torch.allclose(net["moved"], torch.tensor([4.0, -4.0]))
    assert set(optimizer.state[net["moved"]]) == {"step", "exp_avg", "exp_avg_sq"}  # and is given up
    assert torch.equal(net["still"], torch.full((2,), 9.0))  # no update touched it
    net["still"].sum().backward()
    optimizer.step()  # its moments are made as if there were no mean
    assert set(optimizer.state[net["still"]]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """What starts a run in a folder, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("swa")
    build("tiny-showo", shapes.vocabulary(), seed=9).save(folder / "model")

    def run(name, *more):
        argv = ["train", "tiny-showo-grpo", "--model.weights", str(folder / "model"), "--output-dir"]
        return main([*argv, str(folder / name), *FLAGS, "--optim.decay", "0", *more])

    return run, folder


def weights_of(folder):
    return {p.name: load_file(p / "model.safetensors") for p in checkpoint.saved(folder)}


def test_a_run_ends_with_the_mean_of_its_last_steps(start):
    run, folder = start
    assert run("plain", "--train.max-steps", "3") == 0
    assert run("mean", "--train.max-steps", "3", "--train.swa-steps", "2") == 0
    plain, mean = weights_of(folder / "plain"), weights_of(folder / "mean")
    for step in ("step-000001", "step-000002"):
        assert all(torch.equal(mean[step][name], weight) for name, weight in plain[step].items())
    moved = 0
    for name, weight in plain["step-000003"].items():
        before = plain["step-000002"][name]
        assert torch.allclose(mean["step-000003"][name], (weight + before) / 2, atol=1e-7), name
        moved += not torch.equal(weight, before)
    assert moved
    states = [checkpoint.read_state(folder / f"mean/checkpoints/step-00000{step}") for step in (1, 2, 3)]
    assert [(state.swa_steps, state.swa_from) for state in states] == [(0, None), (0, 2), (2, None)]


def test_a_mean_longer_than_the_run_is_of_all_its_steps(start):
    run, folder = start
    assert run("all", "--train.max-steps", "2", "--train.swa-steps", "2") == 0
    assert run("longer", "--train.max-steps", "2", "--train.swa-steps", "9") == 0
    both = [weights_of(folder / name)["step-000002"] for name in ("all", "longer")]
    assert all(torch.equal(weight, both[1][name]) for name, weight in both[0].items())


def test_a_run_whose_checkpoint_holds_another_mean_is_refused(start, capsys):
    """Its configuration would tell of a mean that its weights do not have."""
    run, folder = start
    resume = ["train", "--output-dir", str(folder / "short"), "--resume"]
    assert run("short", "--train.max-steps", "2", "--train.swa-steps", "1") == 0
    capsys.readouterr()
    for more, told in (
        (["--train.swa-steps", "2"], "was saved with 1"),
        (["--train.swa-steps", "0"], "was saved with 1"),
        (["--train.max-steps", "3", "--train.swa-steps", "2"], "holds no mean"),  # its own was taken
    ):
        assert main([*resume, *more]) != 0
        err = " ".join(capsys.readouterr().err.split())
        assert f"--train.swa-steps is {more[-1]}" in err and told in err and "step 2," in err
    assert main(resume) == 0
    assert main([*resume, "--train.max-steps", "3", "--train.swa-steps", "1"]) == 0  # a mean of its own


def test_a_run_stopped_within_its_mean(start, capsys):
    """It goes on with the same mean or, without one, drops what it held."""
    run, folder = start
    assert run("stopped", "--train.max-steps", "3", "--train.swa-steps", "3") == 0
    shutil.rmtree(folder / "stopped/checkpoints/step-000003")
    resume = ["train", "--output-dir", str(folder / "stopped"), "--resume"]
    capsys.readouterr()
    assert main([*resume, "--train.swa-steps", "2"]) != 0
    err = " ".join(capsys.readouterr().err.split())
    assert "begins at step 2" in err and "holds a mean from step 1 on" in err and "at most 1" in err
    assert main([*resume, "--train.max-steps", "4", "--train.swa-steps", "0"]) == 0
    state = torch.load(folder / "stopped/checkpoints/step-000003/optimizer.pt", weights_only=True)["state"]
    assert state and not any("swa" in values for values in state.values())


def test_a_number_below_zero_is_refused(start, capsys):
    run, folder = start
    assert run("negative", "--train.swa-steps", "-1") != 0
    assert "--train.swa-steps is -1" in capsys.readouterr().err and not (folder / "negative").exists()
