"""Run each measurement in a process of its own, which sees the accelerator or only the CPU, within a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HIDDEN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
LAST = 600
"""Characters of a failed process's output that are kept."""


@dataclass(kw_only=True)
class Jobs:
    """Processes of one proof.

    device: cpu, cuda or rocm. folder: for the files of the processes. until: when the time is over (time.monotonic).
    """

    device: str
    folder: Path
    until: float
    count: int = field(default=0, init=False)

    def environment(self, device: str) -> dict[str, str]:
        """Return the environment of a process that computes on `device`: cpu, or this proof's device."""
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the two frameworks share the memory
        if device == "cpu":
            env |= {"JAX_PLATFORMS": "cpu", **dict.fromkeys(HIDDEN, "")}
        else:
            env.pop("JAX_PLATFORMS", None)
        return env

    def left_s(self, most_s: float) -> float:
        """Return the seconds that a process may take: at most `most_s`, and no more than the proof has left."""
        return min(most_s, self.until - time.monotonic())

    def answer(self, do: str, job: Mapping[str, Any], *, device: str, most_s: float) -> dict[str, Any]:
        """Return what `worker.DO[do](job)` returns in a process; {"error": why} if it failed or took too long."""
        self.count += 1
        asked, out = (self.folder / f"{self.count}-{do}.{end}.json" for end in ("job", "answer"))
        asked.write_text(json.dumps(job))
        words = [sys.executable, "-m", "benchmarks.gpu_proof.worker", do, str(asked), str(out)]
        code, said = self.run(words, device=device, most_s=most_s)
        if code == 0 and out.exists():
            found: dict[str, Any] = json.loads(out.read_text())
            return found
        return {"error": said[-LAST:].strip()}

    def run(self, words: Sequence[str], *, device: str, most_s: float) -> tuple[int | None, str]:
        """Return the exit code of a command and its output; None, and the reason, if it was ended or not begun."""
        limit = self.left_s(most_s)
        if limit <= 1:
            return None, "not begun: the time was over"
        with subprocess.Popen(
            words,
            env=self.environment(device),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                out, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                return None, f"ended after {limit:.0f} s"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, out
