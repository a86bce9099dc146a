"""Trace steps with torch.profiler, and add up the time of each operation or device kernel."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function, supported_activities

from portatrain.backends.profile import Operation


class TorchTrace:
    """See `portatrain.backends.profile.Trace`."""

    def __init__(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it writes its own lines on the terminal
        self._profile = profile(activities=supported_activities(), record_shapes=True, acc_events=True)
        self._profile.start()

    def step(self, step: int) -> AbstractContextManager[object]:
        return record_function(f"step {step}")

    def stop(self, folder: Path, name: str) -> tuple[list[Path], list[Operation]]:
        self._profile.stop()
        path = folder / f"{name}.trace.json.gz"
        folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(os.fspath(path))
        return [path], _operations(self._profile.key_averages(group_by_input_shape=True))


def _operations(averages: Any) -> list[Operation]:
    """Return the kernels of the devices, or the operations on the host if there are none."""
    rows = [row for row in averages if not row.is_user_annotation]
    on_device = [row for row in rows if row.device_type != torch.autograd.DeviceType.CPU]
    return [
        Operation(
            name=row.key,
            about=_shapes(row.input_shapes),
            calls=row.count,
            time_s=(row.self_device_time_total if on_device else row.self_cpu_time_total) / 1e6,
        )
        for row in on_device or rows
    ]


def _shapes(shapes: Any) -> str:
    """Return the shapes of an operation's tensors, as '512x64, 64x128'."""
    return ", ".join("x".join(map(str, shape)) for shape in shapes or () if shape and isinstance(shape[0], int))
