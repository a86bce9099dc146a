"""Evaluate a split without dropout or update: the loss, and the other metrics of the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from portatrain.backends.base import Backend
from portatrain.data import Split


def evaluate(
    backend: Backend,
    state: Any,
    split: Split,
    *,
    batch: int,
    batches: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[float, int, dict[str, float]] | None:
    """Return (mean loss over the targets, samples, metrics) of `split`, or of its first `batches` batches.

    A batch has `batch` samples. Metrics are the means over samples of every `ops.aux`, and bits per byte if a target
    represents bytes. Returns None if `stopped()` becomes true during the evaluation.
    """
    totals: dict[str, float] = {}
    loss = weight = 0.0
    samples = 0
    for index, rows in enumerate(split.once(batch)):
        if index == batches:
            break
        if stopped():
            return None
        found = backend.eval(state, rows)
        real = rows["sample"] >= 0  # the last batch is padded with blank rows
        loss += float(found.pop("loss_B")[real].sum(dtype=np.float64))
        weight += float(found.pop("weight_B")[real].sum(dtype=np.float64))
        samples += int(real.sum())
        for name, value_B in found.items():
            totals[name] = totals.get(name, 0.0) + float(value_B[real].sum(dtype=np.float64))
    mean = loss / weight
    metrics = {name: value / samples for name, value in totals.items()}
    if split.bytes_per_target:
        metrics["bits_per_byte"] = mean / math.log(2) / split.bytes_per_target
    return mean, samples, metrics
