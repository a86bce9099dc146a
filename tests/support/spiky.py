"""A regression with outliers among its samples, and the same training in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain import Module, Param
from portatrain.data import DataSpec
from portatrain.optim import SGD
from portatrain.optim.schedules import Constant
from portatrain.recipe import Recipe, Spikes

BATCH, STEPS, LR, WIDE = 4, 30, 0.05, 4
WIDTH = 30.0  # of a window of 8 steps, the deviation is known roughly
RULE = Spikes(window=8, least=5, loss=WIDTH, grad_norm=WIDTH)


def pair(index: int) -> tuple[np.ndarray, float]:
    draw = np.random.default_rng(index)
    x = draw.normal(0, 1, WIDE)
    return x, float(x.sum() + draw.normal(0, 0.3))


@dataclass(frozen=True, kw_only=True)
class Points(DataSpec):
    outliers: tuple[int, ...] = ()
    by: str = "40"
    """What is added to the y of an outlier."""
    version: str = "1"

    def __len__(self) -> int:
        return BATCH * STEPS

    def sample(self, index: int) -> dict[str, Any]:
        x, y = pair(index)
        return {"x": x.astype(np.float32), "y": np.float32(y + float(self.by) if index in self.outliers else y)}


class Linear(Module):
    def __init__(self) -> None:
        self.w = Param(embed=WIDE, fan_in_axes=1)

    def __call__(self, ops: Any, batch: Any) -> Any:
        error_B = ops.einsum("be,e->b", batch["x"], self.w) - batch["y"]
        return ops.loss(error_B * error_B, batch["mask"])


@dataclass(frozen=True, kw_only=True)
class Config:
    def build(self) -> Module:
        return Linear()


def recipe(outliers: Sequence[int] = (), **more: Any) -> Recipe:
    base: dict[str, Any] = {
        "name": "spiky",
        "model": Config(),
        "data": Points(outliers=tuple(outliers)),
        "optimizer": SGD(lr=LR, momentum=0.0),
        "schedule": Constant(),
        "steps": STEPS,
        "batch": BATCH,
        "clip_norm": None,
        "spikes": RULE,
        "checkpoint_every_s": None,
    }
    return Recipe(**{**base, **more})


def in_numpy(w_E: np.ndarray, batches: Sequence[Any]) -> list[tuple[float, float, bool]]:
    """Return (loss, norm of the gradient, skipped) of every step, in float64, by the rule as its docstring has it."""
    found: list[tuple[float, float, bool]] = []
    for batch in batches:
        x_BE, y_B = batch["x"].astype(float), batch["y"].astype(float)
        error_B = x_BE @ w_E - y_B
        loss, grad_E = float(np.mean(error_B**2)), 2 * error_B @ x_BE / len(y_B)
        norm = float(np.linalg.norm(grad_E))
        known = np.array([(a, b) for a, b, skipped in found[:-1] if not skipped][-RULE.window :])
        spike = False
        if len(known) >= RULE.least:
            middle = np.median(known, 0)
            spread = np.maximum(1.4826 * np.median(np.abs(known - middle), 0), 0.01 * np.abs(middle))
            spike = bool(np.any([loss, norm] > middle + WIDTH * spread))
        if not spike:
            w_E = w_E - LR * grad_E
        found.append((loss, norm, spike))
    return found
