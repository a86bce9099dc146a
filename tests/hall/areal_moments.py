"""A load asks the fresh optimizer which tensors it wants; before its first step it wants none."""

from __future__ import annotations

from typing import Any

import torch

from portatrain.testing import audit
from tests.support.audited import Torch

WHO = "AReaL"
LINK = "https://github.com/inclusionAI/AReaL/issues/1468"
WHAT = "the optimizer's moments are dropped when a checkpoint is loaded"
COST = "the same in KempnerForge#115: no resume was exact, and nothing else was wrong"
KINDS = {"missing", "counter"}
SAYS = "the optimizer has no such slot any more"


def template(optimizer: Any) -> dict[str, Any]:
    """Return the state that a checkpoint is to fill."""
    return {f"{i}.{k}": v for i, state in enumerate(optimizer.state.values()) for k, v in state.items()}


def fault(wrong: bool) -> audit.Verdict:
    one, other = Torch(seed=0), Torch(seed=1)
    one.take(3)
    before = audit.record(one.model, one.optimizer)
    saved = {key: value.clone() for key, value in template(one.optimizer).items()}
    other.model.load_state_dict(one.model.state_dict())
    for group, there in zip(other.optimizer.param_groups, one.optimizer.param_groups, strict=True):
        group["lr"] = there["lr"]
    if not wrong:  # mended: make the state, of zeros, before it is asked for
        for parameter in other.model.parameters():
            slots = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
            other.optimizer.state[parameter] = {
                k: torch.zeros(()) if k == "step" else torch.zeros_like(parameter) for k in slots
            }
    for key, tensor in template(other.optimizer).items():
        with torch.no_grad():
            tensor.copy_(saved[key])
    return audit.check(before, other.model, other.optimizer)
