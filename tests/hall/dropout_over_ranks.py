"""Rank 0 saves its state of the random numbers, and every rank restores that one: all draw the same dropout."""

from __future__ import annotations

import torch
import torch.distributed as dist

from portatrain.testing import audit
from tests.support.audited import Torch

WHO = "Megatron-LM"
LINK = "https://github.com/NVIDIA/Megatron-LM/pull/6858"
WHAT = "a resume gives most ranks the random numbers of another rank"
COST = "252 of 256 ranks of a 120B run on 64 nodes"
KINDS = {"rng", "rng-repeated"}
SAYS = "rng-repeated: rng: ranks 0, 1 have the same state"
RANKS = 2


def fault(wrong: bool) -> audit.Verdict:
    trainer = Torch(seed=0)
    torch.manual_seed(100 + dist.get_rank())
    torch.rand(3 + dist.get_rank())
    before = audit.record(trainer.model, rng=True)
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, torch.get_rng_state())
    torch.rand(5)
    torch.set_rng_state(states[0 if wrong else dist.get_rank()])
    return audit.check(before, trainer.model, rng=True)
