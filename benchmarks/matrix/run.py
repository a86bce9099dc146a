"""Run cells: one process group for a backend and a mesh, with a time-out, and the group's rows in turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.matrix.cells import ROWS, baseline_of, interpreter, processes, refusal

CELL_S = 240
"""The time limit of a cell in seconds, with the start of its processes."""

CALL = (
    "import sys, json; from portatrain.system.processes import run_processes;"
    "sys.exit(run_processes({n}, {entry!r}, json.loads(sys.argv[1])))"
)
"""A program that runs `run_processes` with the arguments in its first word."""

Found = dict[str, Any]
Start = Callable[..., tuple[bool, str]]
"""A function such as `start`."""


def start(n: int, entry: str, args: dict[str, Any], timeout_s: float, python: str = sys.executable) -> tuple[bool, str]:
    """Run `run_processes` in a new process of `python`; return (whether it ended in time, its last output)."""
    child = subprocess.Popen(
        [python, "-c", CALL.format(n=n, entry=entry), json.dumps(args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = child.communicate(timeout=timeout_s)
        return True, said
    except subprocess.TimeoutExpired:
        os.kill(child.pid, signal.SIGKILL)  # its own processes end after it
        said, _ = child.communicate()
        return False, said


def make_baselines(wanted: list[tuple[str, str]], folder: Path, start: Start = start) -> dict[tuple[str, str], Path]:
    """Return the file of the baseline of every (mesh, row); make those that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {cell: folder / f"{baseline_of(*cell).replace(' ', '-').replace(',', '')}.pickle" for cell in wanted}
    due = {file: cell for cell, file in files.items() if not file.exists()}
    if due:
        rows = [(*cell, str(file)) for file, cell in due.items()]
        good, said = start(1, "benchmarks.matrix.cell:baselines", {"rows": rows}, CELL_S * len(rows))
        if not good or any(not file.exists() for file in due):
            raise RuntimeError(f"no baseline: {said[-4000:]}")
    return files


def run_group(backend: str, mesh: str, rows: list[str], folder: Path, start: Start = start) -> dict[str, Found]:
    """Return the result of every row on this backend and mesh. Rows after a failed one run in another group.

    `start` starts the processes of a group.
    """
    assert set(rows) <= set(ROWS)
    refused = {row: refusal(backend, mesh, row) for row in rows}
    found: dict[str, Found] = {row: {"refused": why} for row, why in refused.items() if why}
    left = [row for row in rows if row not in found]
    files = make_baselines([(mesh, row) for row in left], folder, start)
    while left:
        out = folder / f"out-{os.getpid()}"
        out.unlink(missing_ok=True)
        given = {
            "backend": backend,
            "mesh": mesh,
            "rows": [(row, str(files[mesh, row])) for row in left],
            "out": str(out),
        }
        in_time, said = start(
            processes(backend, mesh),
            "benchmarks.matrix.cell:main",
            given,
            CELL_S * len(left),
            interpreter(backend) or sys.executable,
        )
        ended = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        out.unlink(missing_ok=True)
        for one in ended:
            found[one.pop("row")] = one
        left = [row for row in left if row not in found]
        if left and not (ended and "failed" in ended[-1]):  # it ended without a result for this row
            why = said.strip()[-2000:] if in_time else f"not done in {CELL_S * len(left)} s"
            found[left.pop(0)] = {"failed": why or "ended without a word"}
    return found
