"""Record the operations of a step on a mesh of processes (`backends/watched`).

A value is put together over context and tensor, and a parameter over all axes, so that only the rows of the batch are
left in parts: those of this process. A gradient of a parameter is the sum over the processes that use it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from portatrain.backends.torch.mesh_values import plain
from portatrain.backends.torch.watched import Watches, host
from portatrain.model.layout import MESH_AXES


class MeshWatches(Watches):
    """The method `watch` of a backend on a mesh. All processes call it together; each has the calls of its rows."""

    def _seen(self: Any, t: Tensor) -> np.ndarray:
        with torch.no_grad():
            return host(plain(t.detach()))

    def _seen_gradient(self: Any, t: Tensor) -> np.ndarray:
        if t.grad is None:
            return np.zeros(tuple(t.shape), np.float32)
        with torch.no_grad():
            whole = plain(t.grad)
            if isinstance(t, nn.Parameter):
                over = [a for a in MESH_AXES if a not in _cut_over(t.grad)]
                whole = self.world.all_reduce(whole.contiguous().float().clone(), over)
            return host(whole)

    def _begun(self: Any, state: Any) -> None:
        state.sharded.zero_grad()
        self._begin(state, last=True)

    def _ended(self: Any, state: Any, objective: Tensor) -> dict[str, np.ndarray]:
        self._backward(state, objective)
        state.sharded.collect()
        found: dict[str, np.ndarray] = self._whole_gradients(state)
        state.sharded.zero_grad()
        return found


def _cut_over(grad: Tensor) -> list[str]:
    """Return the mesh axes over which a gradient is cut: those that are put together, and not summed."""
    if not isinstance(grad, DTensor):
        return []
    names = grad.device_mesh.mesh_dim_names or ()
    return [name for name, p in zip(names, grad.placements, strict=True) if isinstance(p, Shard)]
