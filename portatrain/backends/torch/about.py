"""What a backend in torch says about itself: its memory, its programs and its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from portatrain.backends.compiling import Compiled
from portatrain.backends.state import bytes_by_kind
from portatrain.backends.torch.devices import device_name, peak_bytes
from portatrain.backends.torch.trace import TorchTrace


class About:
    """Answer questions about a backend on one device."""

    device: torch.device
    compiles: bool
    state_arrays: Any
    _graphs: int

    def describe_memory(self, state: Any) -> dict[str, int]:
        found = bytes_by_kind(((tensor, held) for tensor, _, held in self.state_arrays(state)), lambda t: t.nbytes)
        peak = peak_bytes(self.device)
        return found if peak is None else {**found, "peak": peak}

    def graphs(self) -> int:
        return self._graphs

    def agree(self, value: int) -> int:
        return value

    def start_trace(self) -> TorchTrace:
        return TorchTrace()

    def use_compile_cache(self, folder: Path) -> Path | None:
        if not self.compiles:
            return None
        from portatrain.backends.torch import compile_cache  # loads the compiler, which takes seconds

        return compile_cache.use(folder)

    def compiled(self) -> Compiled:
        if not self.compiles:
            return Compiled()
        from portatrain.backends.torch import compile_cache

        return compile_cache.compiled()

    def describe_device(self) -> dict[str, Any]:
        return {"device": device_name(self.device), "devices": 1, "framework": f"torch {torch.__version__}"}
