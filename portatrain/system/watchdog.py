"""The watchdog: detects a process that hangs, and ends the attempt so that it can be resumed.

Each process writes a small file, `attempts/K/beats/rank-R.json`, with its host, step and phase. A process that makes no
progress for `limit_s` seconds writes the stacks of all its threads, reads the files of the others to find the processes
that are behind, records the event `hang` and exits with code 85. The next attempt continues from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from portatrain.system import environment, json_files
from portatrain.system.exit_codes import RESUMABLE

PHASES = ("starting", "data", "agree", "step", "record", "eval", "save", "end")
"""The phases in the order of a step. Of two processes in the same step, the one in the earlier phase is behind."""
STARTING_S, LEAST_S, TIMES = 3600.0, 600.0, 20.0
"""Defaults: an hour before the first step is done (compiling); then 20 of the slowest step, and at least 600 s."""
BEAT_S = 2.0


class Watchdog:
    """Watches this process from a thread; use it in a `with` block.

    Args:
        folder: the folder of the attempt.
        process, processes: rank of this process and number of processes.
        tell: called once with the fields of the event at a hang, before the process ends.
        cancelled: called once when the file CANCELLED appears in the run directory.
    """

    def __init__(
        self,
        folder: Path,
        *,
        process: int,
        processes: int,
        tell: Callable[[dict[str, Any]], None],
        cancelled: Callable[[], None],
    ) -> None:
        self.folder, self.process, self.processes, self.tell = folder, process, processes, tell
        self.cancelled: Callable[[], None] | None = cancelled
        self.given_s = environment.HANG_S.get()
        self.phase, self.step, self._since_s = "starting", 0, time.monotonic()
        self._slowest_s: float | None = None
        self._step_s = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="portatrain-watchdog", daemon=True)

    def at(self, phase: str, step: int) -> None:
        """Record that the main thread enters `phase` of `step`."""
        now_s = time.monotonic()
        if step != self.step:
            if self._slowest_s is not None or self.phase != "starting":
                self._slowest_s = max(self._slowest_s or 0.0, now_s - self._step_s)
            self._step_s = now_s
        self.phase, self.step, self._since_s = phase, step, now_s

    @property
    def limit_s(self) -> float:
        """Seconds in one phase after which the process counts as hanging."""
        if self.given_s is not None:
            return self.given_s or float("inf")
        if self._slowest_s is None:
            return STARTING_S
        return max(LEAST_S, TIMES * self._slowest_s)

    def __enter__(self) -> Watchdog:
        self._beats = self.folder / "beats"
        self._beats.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(BEAT_S, self.limit_s / 4)):
            self._beat()
            if self.cancelled is not None and (self.folder.parent.parent / "CANCELLED").exists():
                self.cancelled()
                self.cancelled = None
            if time.monotonic() - self._since_s > self.limit_s:
                self._end()

    def _beat(self) -> None:
        path = self._beats / f"rank-{self.process}.json"
        row = {
            "process": self.process,
            "host": host_name(),
            "step": self.step,
            "phase": self.phase,
            "for_s": round(time.monotonic() - self._since_s, 1),
            "unix_s": time.time(),
        }
        try:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(row))
            partial.replace(path)
        except OSError:  # the file system itself may hang; the stacks will show it
            pass

    def _end(self) -> None:
        stacks = self.folder / f"stacks-rank-{self.process}.txt"
        try:
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        time.sleep(2 * min(BEAT_S, self.limit_s / 4))  # so that the files of the others are recent
        found = behind(beats(self.folder), self.processes)
        fields = {
            "process": self.process,
            "host": host_name(),
            "step": self.step,
            "phase": self.phase,
            "for_s": round(time.monotonic() - self._since_s, 1),
            "stacks": stacks.name,
            "behind": found,
        }
        telling = threading.Thread(target=self.tell, args=(fields,), daemon=True)
        telling.start()
        telling.join(2.0)
        print(
            f"\nprocess {self.process} has been in phase {self.phase!r} of step {self.step} for {fields['for_s']:.0f} s"
            f" and ends the attempt, which can be resumed. {found['text']} Stacks: {stacks}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RESUMABLE)


def host_name() -> str:
    """Return the name of this host: the scheduler's name for it, if any, or its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def beats(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the latest file of each process of an attempt, by rank."""
    found = {}
    for path in (folder / "beats").glob("rank-*.json"):
        try:
            row = json_files.loads(path.read_text())
            whole = all(type(row[key]) is int for key in ("process", "step")) and row["phase"] in PHASES
            if whole and isinstance(row["unix_s"], (int, float)) and "host" in row:
                found[row["process"]] = row
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def behind(rows: Mapping[int, Mapping[str, Any]], processes: int) -> dict[str, Any]:
    """Return the processes for which the others wait: {'hosts', 'processes', 'text'}."""

    missing = [r for r in range(processes) if r not in rows]
    newest_s = max((row["unix_s"] for row in rows.values()), default=0.0)
    silent = [r for r, row in rows.items() if newest_s - row["unix_s"] > 5 * BEAT_S]
    if missing or silent:
        slow = sorted(missing + silent)
        how = "give no sign of life"
    else:
        places = {r: (row["step"], PHASES.index(row["phase"])) for r, row in rows.items()}
        least = min(places.values(), default=(0, 0))
        slow = sorted(r for r, place in places.items() if place == least)
        if len(slow) == processes:
            text = f"None is behind: all are in phase {PHASES[least[1]]!r} of step {least[0]}."
            return {"hosts": [], "processes": [], "text": text}
        how = f"are behind, in phase {PHASES[least[1]]!r} of step {least[0]}"
    hosts = sorted({str(rows[r]["host"]) for r in slow if r in rows})
    where = f" on {', '.join(hosts)}" if hosts else ""
    return {"hosts": hosts, "processes": slow, "text": f"Processes {', '.join(map(str, slow))}{where} {how}."}
