"""What backends share about compiling: the time that it takes, and the folder of the compiled programs of a machine."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What this process has compiled so far. compile_s: seconds in which a program was traced, compiled or loaded.

    programs: those that were compiled. reused: those that came from the cache of compiled programs.
    """

    compile_s: float = 0.0
    programs: int = 0
    reused: int = 0


class CompileTime:
    """The time in which at least one of several spans ran; a span inside another one counts once."""

    def __init__(self) -> None:
        self._lock, self._spans, self._total_s = threading.Lock(), list[tuple[float, float]](), 0.0

    def add(self, seconds: float) -> None:
        """Add a span of `seconds` that ends now. A span ends before the one around it."""
        end_s = time.perf_counter()
        start_s = end_s - seconds
        with self._lock:
            while self._spans and self._spans[-1][0] >= start_s:
                inner = self._spans.pop()
                self._total_s -= inner[1] - inner[0]
            if self._spans:
                start_s = max(start_s, self._spans[-1][1])
            self._spans.append((start_s, end_s))
            self._total_s += end_s - start_s

    @property
    def total_s(self) -> float:
        """The seconds so far."""
        with self._lock:
            return self._total_s


@functools.cache
def cpu_key() -> str:
    """Return 12 hexadecimal digits for the instructions that this machine's CPU has.

    Code that was compiled for a CPU with more instructions ends a process by SIGILL, and a home folder may be shared by
    machines with different CPUs.
    """
    flags = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() in ("flags", "Features", "model name", "isa"):
                flags += line + "\n"
            if not line.strip():  # the end of the first processor
                break
    except OSError:  # not Linux
        flags = platform.processor()
    return hashlib.sha256(f"{platform.machine()}\n{flags}".encode()).hexdigest()[:12]


def made_writable(folder: Path) -> Path:
    """Create `folder` if it does not exist, and return it. Raises OSError if no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".written-{uuid.uuid4().hex}"
    with probe.open("xb") as file:
        file.write(b"x")
    os.unlink(probe)
    return folder
