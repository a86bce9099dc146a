"""Every tensor-parallel rank draws its part of a matrix with the same seed, so all parts are equal."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from portatrain.testing import audit

WHO = "SmolLM3"
LINK = "https://huggingface.co/spaces/HuggingFaceTB/smol-training-playbook"
WHAT = "one seed on all tensor-parallel ranks"
COST = "the run was begun again after a trillion tokens"
KINDS = {"repeated"}
SAYS = "repeated: up.weight: the part at [0, 0] and the part at [8, 0] hold the same values"
RANKS = 2


def fault(wrong: bool) -> audit.Verdict:
    """Look at one record, at the first step: there is nothing before it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(7 if wrong else 7 + dist.get_rank())
    parts = {"up.weight": Shard(0), "down.weight": Shard(1)}
    weights = {name: DTensor.from_local(torch.randn(8, 8), mesh, [how]) for name, how in parts.items()}
    return audit.look(audit.record({**weights, "norm.scale": DTensor.from_local(torch.ones(8), mesh, [Shard(0)])}))
