"""Wrap an optimizer rule as a `torch.optim.Optimizer`.

AdamW and SGD go to torch's own fused optimizers, which compute the same formula (tests/contract proves it); every
other rule runs as it is written, one torch tensor at a time: a layer's tensor is a batch slice of the logical one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from portatrain.backends.state import slot_tensors
from portatrain.backends.torch.lower import Piece
from portatrain.model import dropout_hash, precision
from portatrain.model.module import TensorInfo
from portatrain.optim import SGD, AdamW, Rule, lr_factor


class _Namespace:
    """Give rules torch under numpy's names and signatures."""

    sqrt, sign, expm1 = torch.sqrt, torch.sign, torch.expm1
    sum, mean, matmul, swapaxes, reshape = torch.sum, torch.mean, torch.matmul, torch.swapaxes, torch.reshape

    @staticmethod
    def maximum(x: Tensor, floor: Tensor | float) -> Tensor:
        return torch.maximum(x, floor) if isinstance(floor, Tensor) else torch.clamp_min(x, floor)


xp = _Namespace


NORM_ROW = 512
"""The number of elements up to which torch may add squares one after another."""


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm, 0-d, of all gradients as one vector.

    On a CPU torch adds the squares of a tensor one after another (2.13: off by 7e-4 at 16 million elements, and by 2e-6
    at 30 thousand if the first ones are the largest), so norms of short rows are taken first, then the norm of those.
    """
    if grads[0].device.type == "cpu":
        grads = [part for g in grads for part in _row_norms(g.reshape(-1))]
    return torch.nn.utils.get_total_norm(grads)


def _row_norms(x: Tensor) -> list[Tensor]:
    """Yield vectors of at most `NORM_ROW` elements with the norm of `x`."""
    if x.numel() <= NORM_ROW:
        return [x]
    rest = x.numel() % NORM_ROW
    rows = _row_norms(torch.linalg.vector_norm(x[: x.numel() - rest].view(-1, NORM_ROW), dim=-1))
    return [*rows, x[-rest:]] if rest else rows


def slice_info(info: TensorInfo) -> TensorInfo:
    """Return the description that a rule gets of one layer's tensor: `info` without the axes of Stacks."""
    n = info.stack_dims
    return dataclasses.replace(
        info, shape=info.shape[n:], axes=info.axes[n:], batch_dims=info.batch_dims - n, stack_dims=0
    )


# The names of slots in torch's own optimizers.
NATIVE_SLOTS: dict[type, dict[str, str]] = {AdamW: {"m": "exp_avg", "v": "exp_avg_sq"}, SGD: {"m": "momentum_buffer"}}


def _native(rule: Any, params: list[Tensor], decays: bool, factor: float) -> torch.optim.Optimizer:
    decay = rule.weight_decay / factor if decays else 0.0  # torch multiplies it by the learning rate of the group
    if isinstance(rule, AdamW):
        return torch.optim.AdamW(
            params, lr=rule.lr, betas=(rule.b1, rule.b2), eps=rule.eps, weight_decay=decay, fused=True
        )
    return torch.optim.SGD(params, lr=rule.lr, momentum=rule.momentum, nesterov=rule.nesterov, fused=True)


class RuleOptimizer(torch.optim.Optimizer):
    """`rule` over the trained pieces of a module. `step(scale=...)`: scale is the schedule's multiplier.

    Every slot exists, at zero, from the start. `state[tensor]` is a dict by slot name: the rule's names, or torch's
    names if torch's optimizer runs (`slot` translates). `count` is the number of applied steps.
    """

    def __init__(
        self, rule: Rule, pieces: Sequence[Piece], infos: dict[str, TensorInfo], decay: frozenset[str], seed: int = 0
    ) -> None:
        super().__init__([p.tensor for p in pieces], {})
        self.rule, self.decay, self.seed, self.count = rule, decay, seed, 0
        self.stacked = {p.tensor: (infos[p.name], p.index) for p in pieces}
        self.slot_infos = {p.tensor: slot_tensors(rule, infos[p.name]) for p in pieces}
        self.infos = {p.tensor: (slice_info(infos[p.name]), p.name) for p in pieces}
        self.natives: list[tuple[float, torch.optim.Optimizer]] = []
        self.plain: list[Tensor] = []
        groups: dict[tuple[Any, bool, float], list[Tensor]] = {}
        for tensor, (info, name) in self.infos.items():
            mine = rule.rule_for(info)
            if _runs_native(mine, tensor, name in decay):
                groups.setdefault((mine, name in decay, lr_factor(info)), []).append(tensor)
            else:
                self.plain.append(tensor)
            for slot in mine.slots(info):
                zeros = torch.zeros(self.slot_shape(tensor, slot), dtype=tensor.dtype, device=tensor.device)
                self.state[tensor][self.slot(tensor, slot)] = zeros
        for (mine, decays, factor), tensors in groups.items():
            native = _native(mine, tensors, decays, factor)
            for tensor in tensors:
                if isinstance(mine, AdamW):
                    self.state[tensor]["step"] = torch.zeros((), device=tensor.device)
                native.state[tensor] = self.state[tensor]  # one dict: ours is theirs
            self.natives.append((mine.lr * factor, native))

    def slot(self, tensor: Tensor, slot: str) -> str:
        """Return the key in `state[tensor]` of the rule's `slot`."""
        info, name = self.infos[tensor]
        mine = self.rule.rule_for(info)
        return NATIVE_SLOTS[type(mine)][slot] if _runs_native(mine, tensor, name in self.decay) else slot

    def slot_shape(self, tensor: Tensor, slot: str) -> tuple[int, ...]:
        """Return the shape of this process's part of a slot."""
        return self.box(self.slot_infos[tensor][slot])[1]

    def box(self, info: TensorInfo) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (offset, shape) of this process's part of one layer of the logical tensor `info`."""
        shape = info.shape[info.stack_dims :]
        return (0,) * len(shape), shape

    def updated(self, rule: Rule, tensor: Tensor, slots: dict[str, Tensor], **options: Any) -> Any:
        """Return (the update of `tensor`, the new slots), all in float32."""
        return rule.update(
            options.pop("xp"),
            info=self.infos[tensor][0],
            param=tensor.float(),
            slots={slot: value.float() for slot, value in slots.items()},
            **options,
        )

    def keep(self, held: Tensor, value: Tensor, info: TensorInfo, role: str, index: tuple[int, ...]) -> None:
        """Store the new `value` of one layer's tensor in `held`; to bfloat16 it is rounded stochastically."""
        if held.dtype == torch.float32:
            held.copy_(value)
            return
        offset, shape = self.box(info)
        there = held.device
        words = precision.noise(
            torch.tensor(dropout_hash.words(self.seed), dtype=torch.int32, device=there),
            torch.tensor(self.count, dtype=torch.int32, device=there),
            role,
            info.name,
            (*index, *offset),
            (*(1 for _ in index), *shape),
            lambda n: torch.arange(n, dtype=torch.int32, device=there),
        ).reshape(held.shape)
        held.copy_(precision.rounded_bits(value.contiguous().view(torch.int32), words).view(torch.float32))

    def delta(self, tensor: Tensor, grad: Tensor, scale: float) -> Tensor:
        """Return the update that `step` would apply to `tensor` for this gradient, by the rule's formula."""
        info, name = self.infos[tensor]
        mine = self.rule.rule_for(info)
        return self.updated(
            mine,
            tensor,
            {slot: self.state[tensor][self.slot(tensor, slot)] for slot in mine.slots(info)},
            xp=xp,
            grad=grad,
            scale=torch.tensor(scale, dtype=torch.float32, device=tensor.device),
            count=torch.tensor(float(self.count + 1), device=tensor.device),
            decay=name in self.decay,
        )[0]

    def set_count(self, count: int) -> None:
        """Continue from `count` applied steps."""
        self.count = count
        for tensor in self.infos:
            if "step" in self.state[tensor]:
                self.state[tensor]["step"].fill_(count)

    @torch.no_grad()
    def step(self, closure: Any = None, *, scale: float = 1.0) -> None:  # type: ignore[override]
        self.count += 1
        for lr, native in self.natives:
            for group in native.param_groups:
                group["lr"] = lr * scale
            native.step()
        if not self.plain:
            return
        device = self.plain[0].device
        scale_t = torch.tensor(scale, dtype=torch.float32, device=device)
        count_t = torch.tensor(float(self.count), device=device)
        for tensor in self.plain:
            info, name = self.infos[tensor]
            slots = self.state[tensor]
            delta, new = self.updated(
                self.rule.rule_for(info),
                tensor,
                slots,
                xp=xp,
                grad=tensor.grad,
                scale=scale_t,
                count=count_t,
                decay=name in self.decay,
            )
            whole, index = self.stacked[tensor]
            if tensor.dtype == torch.float32:
                tensor.add_(delta)
            else:
                self.keep(tensor, tensor.float().add_(delta), whole, "params", index)
            for slot, what in self.slot_infos[tensor].items():
                self.keep(slots[slot], new[slot], what, what.role, index)


def _runs_native(rule: Any, tensor: Tensor, decays: bool) -> bool:
    """Return whether torch has this very rule, fused, for the tensor's device."""
    if tensor.device.type not in ("cpu", "cuda") or tensor.dtype != torch.float32:
        return False
    if type(rule) is AdamW:
        return True
    # torch's SGD couples its weight decay with the momentum; ours does not.
    return type(rule) is SGD and not (decays and rule.weight_decay)
