"""One of two processes of test_sharded.py: `python sharded_worker.py RANK COUNT STORE OUT FAMILY:MODE ...`.

Writes the gradient of one update of each case, whole, and what was drawn. With COUNT 1 it holds the whole batch. MODE:
"sharded" (FSDP2), "recomputed" (the same, with gradient checkpointing), "adapters" (the same, with LoRA), "unequal"
(the same, each process scores another number of tokens) or "copies" (whole networks).
"""

import sys
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from openunirl.config import LoraConfig, LossConfig, RolloutConfig
from openunirl.distributed import Processes
from openunirl.experience import gather_experience
from openunirl.losses import Stats, Totals
from openunirl.models import chunked, sharded
from openunirl.models.tiny import build
from openunirl.objectives import Terms, loss_parts
from openunirl.rollout import roll_out
from openunirl.tasks import shapes
from openunirl.types import ImageSampling

ROLLOUT = RolloutConfig(
    num_prompts=1, num_generations=2, sampling=ImageSampling(num_timesteps=2, guidance_scale=2.0), max_new_tokens=6
)
CONFIG = LossConfig(end_to_end=True, beta=0.1, num_scored_steps=0)


def main(rank: int, count: int, store: str, out: str, cases: list[str]) -> None:
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, count), rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    chunked.LARGEST = 2**14  # several chunks a pass
    for case in cases:
        family, mode = case.split(":")
        torch.save(update(family, mode, rank, count), f"{out}/{family}-{mode}-{count}-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def update(family: str, mode: str, rank: int, count: int) -> dict[str, Any]:
    """The gradient, the blended weights and what was drawn."""
    model = build(family, shapes.vocabulary(), seed=5)
    config = replace(CONFIG, estimator="remask") if mode == "unequal" else CONFIG
    if mode == "adapters":
        model.add_adapters(LoraConfig(rank=2), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.net.named_parameters():
                if ".lora_B" in name:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    else:
        model.freeze_reference()
    if mode == "recomputed":
        model.recompute_activations()
    if count > 1 and mode != "copies":
        for net in (model.net, model.reference_net):
            if net is not None:
                sharded.shard(net, model.trunk)
        apart = [name for name, m in model.net.named_modules() if isinstance(m, FSDPModule)]
        assert any("embed" in n for n in apart) and "" in apart, apart
        assert any(n.endswith("lm_head") for n in apart) and len(apart) >= 8, apart
    own = 2 // count
    prompts = shapes.prompts("train", 2, 0)[rank * own : (rank + 1) * own]
    rollout = roll_out(model, prompts, ROLLOUT, seed=1, step=1, first_prompt=rank * own)
    ups = torch.tensor([1.0, -1.0, 0.5, -0.5])[rank * 2 * own : (rank + 1) * 2 * own]
    totals = Totals(samples=4 / count, tokens=256 / count, max_length=6)
    terms = Terms(config=config, image_totals=totals, answer_totals=totals, temperature=1.0, stats=Stats())
    scored = 0
    for _ in range(2):  # twice: the second step meets what the first one left
        model.net.zero_grad()
        experience = gather_experience(model, rollout, ups, ups, config, temperature=1.0)
        scored = sum(int(one.scored_BN.sum()) for one in experience.passes)
        with Processes.averaging(model.net):
            for part in loss_parts(model, experience, parts=1, terms=terms):
                part.backward()
        again = roll_out(model, prompts, ROLLOUT, seed=1, step=1, first_prompt=rank * own)
        assert torch.equal(again.images.tokens_BN, rollout.images.tokens_BN)
    found = {n: sharded.whole(p.grad) for n, p in model.net.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for weight in model.net.parameters():
            weight.add_(0.01)
    model.blend_with_base(0.5, lambda: build(family, shapes.vocabulary(), seed=5))
    blended = {n: sharded.whole(p.detach()) for n, p in model.net.named_parameters()}
    told = {"tokens": rollout.images.tokens_BN, "texts": list(rollout.answers.texts), "grads": found}
    told |= {"chunks": -(-scored // (chunked.LARGEST // (2 * model.num_codes)))}
    return told | {"blended": blended}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
