"""What several test files start from."""

import pytest
import torch
from torch import nn

from openunirl.config import RolloutConfig
from openunirl.models.tiny import build
from openunirl.rollout import roll_out
from openunirl.tasks import shapes
from openunirl.types import ImageSampling

DOUBLED = RolloutConfig(
    num_prompts=2, num_generations=2, num_questions=2, max_new_tokens=3,
    sampling=ImageSampling(num_timesteps=3, guidance_scale=2.0, temperature=0.8),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """A fresh tiny model beside its frozen base."""
    model = build("tiny-showo", shapes.vocabulary(), seed=5)
    model.freeze_reference()
    return model


@pytest.fixture(scope="module", params=["tiny-showo", "tiny-janus"])
def doubled(request):
    """(model, rollout): a fresh tiny model in double precision, drawn in single, whose policy has left its base."""
    model = build(request.param, shapes.vocabulary(), seed=5)
    rollout = roll_out(model, shapes.prompts("train", 2, 0), DOUBLED, seed=1, step=1)
    for part in (model.net, model.image_tokenizer):
        nn.Module.to(part, torch.float64)
    for module in model.net.modules():  # the eager kernel takes its softmax in float32
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = "sdpa"
    if hasattr(model.net, "attn_implementation"):
        model.net.attn_implementation = "sdpa"
    model.freeze_reference()
    with torch.no_grad():  # the policy has left the base
        for name, weight in model.net.named_parameters():
            if weight.ndim == 2 and "vision" not in name:
                weight.mul_(1.3)
    return model, rollout
