"""Compute the norms of a step that is not applied, from ZeRO's flat ranges and whole gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from portatrain.backends.base import Arrays
from portatrain.backends.deepspeed.engine import ZeroState
from portatrain.backends.torch.probe import Norms, square
from portatrain.model.module import TensorInfo


@torch.no_grad()
def norms(backend: Any, held: ZeroState, *, clip: float, scale: float) -> Arrays:
    """Return norms, see `Backend.probe`. DeepSpeed holds the gradients of the mean loss times `held.factor`; the update
    multiplies them by `clip`. All processes call it together."""
    from deepspeed.utils import safe_get_full_grad

    listed = Norms()

    def add(key: str, info: TensorInfo, index: tuple[int, ...], part: Tensor, *, whole: bool) -> None:
        """Add this process's part of a layer; of a layer that every process holds whole, process 0's counts."""
        listed.add(key, info, index, square(part).cpu(), counts=not (whole and backend.process))

    # Every process lists the same layers in the same order, also those of which it holds nothing.
    for tensor, index, part, _start in backend._ranges(held, empty=True):
        copied = tensor.role == "state" or (tensor.role == "params" and backend.stage < 3)
        add(f"{tensor.role}/{tensor.info.name}", tensor.info, index, part, whole=copied)
    for i, part in held.parts.items():
        piece = held.pieces[i]
        info = backend.definition.params[piece.name]
        gradient = safe_get_full_grad(piece.tensor)  # None if the loss does not depend on it
        size = math.prod(info.shape[info.stack_dims :])
        flat = torch.zeros(size) if gradient is None else gradient.flatten().float() / held.factor
        add(f"grad/{piece.name}", info, piece.index, flat, whole=True)
        mine = flat[part.start : part.start + part.n].to(part.flat.device) * clip
        slots = {name: part.of(slot) for name, slot in held.client.slots_of(part.flat).items()}
        decays = piece.name in backend.program.decay
        delta, _ = held.client.updated(mine, part.values, slots, decays, info.lr, held.client.count + 1, scale)
        add(f"update/{piece.name}", info, piece.index, delta, whole=False)
    return listed.found(lambda squares: backend.world.all_reduce(squares.to(backend.device)))
