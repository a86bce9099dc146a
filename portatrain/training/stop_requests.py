"""What may end an attempt from outside its loop, in one place: signals, notices, a cancel, a hang.

with Leaving(attempt, ..., sinks=sinks) as leaving:
    leaving.at("data", step)                      # for the watchdog
    if leaving.asked is not None: ...             # 'interrupt' or 'preempt'
    leaving.trained = True                        # from now on there is something to save
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from portatrain.runs.attempt import Attempt, NullAttempt
from portatrain.runs.events import Kind
from portatrain.system.stop_signals import StopSignals
from portatrain.system.watchdog import Watchdog
from portatrain.training.metrics.record import Sink


class Leaving:
    """Use in a `with` block. `signals`: entered by the caller, or None for ones of its own; `sinks` are told."""

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
        self.attempt, self.sinks, self._own = attempt, sinks, signals is None
        self.signals = StopSignals() if signals is None else signals
        self._watchdog = Watchdog(
            folder / "attempts" / str(attempt.number),
            process=process,
            processes=processes,
            tell=self._hung,
            cancelled=self.signals.ask,
        )
        self._stack = ExitStack()

    def __enter__(self) -> Leaving:
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

    @property
    def asked(self) -> str | None:
        """None, 'interrupt' or 'preempt': the strongest request that has come to this process or been agreed on."""
        return self.signals.asked

    def strengthen(self, kind: str | None) -> None:
        """Take over what all processes have agreed on; a request that came here meanwhile is not forgotten."""
        self.signals.strengthen(kind)

    @property
    def trained(self) -> bool:
        """Whether there is anything to save that no commit has."""
        return self.signals.trained

    @trained.setter
    def trained(self, value: bool) -> None:
        self.signals.trained = value

    def at(self, phase: str, step: int) -> None:
        """The main thread is now in `phase` (`watchdog.PHASES`) of `step`. Compiling counts as starting."""
        if self.trained or phase not in ("step", "record"):
            self._watchdog.at(phase, step)

    # ---- from other threads

    def _asked(self, kind: str) -> None:
        self.sinks.event(Kind.STOPPING, asked=kind, phase=self._watchdog.phase, step=self._watchdog.step)

    def _leave(self, why: str) -> None:
        status = "interrupted" if self.asked == "interrupt" else "preempted"
        self.sinks.end({"status": status, "left_at_once": why})
        self.attempt.close()

    def _hung(self, found: dict[str, Any]) -> None:
        self.attempt.event(Kind.HANG, **found)
        self.attempt.close()
