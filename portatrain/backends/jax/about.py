"""What a backend in JAX says about itself: its memory, its programs, its devices, and what its processes agree on."""

from __future__ import annotations

import platform as machine
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from portatrain.backends.compiling import Compiled
from portatrain.backends.jax import compile_cache
from portatrain.backends.jax.trace import JaxTrace
from portatrain.backends.state import bytes_by_kind
from portatrain.model.layout import Layout


class About:
    """Answer questions about a backend that has devices, jitted functions and arrays of its state."""

    takes_limits = True
    takes_statistics = True
    devices: Any
    layout: Layout
    processes: int
    state_arrays: Any
    _platform: str
    _steps: Any
    _measured: Any
    _evals: Any
    _predicts: Any
    _gradients_of: Any
    _probes: Any

    def describe_memory(self, state: dict[str, Any]) -> dict[str, int]:
        def held(array: Any) -> int:
            return sum(shard.data.nbytes for shard in array.addressable_shards)

        found = bytes_by_kind(self.state_arrays(state), held)
        stats = [d.memory_stats() or {} for d in self.devices.local_devices]
        peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
        return {**found, **({"peak": max(peaks)} if peaks else {})}

    def graphs(self) -> int:
        jitted: list[Any] = [self._steps, self._measured, self._evals, self._predicts, self._gradients_of, self._probes]
        return sum(f._cache_size() for f in jitted)

    def agree(self, value: int) -> int:
        if self.processes == 1:
            return value
        return int(np.max(multihost_utils.process_allgather(np.int32(value))))

    def add_up(self, words: np.ndarray) -> np.ndarray:
        """Return the sums of `words`, uint64, over all processes, modulo 2^64. JAX carries them as 32-bit halves."""
        every = multihost_utils.process_allgather(words.view(np.uint32))
        return np.asarray(every).view(np.uint64).sum(0, dtype=np.uint64)

    def start_trace(self) -> JaxTrace:
        return JaxTrace()

    def use_compile_cache(self, folder: Path) -> Path:
        return compile_cache.use(folder, self._platform)

    def compiled(self) -> Compiled:
        return compile_cache.compiled()

    def describe_device(self) -> dict[str, Any]:
        first = self.devices.devices.flat[0]
        name = first.device_kind if first.platform != "cpu" else f"cpu ({machine.machine()})"
        return {"device": name, "devices": self.layout.mesh.devices, "framework": f"jax {jax.__version__}"}
