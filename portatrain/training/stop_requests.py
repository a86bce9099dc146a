"""Stop requests: signals, cloud notices, cancellation and hangs.

with StopRequests(attempt, ..., sinks=sinks) as stop:
    stop.at("data", step)                      # for the watchdog
    if stop.asked is not None: ...             # 'interrupt' or 'preempt'
    stop.trained = True                        # from now on, there are steps to save
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from portatrain.runs.attempt import Attempt, NullAttempt
from portatrain.runs.events import Kind
from portatrain.system.stop_signals import StopSignals
from portatrain.system.watchdog import Watchdog
from portatrain.training.metrics.record import Sink


class StopRequests:
    """Listens for stop requests in a `with` block, and reports them to `sinks`.

    `signals`: the caller's StopSignals, already entered; None: this object creates its own.
    """

    def __init__(
        self,
        attempt: Attempt | NullAttempt,
        folder: Path,
        *,
        process: int,
        processes: int,
        signals: StopSignals | None,
        sinks: Sink,
    ) -> None:
        self.attempt, self.sinks, self._own, self._folder = attempt, sinks, signals is None, folder
        self.signals = StopSignals() if signals is None else signals
        self._watchdog = Watchdog(
            folder / "attempts" / str(attempt.number),
            process=process,
            processes=processes,
            tell=self._hung,
            cancelled=self.signals.ask,
        )
        self._stack = ExitStack()

    def __enter__(self) -> StopRequests:
        self.signals.on_asked = self._asked
        self.signals.on_leaving = self._leave
        if self._own:
            self._stack.enter_context(self.signals)
        self._stack.enter_context(self._watchdog)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self.signals.on_asked = self.signals.on_leaving = lambda what: None  # nobody records it any more

    @property
    def asked(self) -> str | None:
        """The strongest request received here or agreed on by all processes: 'interrupt', 'preempt' or None."""
        return self.signals.asked

    def agreed(self, agree: Callable[[int], int], *, save: bool = False) -> str | None:
        """Return the action that all processes take now, as `StopSignals.agreed`."""
        return self.signals.agreed(agree, save=save)

    @property
    def trained(self) -> bool:
        """True once a step has been trained."""
        return self.signals.trained

    @trained.setter
    def trained(self, value: bool) -> None:
        self.signals.trained = value

    def at(self, phase: str, step: int) -> None:
        """Record that the main thread is in `phase` (`watchdog.PHASES`) of `step`. Compiling counts as starting."""
        if self.trained or phase not in ("step", "record"):
            self._watchdog.at(phase, step)

    # ---- called by other threads

    @property
    def cancelled(self) -> bool:
        """True if the run has been cancelled; a cancel reaches the process as a signal or through the watchdog."""
        return (self._folder / "CANCELLED").exists()

    def _asked(self, kind: str) -> None:
        asked = "cancel" if kind == "preempt" and self.cancelled else kind
        self.sinks.event(Kind.STOPPING, asked=asked, phase=self._watchdog.phase, step=self._watchdog.step)

    def _leave(self, why: str) -> None:
        status = Kind.INTERRUPTED if self.asked == "interrupt" else Kind.PREEMPTED
        status = Kind.CANCELLED if self.cancelled else status
        self.sinks.end({"status": "done" if self.signals.finished else str(status), "left_at_once": why})
        self.attempt.close()

    def _hung(self, found: dict[str, Any]) -> None:
        self.attempt.event(Kind.HANG, **found)
        self.attempt.close()
