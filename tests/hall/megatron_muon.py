"""Every rank holds the float32 weights of some matrices. After a load each rank copies its own into the model, and the
exchange that gives them to the other ranks runs over an empty list."""

from __future__ import annotations

import torch
import torch.distributed as dist

from portatrain.testing import audit
from tests.support.audited import Torch

WHO = "Megatron-LM, Muon with the distributed optimizer"
LINK = "https://github.com/NVIDIA/Megatron-LM/pull/6920"
WHAT = "a resumed run silently goes on from a different model"
COST = "no error, and the loss curve looks normal; every resume under these options"
KINDS = {"replicas"}
SAYS = "replicas: params of 6 parameters in 3 layers: the copies on ranks 0 and 1 differ"
RANKS = 2


class LayerWise:
    """Rank r owns the parameters r, r + ranks, ... in float32."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        self.mine = range(dist.get_rank(), len(self.parameters), dist.get_world_size())
        self.chunks: list[torch.nn.Module] = []

    def load(self, saved: list[torch.Tensor], chunks: list[torch.nn.Module]) -> None:
        with torch.no_grad():
            for i in self.mine:
                self.parameters[i].copy_(saved[i])
        for _ in chunks:
            for i, parameter in enumerate(self.parameters):
                dist.broadcast(parameter.data, src=i % dist.get_world_size())


def fault(wrong: bool) -> audit.Verdict:
    one, other = Torch(seed=0), Torch(seed=1)
    before = audit.record(one.model)
    optimizer = LayerWise(other.model)
    optimizer.load([p.detach().clone() for p in one.model.parameters()], [] if wrong else [other.model])
    verdict = audit.check(before, other.model)
    if wrong:  # rank 0's copy is compared with the record too, and half of it is not the saved model
        assert "changed" in verdict.kinds
        verdict = audit.look(audit.record(other.model))
    return verdict
