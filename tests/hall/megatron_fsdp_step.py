"""Sharding an optimizer takes a step with gradients of zero, to make its state before a load; the step is counted."""

from __future__ import annotations

import torch

from portatrain.testing import audit
from tests.support.audited import Torch

WHO = "Megatron-FSDP"
LINK = "https://github.com/NVIDIA/Megatron-LM/pull/5976"
WHAT = "the first real update uses the bias correction of step 2"
COST = "updates too small by a factor of 1.34, silently; NeMo Automodel pinned a fork"
KINDS = {"counter", "changed"}
SAYS = "counter of 6 parameters in 3 layers: at 2, it was at 1"


def shard(optimizer: torch.optim.Optimizer, wrong: bool) -> None:
    """Make the optimizer's state."""
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, (rate, decay) in zip(optimizer.param_groups, rates, strict=True):
        group.update(lr=rate, weight_decay=decay)
    if not wrong:
        for state in optimizer.state.values():
            state["step"].zero_()


def fault(wrong: bool) -> audit.Verdict:
    """A fresh optimizer has no state and a sharded one has zeros, so they are compared after the first real step."""
    one, other = Torch(seed=0), Torch(seed=0)
    shard(other.optimizer, wrong)
    one.take(1)
    other.take(1)
    return audit.check(audit.record(one.model, one.optimizer), other.model, other.optimizer)
