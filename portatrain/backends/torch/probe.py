"""What a step would do, as norms: by the rule's formula, a tensor at a time, with nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from portatrain.backends.base import Arrays
from portatrain.backends.state import slot_tensors
from portatrain.model.module import TensorInfo


@torch.no_grad()
def norms(
    backend: Any,
    state: Any,
    *,
    clip: float,
    scale: float,
    counts: Callable[[TensorInfo, str], bool],
    total: Callable[[Tensor], Tensor],
) -> Arrays:
    """See `Backend.probe`. The gradients of the mean loss are in `.grad`; the update takes them times `clip`.

    `counts(tensor, role)`: whether this process's part is the one that counts of equal copies. `total` sums over all
    processes.
    """
    definition, optimizer, rule = backend.definition, state.optimizer, backend.program.optimizer
    places: list[tuple[str, tuple[int, ...]]] = []
    squares: list[Tensor] = []
    shapes: dict[str, tuple[int, ...]] = {}

    def add(role: str, name: str, info: TensorInfo, index: tuple[int, ...], held: Tensor, lies: str) -> None:
        key = f"{role}/{name}"
        shapes[key] = info.shape[: info.stack_dims]
        places.append((key, index))
        square = _square(held)
        squares.append(square if counts(info, lies) else torch.zeros_like(square))

    for i, p in enumerate(state.pieces):
        info = definition.tensors[p.role, p.name]
        add(p.role, p.name, info, p.index, p.tensor, p.role)
        if i in state.ema:
            add("ema", p.name, info, p.index, state.ema[i], "params")
        if p.tensor in optimizer.infos:
            for slot, what in slot_tensors(rule, info).items():
                held = optimizer.state[p.tensor][optimizer.slot(p.tensor, slot)]
                add(what.role, p.name, what, p.index, held, what.role)
            add("grad", p.name, info, p.index, p.tensor.grad, "params")
            delta = optimizer.delta(p.tensor, p.tensor.grad * clip, scale)
            add("update", p.name, info, p.index, delta, "params")
    values = total(torch.stack(squares)).sqrt().cpu().numpy()
    found = {key: np.zeros(shape) for key, shape in shapes.items()}
    for (key, index), value in zip(places, values, strict=True):
        found[key][index] = value
    return found


def _square(x: Tensor) -> Tensor:
    """() the sum of squares, in float64 where the device has it: those of second moments vanish in float32."""
    wide = torch.float64 if x.device.type in ("cpu", "cuda") else torch.float32
    return torch.linalg.vector_norm(x if x.is_floating_point() else x.to(wide), dtype=wide).square()
