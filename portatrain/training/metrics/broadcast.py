"""Hand metrics to several sinks, so that one that fails does not end the run."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Mapping

from portatrain.errors.users_code import at_line
from portatrain.runs.events import Kind
from portatrain.training.metrics.record import EvalRecord, RunInfo, Sink, StepRecord


class Broadcast:
    """A ``Sink`` that passes everything to other sinks.

    A sink that raises an error is dropped: the others get one event `sink_failed`, and standard error gets one line.
    The run's own record, ``record``, is not dropped, because a run cannot continue without it: its errors are raised.
    """

    def __init__(self, sinks: Iterable[Sink] = (), *, record: Sink | None = None) -> None:
        self.sinks, self.record = list(sinks), record
        self._lock = threading.RLock()  # the thread that hears signals tells the sinks, too

    def start(self, info: RunInfo) -> None:
        self._each(lambda sink: sink.start(info))

    def step(self, record: StepRecord) -> None:
        self._each(lambda sink: sink.step(record))

    def eval(self, record: EvalRecord) -> None:
        self._each(lambda sink: sink.eval(record))

    def event(self, kind: str, **fields: object) -> None:
        self._each(lambda sink: sink.event(kind, **fields))

    def end(self, summary: Mapping[str, object]) -> None:
        self._each(lambda sink: sink.end(summary))

    def _each(self, call: Callable[[Sink], None]) -> None:
        with self._lock:
            failed: list[tuple[Sink, Exception]] = []
            for sink in self.sinks:
                try:
                    call(sink)
                except Exception as error:  # of another package, or of a terminal that is gone
                    failed.append((sink, error))
            self.sinks = [sink for sink in self.sinks if all(sink is not one for one, _ in failed)]
            try:
                if self.record is not None:
                    call(self.record)
            finally:
                for sink, raised in failed:
                    line = at_line(raised, called=True)
                    why = f"{type(raised).__name__}: {raised}"[:500] + (f" ({line})" if line else "")
                    self._tell(type(sink).__name__, why)

    def _tell(self, sink: str, why: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # it may be standard error that is gone
            print(f"{sink} gets no more metrics: {why}", file=sys.stderr, flush=True)
        self.event(Kind.SINK_FAILED, sink=sink, why=why)
