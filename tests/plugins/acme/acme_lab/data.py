"""The lab's data: documents that it makes, and pairs of numbers by index with a model for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from portatrain.data import DataSpec
from portatrain.model.module import Module, Param
from portatrain.model.ops import Array, Batch, Loss, Ops


@dataclass(frozen=True, kw_only=True)
class Sums(DataSpec):
    """Documents that say what the sums of small numbers are."""

    seq_len: int
    count: int = 60
    validation: float = 0.2

    def documents(self) -> Iterator[tuple[str, str]]:
        for n in range(self.count):
            yield f"sum-{n}", "".join(f"{n} + {m} = {n + m}\n" for m in range(8))


@dataclass(frozen=True, kw_only=True)
class Lines(DataSpec):
    """Points near a line: x (2,) and y (), by index."""

    size: int = 64
    version: str = "1"

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> dict[str, np.ndarray]:
        x = np.random.default_rng(index).normal(size=2)
        return {"x": x, "y": np.asarray(3 * x[0] - x[1])}

    def validation_len(self) -> int:
        return 10

    def validation_sample(self, index: int) -> dict[str, np.ndarray]:
        return self.sample(10_000 + index)


@dataclass(frozen=True, kw_only=True)
class LineConfig:
    """A linear model of two numbers."""

    def build(self) -> Line:
        return Line()


class Line(Module):
    """y = w x, with the mean of the squared error."""

    def __init__(self) -> None:
        self.w = Param(embed=2, fan_in_axes=1)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        error_B = self.predict(ops, batch) - batch["y"]
        return ops.loss(error_B * error_B, batch["mask"])

    def predict(self, ops: Ops, batch: Batch) -> Array:
        return ops.einsum("be,e->b", batch["x"], self.w, dtype="float32")
