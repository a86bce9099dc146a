"""The lab's optimizer rule and schedule, and a rule that is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portatrain.optim import Array, ArrayNamespace, Info, Rule, Schedule, Slot


@dataclass(frozen=True, kw_only=True)
class Signum(Rule):
    """The sign of a momentum, softened by the mean size of the momentum over the tensor."""

    momentum: float = 0.9

    def slots(self, info: Info) -> dict[str, Slot]:
        return {"m": Slot(axes=info.axes, shape=info.shape)}

    def step(
        self, xp: ArrayNamespace, *, info: Info, grad: Array, param: Array, slots: Any, lr: Array, count: Array
    ) -> tuple[Array, dict[str, Array]]:
        m = self.momentum * slots["m"] + (1.0 - self.momentum) * grad
        over = tuple(range(info.batch_dims, len(info.shape)))
        size = xp.sqrt(xp.mean(m * m, axis=over)) if over else xp.sqrt(m * m)
        size = xp.reshape(size, (*info.shape[: info.batch_dims], *(1 for _ in over)))
        return lr * m / (xp.sqrt(m * m) + size + 1e-8), {"m": m}


@dataclass(frozen=True, kw_only=True)
class Halving(Schedule):
    """Halves the learning rate every so many steps."""

    every: int = 2

    def curve(self, step: int, steps: int) -> float:
        return 0.5 ** ((step - self.warmup) // self.every)


@dataclass(frozen=True, kw_only=True)
class Shapes(Signum):
    """Wrong: its slots are shapes, not Slots."""

    def slots(self, info: Info) -> dict[str, Slot]:
        return {"m": info.shape}  # type: ignore[dict-item]
