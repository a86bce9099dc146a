"""Options of one attempt at a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from portatrain.system.stop_signals import StopSignals
from portatrain.training.metrics import Sink


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of one attempt: backend, mesh, checkpoints. None of them changes the loss curve; the recipe does."""

    backend: str
    mesh: str | None = None
    """'fsdp=4,tensor=2'; None: `devices` along fsdp."""
    devices: int | None = None
    stop_at: int | None = None
    """Save after this step and end with exit code 85; None: train to the end."""
    accept_drift: str | None = None
    """The reason to continue although the continuity check fails; it is recorded."""
    checkpoints: str | None = None
    """An object-store URL for the checkpoints, which the run records; None: the recorded one, or the default."""
    kernels: tuple[tuple[str, str], ...] = ()
    """(operation, kernel) for each kernel that the user chose (`backends/kernels.py`)."""
    profile: str | None = None
    """'100:103' profiles steps 100 to 103, both included (`training/profiling.py`)."""
    sinks: Sequence[Sink] = ()
    source: Mapping[str, Any] | None = None
    """The arguments of `portatrain train`, for attempt.json; `launch resume` reads them."""
    signals: StopSignals | None = None
    """Signals that the caller has entered, so that no stop request is missed at the start."""
