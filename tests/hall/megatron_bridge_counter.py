"""A restore makes the moments by a step that counts, and fills in the moments but not the count."""

from __future__ import annotations

from typing import Any

import torch

from portatrain.testing import audit
from tests.support.audited import Torch

WHO = "Megatron-Bridge"
LINK = "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/6116"
WHAT = "Adam's count of steps is wrong after a restore"
COST = "found by comparing step 100 of two runs by hand"
KINDS = {"counter"}
SAYS = "counter: counter of 6 parameters in 3 layers: at 1, it was at 3"


def restore(saved: dict[str, Any], trainer: Torch, wrong: bool) -> None:
    """Fill the optimizer in place: its state must exist first, so take one step with gradients of zero."""
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.model.load_state_dict(saved["model"])
    for number, parameter in enumerate(trainer.model.parameters()):
        for key, value in saved["optimizer"]["state"][number].items():
            if key == "step" and wrong:
                continue
            trainer.optimizer.state[parameter][key].copy_(value)
    for group, there in zip(trainer.optimizer.param_groups, saved["optimizer"]["param_groups"], strict=True):
        group.update({key: value for key, value in there.items() if key != "params"})


def fault(wrong: bool) -> audit.Verdict:
    one, other = Torch(seed=0), Torch(seed=1)
    one.take(3)
    before = audit.record(one.model, one.optimizer)
    restore(one.state(), other, wrong)
    return audit.check(before, other.model, other.optimizer)
