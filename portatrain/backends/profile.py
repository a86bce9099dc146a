"""What a backend's profiler gives: a trace that a viewer opens, and the time of each operation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MOST = 10
"""The number of operations that a profile lists."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of the framework, over all its calls in the traced steps of this process.

    about: where it comes from or the shapes of its inputs; '' if unknown. time_s: the time in the operation itself,
    without the operations that it calls, over all devices and threads.
    """

    name: str
    about: str
    calls: int
    time_s: float


class Trace(Protocol):
    """A trace that has been started. `Backend.start_trace` returns one."""

    def step(self, step: int) -> AbstractContextManager[object]:
        """Mark a step in the trace, for the time of a `with` block."""
        ...

    def stop(self, folder: Path, name: str) -> tuple[list[Path], list[Operation]]:
        """Stop the trace, write it below `folder`, and return its files and all operations.

        The first file is `folder`/`name`.trace.json.gz, in the format of Chrome's tracing, which Perfetto opens.
        """
        ...


def most_expensive(operations: list[Operation]) -> list[Mapping[str, object]]:
    """Return the ten operations with the most time, for an event; `share` is the share of the time of all."""
    total_s = sum(op.time_s for op in operations)
    ordered = sorted(operations, key=lambda op: (-op.time_s, op.name, op.about))
    return [
        {
            "name": op.name,
            "about": op.about,
            "calls": op.calls,
            "time_s": op.time_s,
            "share": op.time_s / total_s if total_s else 0.0,
        }
        for op in ordered[:MOST]
    ]
