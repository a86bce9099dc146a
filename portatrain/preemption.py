"""Signals that ask a run to stop: seen between steps, so that a step is never cut in two.

Ctrl-C (SIGINT) finishes the step, and a second one leaves at once. SIGTERM and SIGUSR1 are how schedulers announce a
preemption.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
RESUME_ME = 85
"""Exit code for 'saved, resume me'."""


class StopSignals:
    """While entered, `asked` is None, 'interrupt' (Ctrl-C) or 'preempt' (SIGTERM, SIGUSR1); use in a `with` block.

    Off the main thread, where Python takes no signals, nothing is ever asked.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._seen)
        return self

    def _seen(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == "interrupt":
            raise KeyboardInterrupt
        self.asked = "interrupt" if number == signal.SIGINT else "preempt"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
