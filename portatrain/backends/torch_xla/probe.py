"""Compute the norms of a step that is not applied: sums on the devices, small arrays out of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from portatrain.backends.base import Arrays
from portatrain.model.module import TensorInfo


@torch.no_grad()
def norms(backend: Any, state: Any, delta: Callable[[Tensor], Tensor], sync: Callable[[], None]) -> Arrays:
    """Return norms, see `Backend.probe`. The gradients of the mean loss are in `.grad`; `delta` gives a tensor's
    update."""
    places: list[tuple[str, TensorInfo, tuple[int, ...]]] = []
    values: list[Tensor] = []

    def add(role: str, info: TensorInfo, index: tuple[int, ...], tensor: Tensor) -> None:
        places.append((f"{role}/{info.name}", info, index))
        values.append(_norm(tensor))

    for tensor, index, held in backend.state_arrays(state):
        add(tensor.role, tensor.info, index, held)
        if tensor.role == "params" and held in state.optimizer.infos:
            add("grad", tensor.info, index, held.grad)
            add("update", tensor.info, index, delta(held))
    stacked = torch.stack(values)
    del values[:]
    sync()
    found: Arrays = {}
    for (key, info, index), value in zip(places, backend.devices.whole(stacked), strict=True):
        found.setdefault(key, np.zeros(info.shape[: info.stack_dims]))[index] = value
    return found


def _norm(x: Tensor) -> Tensor:
    """Return () the 2-norm. Values are scaled to at most 1, because squares of second moments would underflow. Rows are
    summed first, because XLA on a CPU adds one element after another."""
    x = x.float()
    top = x.abs().max()
    squares = (x / torch.where(top > 0, top, 1.0)).square()
    return top * (squares.sum(-1).sum() if x.ndim else squares).sqrt()
