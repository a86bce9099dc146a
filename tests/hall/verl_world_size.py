"""The loss is summed over ranks without gradients and divided by all tokens; then FSDP averages the gradients too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from portatrain.testing import audit
from tests.support.audited import Torch, rows

WHO = "verl-SpeCo"
LINK = "https://github.com/verl-project/verl-SpeCo/pull/29"
WHAT = "gradients are divided by the number of ranks, so a run on W ranks trains with the learning rate / W"
COST = "silent: results depend on the number of ranks, and clipping hides it early in a run"
KINDS = {"gradients"}
SAYS = "all are 1/2 times what they were"
RANKS = 2


def loss_of(model: Any, x: Any) -> Any:
    return model(x).square().sum()


def fault(wrong: bool) -> audit.Verdict:
    trainer = Torch(seed=0)
    x, world, rank = torch.from_numpy(rows(0)), dist.get_world_size(), dist.get_rank()
    loss = loss_of(trainer.model, x) / len(x)
    loss.backward()
    before = audit.record(trainer.model, loss=loss, gradients=True)
    trainer.model.zero_grad()
    fully_shard(trainer.model, mesh=init_device_mesh("cpu", (world,)))
    mine = loss_of(trainer.model, x.chunk(world)[rank])
    total = mine.detach().clone()
    dist.all_reduce(total)
    scale = 1 if wrong else world
    (mine * scale / len(x)).backward()
    return audit.check(before, trainer.model, loss=total / len(x), gradients=True)
