"""Compute the norms of a step that is not applied, by the rule's formula, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from portatrain.backends.base import Arrays
from portatrain.model.module import TensorInfo


class Norms:
    """Collect sums of squares, one for each layer of a tensor, and return the roots of their totals."""

    def __init__(self) -> None:
        self.places: list[tuple[str, tuple[int, ...]]] = []
        self.squares: list[Tensor] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, key: str, info: TensorInfo, index: tuple[int, ...], square: Tensor, *, counts: bool) -> None:
        """Add the sum of squares of this process's part of a layer; if it does not count, 0 takes its place."""
        self.shapes[key] = info.shape[: info.stack_dims]
        self.places.append((key, index))
        self.squares.append(square if counts else torch.zeros_like(square))

    def found(self, total: Callable[[Tensor], Tensor]) -> Arrays:
        """Return the norms by key; `total` sums over all processes."""
        values = total(torch.stack(self.squares)).sqrt().cpu().numpy()
        found = {key: np.zeros(shape) for key, shape in self.shapes.items()}
        for (key, index), value in zip(self.places, values, strict=True):
            found[key][index] = value
        return found


@torch.no_grad()
def norms(
    backend: Any,
    state: Any,
    *,
    clip: float,
    scale: float,
    counts: Callable[[TensorInfo, str], bool],
    total: Callable[[Tensor], Tensor],
    roles: Sequence[str] | None = None,
) -> Arrays:
    """Return norms, see `Backend.probe`. The gradients of the mean loss are in `.grad`; the update multiplies by
    `clip`. roles: the roles of the state that are wanted; None: all.

    `counts(tensor, role)` returns whether this process's part is, of equal copies, the one that counts. `total` sums
    over all processes.
    """
    optimizer = state.optimizer
    listed = Norms()

    def add(role: str, info: TensorInfo, index: tuple[int, ...], held: Tensor, lies: str) -> None:
        listed.add(f"{role}/{info.name}", info, index, square(held), counts=counts(info, lies))

    for tensor, index, held in backend.state_arrays(state):
        info = tensor.info
        if roles is None or tensor.role in roles:
            add(tensor.role, info, index, held, tensor.laid_out_as)
        if tensor.role == "params" and held in optimizer.infos:
            add("grad", info, index, held.grad, "params")
            add("update", info, index, optimizer.delta(held, held.grad * clip, scale), "params")
    return listed.found(total)


def square(x: Tensor) -> Tensor:
    """Return () the sum of squares, in float64 if the device has it, as squares of second moments underflow in
    float32."""
    wide = torch.float64 if x.device.type in ("cpu", "cuda") else torch.float32
    return torch.linalg.vector_norm(x if x.is_floating_point() else x.to(wide), dtype=wide).square()
