"""Time an attempt from the start of its process to the end of its first step, in parts that add up to the whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

PARTS = (
    "check",
    "import",
    "devices",
    "data",
    "claim",
    "init",
    "restore",
    "verify",
    "compile",
    "first_batch",
    "first_step",
)
"""check: `portatrain check` of a recipe that `launch` had not checked before. import: Python, portatrain and the
framework. devices: joining the other processes and finding devices. data: opening or packing it. claim: the claim and
the records of the attempt. init: the state of a run without a checkpoint. restore: reading the newest checkpoint.
verify: the continuity check. first_batch: to the first batch, with hooks and trackers. first_step: running it.
compile: the time of any part in which a program was traced, compiled or loaded."""


class _Compiled(Protocol):
    @property
    def compile_s(self) -> float: ...

    @property
    def programs(self) -> int: ...

    @property
    def reused(self) -> int: ...


class StartTimes:
    """The parts so far.

    A second attempt in one process has neither the part "import" nor "check", and its time begins when this object is
    made.
    """

    _process_is_new = True
    _earlier: ClassVar[dict[str, float]] = {}
    """Parts that ended before the trainer was made."""

    def __init__(self) -> None:
        age_s = _process_age_s() if StartTimes._process_is_new else 0.0
        StartTimes._process_is_new = False
        self._began_s = time.perf_counter() - age_s
        self._parts = {part: seconds for part, seconds in StartTimes._earlier.items() if age_s}
        self._last_s = self._began_s + sum(self._parts.values())
        StartTimes._earlier.clear()
        self._compiled: Callable[[], _Compiled] | None = None
        self._before: _Compiled | None = None
        self._compile_s = 0.0

    @classmethod
    def spent(cls, part: str, seconds: float) -> None:
        """Note a part that this process spent before it makes the trainer, so that it is not counted as import."""
        cls._earlier[part] = cls._earlier.get(part, 0.0) + seconds

    def watch(self, compiled: Callable[[], _Compiled] | None) -> None:
        """From now on take the time that `compiled` reports out of each part, and into the part "compile"."""
        self._compiled = compiled
        if compiled is not None:
            self._before = compiled()
            self._compile_s = self._before.compile_s

    def mark(self, part: str) -> None:
        """End a part; it began at the end of the previous one."""
        now_s = time.perf_counter()
        took_s, self._last_s = now_s - self._last_s, now_s
        if self._compiled is not None:
            total_s = self._compiled().compile_s
            compile_s, self._compile_s = min(took_s, total_s - self._compile_s), total_s
            took_s -= compile_s
            self._parts["compile"] = self._parts.get("compile", 0.0) + compile_s
        self._parts[part] = self._parts.get(part, 0.0) + took_s

    def fields(self) -> dict[str, Any]:
        """Return the fields of the event `first_step_done`: the total, its parts in order, and what was compiled."""
        found: dict[str, Any] = {
            "total_s": self._last_s - self._began_s,
            "parts": {part: self._parts[part] for part in PARTS if part in self._parts},
        }
        if self._compiled is not None and self._before is not None:
            now = self._compiled()
            found["programs_compiled"] = now.programs - self._before.programs
            found["programs_reused"] = now.reused - self._before.reused
        return found


def _process_age_s() -> float:
    """Return the seconds since this process started; 0 if the system does not tell."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # since the machine started
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        return 0.0
