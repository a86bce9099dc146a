"""Requests that a run stop: signals, and the notices of clouds. Seen at once, whatever the main thread is doing.

Python runs a signal's handler between two bytecodes of the main thread, so one that compiles for minutes would see
nothing. The C half of a handler writes to a pipe, however, and a thread reads that. It decides:

- The first request is noted in `asked`; the trainer looks at it between steps, while it evaluates and while it waits
  for data, saves, and leaves.
- Before anything has been trained (imports, restoring, compiling the first step) the last commit is all there is: the
  process leaves at once.
- When the grace is nearly over and the trainer has not left, the process leaves with the checkpoint before.
- A second request leaves at once: the same signal again, SAME_S or more after the first. One request comes as several
  signals (a scheduler tells the processes, and the supervisor, which hands it on; a cloud's notice goes before its
  SIGTERM), and on a busy machine they are seconds apart.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from portatrain.system import environment
from portatrain.system.exit_codes import INTERRUPTED, RESUMABLE

SAME_S = 1.0
MARGIN_S = 1.0
"""Left of the grace for leaving."""

_ASKED = 255
"""Stands for `ask` where signals have their numbers."""
STRENGTHS = (None, "preempt", "interrupt")
"""Requests in order of strength."""
_KINDS: dict[int, str] = {
    signal.SIGINT: "interrupt",
    signal.SIGTERM: "preempt",
    signal.SIGUSR1: "preempt",
    signal.SIGHUP: "preempt",  # the terminal is gone
    _ASKED: "preempt",
}


def stopping_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop; without SIGHUP where this process was started to outlive its terminal."""
    found = [signal.Signals(number) for number in _KINDS if number != _ASKED]
    return [n for n in found if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class StopSignals:
    """While entered, `asked` is None, 'interrupt' (Ctrl-C) or 'preempt' (SIGTERM, SIGUSR1, SIGHUP). Use it in `with`.

    `trained`: whether there is anything to save; the trainer sets it. `on_asked(kind)` and `on_leaving(why)` are called
    from the watching thread, the latter before the process ends without returning to the main thread. Off the main
    thread, where Python takes no signals, only `ask` asks.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.trained = False
        self.on_asked: Callable[[str], None] = lambda kind: None
        self.on_leaving: Callable[[str], None] = lambda why: None
        self.grace_s = environment.GRACE_S.get()
        self._first_s = 0.0
        self._last_s: dict[int, float] = {}
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._staying, self._deciding = threading.Lock(), threading.Lock()

    def __enter__(self) -> StopSignals:
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        if threading.current_thread() is threading.main_thread():
            for number in stopping_signals():
                self._before[number] = signal.signal(number, lambda number, frame: None)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="portatrain-signals", daemon=True)
        self._thread.start()
        return self

    def ask(self) -> None:
        """As if a signal had come; for notices that are none."""
        if self._pipe is not None and self.asked is None:
            os.write(self._pipe[1], bytes([_ASKED]))

    def strengthen(self, kind: str | None) -> None:
        """Take over what other processes were asked; a request that came here and is as strong stays."""
        with self._deciding:
            if STRENGTHS.index(kind) > STRENGTHS.index(self.asked):
                if self.asked is None:
                    self._first_s = time.monotonic()
                self.asked = kind

    @contextmanager
    def staying(self) -> Iterator[None]:
        """While entered the process does not leave at once; for moments in which what is to be told changes hands."""
        with self._staying:
            yield

    def _watch(self) -> None:
        assert self._pipe is not None
        pipe = select.poll()  # not select(), which takes no descriptor above 1023
        pipe.register(self._pipe[0], select.POLLIN)
        while True:
            ready = pipe.poll(100 if self.asked else None)
            for number in os.read(self._pipe[0], 64) if ready else b"":
                if number == 0:
                    return
                if number in _KINDS:
                    self._seen(number)
            if self.asked and not self.trained:
                self._leave("nothing had been trained since the last checkpoint")
            if self.asked == "preempt" and time.monotonic() > self._first_s + self._patience_s:
                self._leave(f"the grace of {self.grace_s:g} s was nearly over")

    @property
    def _patience_s(self) -> float:
        """How long after the first signal the trainer may go on saving."""
        return float("inf") if self.grace_s is None else max(self.grace_s - MARGIN_S, self.grace_s / 2)

    def _seen(self, number: int) -> None:
        kind, now_s = _KINDS[number], time.monotonic()
        with self._deciding:
            first, asked = not self._last_s, self.asked
            if asked is None:
                self._first_s = now_s
            if STRENGTHS.index(kind) > STRENGTHS.index(asked):
                self.asked = kind
        if first:  # what other processes were asked before is no signal of ours
            self.on_asked(kind)
        elif kind == "interrupt" or now_s - self._last_s.get(number, now_s) >= SAME_S:
            self._leave("a second signal came")
        self._last_s[number] = now_s

    def _leave(self, why: str) -> None:
        """End the process now; what was committed before stands."""
        self._staying.acquire()  # for good
        code = INTERRUPTED if self.asked == "interrupt" else RESUMABLE
        # In a thread of its own: the main one may hold a lock that telling needs.
        telling = threading.Thread(target=self.on_leaving, args=(why,), daemon=True)
        telling.start()
        telling.join(2.0)
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            print(f"\nleaving at once: {why}; the last committed checkpoint stands", file=sys.stderr, flush=True)
        folder = environment.REPORTS.get()
        if folder is not None:  # the others wait for this process in vain
            with contextlib.suppress(OSError):
                (folder / f"left-{environment.LOCAL_RANK.get()}").write_text(str(code))
        os._exit(code)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._pipe is not None and self._thread is not None
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)
        self._pipe = None
