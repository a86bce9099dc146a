"""Evaluate a split without dropout or update: the loss, and the other metrics of the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from portatrain.backends.base import Backend
from portatrain.data import Split
from portatrain.runs.events import Kind
from portatrain.training import keep_best
from portatrain.training.hook_calls import HookCalls
from portatrain.training.metrics import EvalRecord
from portatrain.training.metrics.broadcast import Broadcast
from portatrain.training.view import TrainingView


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
    represents bytes; of a mixture also ``loss/NAME`` and ``bits_per_byte/NAME`` of every source of which a target was
    read. Sums are float64, over the results of each sample, which every process has. Returns None if `stopped()`
    becomes true during the evaluation.
    """
    totals: dict[str, float] = {}
    whole, groups = np.zeros(2), {group: np.zeros(2) for group in split.groups}  # sums of loss and of weight
    samples = 0
    for index, rows in enumerate(split.once(batch)):
        if index == batches:
            break
        if stopped():
            return None
        found = backend.eval(state, rows)
        real = rows["sample"] >= 0  # the last batch is padded with blank rows
        sums_2B = np.stack([found.pop("loss_B")[real], found.pop("weight_B")[real]]).astype(np.float64)
        whole += sums_2B.sum(axis=1)
        for group, sums in groups.items():
            sums += sums_2B[:, np.isin(rows["source"][real], group.sources)].sum(axis=1)
        samples += int(real.sum())
        for name, value_B in found.items():
            totals[name] = totals.get(name, 0.0) + float(value_B[real].sum(dtype=np.float64))
    mean = _mean(whole)
    metrics = {name: value / samples for name, value in totals.items()}
    if split.bytes_per_target:
        metrics["bits_per_byte"] = _bits(mean, split.bytes_per_target)
    read = {group: _mean(sums) for group, sums in groups.items() if sums[1]}
    metrics |= {f"loss/{group.name}": value for group, value in read.items()}
    metrics |= {
        f"bits_per_byte/{group.name}": _bits(value, group.bytes_per_target)
        for group, value in read.items()
        if group.bytes_per_target
    }
    return mean, samples, metrics


def _mean(sums: np.ndarray) -> float:
    """Return loss / weight; NaN of windows without a target, as of long questions in chats."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _bits(nats: float, bytes_per_target: float) -> float:
    return nats / math.log(2) / bytes_per_target


class Evaluations:
    """The evaluations of one attempt on the validation split. They end early if `stopped()`, and then count as none.

    last: the newest one. began_s: when the attempt began.
    """

    began_s: float

    def __init__(
        self, view: TrainingView, hooks: HookCalls, backend: Backend, sinks: Broadcast, stopped: Callable[[], bool]
    ) -> None:
        self._view, self._hooks, self._backend, self._sinks, self._stopped = view, hooks, backend, sinks, stopped
        self.last: EvalRecord | None = None

    def run(self, state: Any, step: int, batches: int | None) -> None:
        """Evaluate `state`, after `step` steps, on the whole split or on its first `batches` batches; record it."""
        recipe, split = self._view.recipe, self._view.data.validation
        if split is None:
            return
        began_s = time.perf_counter()
        found = evaluate(self._backend, state, split, batch=recipe.batch, batches=batches, stopped=self._stopped)
        if found is None:
            return
        now_s = time.perf_counter()
        loss, samples, metrics = found
        if self.last is None and (unknown := keep_best.no_such_metric(recipe, ("loss", *metrics))):
            self._sinks.event(Kind.WARNING, what=unknown)
        self.last = EvalRecord(
            step=step, loss=loss, samples=samples, metrics=metrics, time_s=now_s - self.began_s, eval_s=now_s - began_s
        )
        self._sinks.eval(self.last)
        self._view.metrics |= {"validation_loss": loss, **{f"validation_{k}": v for k, v in metrics.items()}}
        self._hooks.call("on_evaluation", self.last)
