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
    mean = loss / weight if weight else math.nan  # of windows without a target, as of long questions in chats
    metrics = {name: value / samples for name, value in totals.items()}
    if split.bytes_per_target:
        metrics["bits_per_byte"] = mean / math.log(2) / split.bytes_per_target
    return mean, samples, metrics


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
