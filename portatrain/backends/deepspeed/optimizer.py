"""Apply an optimizer rule to ZeRO's flat partitions, as the client optimizer that DeepSpeed gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from portatrain.backends.torch.optimizer import slice_info, xp
from portatrain.model.module import TensorInfo
from portatrain.optim import Rule


class FlatOptimizer(torch.optim.Optimizer):
    """Apply an elementwise rule. DeepSpeed replaces the parameters by flat parts of many of them, one group each;
    group['decay'] says whether weight decay applies, and group['factor'] is that of the learning rate.

    Call `begin` before every step: stage 3 calls `step` once for each of its sub-groups.
    """

    def __init__(self, rule: Rule, groups: Sequence[dict[str, Any]], info: TensorInfo) -> None:
        self.rule, self.info, self.count, self.scale = rule, slice_info(info), 0, 1.0
        self.live = False
        """False while DeepSpeed makes its buffers, for which it calls `step` with gradients of zero."""
        super().__init__(list(groups), {"lr": rule.lr})

    def begin(self, count: int, scale: float) -> None:
        self.count, self.scale, self.live = count, scale, True

    def slots_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the slots of a flat part, zero at first, each with the shape of the part."""
        held = self.state[flat]
        for slot in self.rule.slots(self.info):
            if slot not in held:
                held[slot] = torch.zeros_like(flat, dtype=torch.float32)
        return held

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.live:
            return
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is None:
                    continue
                slots = self.slots_of(flat)
                delta, new = self.updated(
                    flat.grad, flat, slots, group["decay"], group["factor"], self.count, self.scale
                )
                flat.add_(delta)
                for slot, value in new.items():
                    slots[slot].copy_(value)

    def updated(
        self,
        grad: Tensor,
        param: Tensor,
        slots: dict[str, Tensor],
        decay: bool,
        factor: float,
        count: int,
        scale: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (the change of `param`, the new slots) of step `count`. Changes nothing."""
        namespace: Any = xp
        delta, new = self.rule.update(
            namespace,
            info=dataclasses.replace(self.info, lr=factor),
            grad=grad,
            param=param,
            slots=slots,
            decay=decay,
            scale=torch.tensor(scale, dtype=torch.float32, device=param.device),
            count=torch.tensor(float(count), device=param.device),
        )
        return delta, dict(new)
