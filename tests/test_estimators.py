"""benchmarks/estimators.py: what its table measures is what training computes."""

import pytest
import torch

from estimators import estimators, scored
from openunirl.config import RolloutConfig
from openunirl.draws import key
from openunirl.models.masked import RANDOM_MASKS
from openunirl.rollout import roll_out
from openunirl.tasks import shapes
from openunirl.types import ImageSampling


@pytest.fixture(scope="module")
def rollout(model):
    sampling = ImageSampling(num_timesteps=2, guidance_scale=2.0)
    config = RolloutConfig(num_prompts=1, num_generations=2, sampling=sampling, max_new_tokens=1)
    return roll_out(model, shapes.prompts("train", 1, 0), config, seed=1, step=1)


def test_every_estimator_of_the_configuration_is_in_the_table():
    kinds = estimators(16).values()
    assert {kind.name for kind in kinds} == {"trajectory", "full_mask", *RANDOM_MASKS}
    assert {kind.mask_time for kind in kinds if kind.name == "training_loss"} == {1.0, 0.5}


@pytest.mark.parametrize("name", ["remask, 4 draws", "training_loss, 4 draws", "training_loss to time 0.5, 4 draws"])
def test_random_masks_are_averaged(model, rollout, name):
    """Of the log-prob, and of the gradient: that of one draw's size, whatever the number of draws."""
    kind, credit_CB, images = estimators(2)[name], torch.ones(1, 2), rollout.images
    found = scored(model, rollout, credit_CB, kind, 0, guided=True)
    want_B, loss = torch.zeros(2), torch.zeros(())
    for one in model.scoring_passes(images, kind, key(rollout.scoring_seeds_B, 100)):
        part_B = (model.score_images(images, one).logprobs_BN * one.weight_BN).sum(1) / 4
        want_B, loss = want_B + part_B.detach(), loss + part_B.mean()
    torch.testing.assert_close(found.logprob_B, want_B)
    parameters = [p for p in model.net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    want = torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, gradients, strict=True)]
    )
    torch.testing.assert_close(found.gradients[0], want, atol=1e-4 * float(want.abs().max()), rtol=0)
