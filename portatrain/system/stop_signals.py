"""Stop requests by signal or cloud notice, noticed at once even while the main thread compiles.

Python runs a signal handler between two bytecodes of the main thread, so a main thread that compiles for minutes would
not notice a signal. The C part of a handler also writes to a pipe, and a thread reads that pipe. The thread decides:

- At the first request, it sets `asked`. The trainer checks it between steps, during evaluation and while it waits for
  data; then it saves and exits.
- Before the first step (imports, restoring, compiling), there is nothing to save, and the process exits at once.
- If the grace period is nearly over and the trainer has not exited, the process exits with the previous checkpoint.
- At a second request, the process exits at once. A second request is the same signal again, at least SAME_S seconds
  after the first. One request may arrive as several different signals, seconds apart on a busy machine: a scheduler
  signals the processes and the supervisor, which forwards the signal, and a cloud's notice precedes its SIGTERM.
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
from portatrain.system.exit_codes import INTERRUPTED, OK, RESUMABLE

SAME_S = 1.0
MARGIN_S = 1.0
"""Seconds of the grace period that are reserved for exiting."""

_ASKED = 255
"""The number for `ask`, in place of a signal's number."""
STRENGTHS = (None, "preempt", "interrupt")
"""The kinds of request, from weak to strong."""
_KINDS: dict[int, str] = {
    signal.SIGINT: "interrupt",
    signal.SIGTERM: "preempt",
    signal.SIGUSR1: "preempt",
    signal.SIGHUP: "preempt",  # the terminal is gone
    _ASKED: "preempt",
}


def stopping_signals() -> list[signal.Signals]:
    """Return the signals that request a stop, without SIGHUP if this process was started to outlive its terminal."""
    found = [signal.Signals(number) for number in _KINDS if number != _ASKED]
    return [n for n in found if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def note_left(code: int) -> None:
    """Tell the process that started this one that it leaves at once, so that the others do not wait for it in vain."""
    folder = environment.REPORTS.get()
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / f"left-{environment.LOCAL_RANK.get()}").write_text(str(code))


class StopSignals:
    """The stop requests of this process; use it in a `with` block.

    Attributes:
        asked: None, 'interrupt' (Ctrl-C) or 'preempt' (SIGTERM, SIGUSR1, SIGHUP, `ask`).
        trained: True if there is anything to save; the trainer sets it.
        finished: True once the run is done; the trainer sets it. A request can only make the process leave earlier.
        on_asked: called with the kind of the first request, from the watching thread.
        on_leaving: called with the reason before the process exits at once, from another thread.

    Outside the main thread, Python handles no signals, and only `ask` can request a stop.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.trained = self.finished = False
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
        """Request a stop, as a signal would; for cloud notices."""
        if self._pipe is not None and self.asked is None:
            os.write(self._pipe[1], bytes([_ASKED]))

    def strengthen(self, kind: str | None) -> None:
        """Adopt the request of another process if it is stronger than the one of this process."""

        with self._deciding:
            if STRENGTHS.index(kind) > STRENGTHS.index(self.asked):
                if self.asked is None:
                    self._first_s = time.monotonic()
                self.asked = kind

    def agreed(self, agree: Callable[[int], int], *, save: bool = False) -> str | None:
        """Return the action that all processes take now: None, "save" if one of them passes `save`, or a stop request.

        One exchange per step decides both: `agree` returns the largest number of all processes. A stop request
        (`STRENGTHS`) outranks a save, because a stop saves as well. A request that arrives during the exchange counts
        in the next one.
        """
        kinds = (None, "save", *STRENGTHS[1:])
        found = kinds[agree(kinds.index("save" if save and self.asked is None else self.asked))]
        if found != "save":
            self.strengthen(found)
        return found

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Delay an immediate exit while entered, so that the record of the exit is complete."""
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
                self._leave("no step was trained yet, so there is nothing to save")
            if self.asked == "preempt" and time.monotonic() > self._first_s + self._patience_s:
                self._leave(f"the grace of {self.grace_s:g} s was nearly over")

    @property
    def _patience_s(self) -> float:
        """Seconds after the first signal in which the trainer may save."""
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
        """End the process now. Committed checkpoints stay valid."""
        self._staying.acquire()  # never released
        code = OK if self.finished else INTERRUPTED if self.asked == "interrupt" else RESUMABLE
        on = "the run is done" if self.finished else "a resumed run continues from its newest checkpoint, if it has one"
        # Use a separate thread: the main thread may hold a lock that the callback needs.
        telling = threading.Thread(target=self.on_leaving, args=(why,), daemon=True)
        telling.start()
        telling.join(2.0)
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            print(f"\nstopped at once: {why}; {on}", file=sys.stderr, flush=True)
        note_left(code)
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
