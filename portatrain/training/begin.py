"""Begin an attempt in process 0, which writes the record; the other processes join it. List probable mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

from portatrain.backends.base import Backend
from portatrain.data import OpenData
from portatrain.model.layout import axis_warning, unknown_axes
from portatrain.model.module import Definition
from portatrain.recipe import Recipe
from portatrain.runs.attempt import Attempt, NullAttempt
from portatrain.runs.run_dir import RunDir
from portatrain.system.stop_signals import StopSignals
from portatrain.training import keep_best
from portatrain.training.metrics import RunInfo
from portatrain.training.metrics.broadcast import Broadcast
from portatrain.training.metrics.jsonl import JsonlSink
from portatrain.training.stop_requests import StopRequests


def begin(
    run: RunDir,
    recipe: Recipe,
    info: Mapping[str, Any],
    backend: Backend,
    signals: StopSignals | None,
    sinks: Broadcast,
    stack: ExitStack,
) -> tuple[Attempt | NullAttempt, StopRequests]:
    """Return the attempt and its stop requests, which `stack` closes. `info` goes into attempt.json."""
    first = not backend.process
    # The order matters: a stop request must find an attempt that can record it and be closed, or none.
    with signals.staying() if first and signals is not None else nullcontext():
        attempt = run.begin(recipe, info) if first else _joined(run, backend)
        stack.enter_context(attempt)
        if isinstance(attempt, Attempt):
            sinks.record = JsonlSink(attempt)
        stop = StopRequests(
            attempt, run.path, process=backend.process, processes=backend.processes, signals=signals, sinks=sinks
        )
        stack.enter_context(stop)
    if first:
        backend.agree(attempt.number)
    return attempt, stop


def info_of(
    recipe: Recipe, run: RunDir, backend: Backend, about: Mapping[str, Any], *, attempt: int, first_step: int
) -> RunInfo:
    """Return the constants of an attempt; `about` is the backend's description of its device."""
    return RunInfo.of(
        recipe,
        backend.program.definition,
        run_dir=run.path,
        attempt=attempt,
        first_step=first_step,
        backend=backend.name,
        device=str(about["device"]),
        devices=int(about["devices"]),
        mesh=str(backend.program.layout.mesh),
        # Only process 0, which has the sinks, needs the id.
        id="" if backend.process else str(run.run_info().get("id", "")),
    )


def probable_mistakes(recipe: Recipe, definition: Definition, data: OpenData) -> Iterator[str]:
    """Yield a sentence for each probable mistake of the user, and for what a data source passed over."""
    if unknown := unknown_axes(definition, compute=recipe.compute, params=recipe.params):
        yield axis_warning(unknown)
    yield from data.passed_over
    if useless := keep_best.no_evaluated_save(recipe):
        yield useless


def _joined(run: RunDir, backend: Backend) -> NullAttempt:
    number = backend.agree(0)
    return NullAttempt(number, run.path / "attempts" / str(number), backend.process)
