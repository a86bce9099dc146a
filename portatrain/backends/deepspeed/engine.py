"""Configure a DeepSpeed engine and locate its flat parts in logical tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints_format.boxes import flat_range_boxes
from portatrain.backends.base import LocalBox, check_loss
from portatrain.backends.deepspeed.optimizer import FlatOptimizer
from portatrain.backends.state import StateTensor
from portatrain.backends.torch.lower import Piece
from portatrain.backends.torch.one_device import TorchState
from portatrain.model.module import Stack


@dataclass(frozen=True)
class Part:
    """Locate a range of a trained piece that this process updates: [start, start + n) is [at, at + n) of `flat`.

    `n` is 0 if the piece is on other processes.
    """

    flat: Tensor
    at: int
    start: int
    n: int

    @property
    def values(self) -> Tensor:
        return self.flat.detach()[self.at : self.at + self.n]

    def of(self, other: Tensor) -> Tensor:
        """Return the same range of a tensor with the layout of `flat`."""
        return other[self.at : self.at + self.n]


class ZeroState(TorchState):
    """A state on DeepSpeed. module: the root that the engine runs. parts: by position in `pieces`. A tensor beside
    a parameter is sharded as the parameter is."""

    def __init__(self, module: nn.Module, pieces: list[Piece], engine: Any, client: FlatOptimizer) -> None:
        super().__init__(module, pieces, client, {})  # type: ignore[arg-type]
        self.engine, self.client = engine, client
        self.parts: dict[int, Part] = {}
        self.factor = 1.0
        """The divisor that DeepSpeed's gradients have not been divided by yet."""

    @property
    def zero(self) -> Any:
        """Return DeepSpeed's optimizer around ours."""
        return self.engine.optimizer


def zero_state(state: TorchState) -> ZeroState:
    assert isinstance(state, ZeroState)
    return state


def unequal_copies(backend: Any, state: TorchState) -> list[tuple[str, str]]:
    """Return (role, name) of the parameters of which this process holds two copies that differ in a bit.

    DeepSpeed computes with one copy of a parameter and updates another, which replaces the first one at the next step.
    `local_boxes` has the first one in stages 1 and 2, and the second one in stage 3.
    """
    held, found = zero_state(state), []
    for i, part in held.parts.items():
        piece: Any = held.pieces[i]
        if backend.stage < 3:
            computed = piece.tensor.detach().flatten()[part.start : part.start + part.n]
        else:
            computed = piece.tensor.ds_tensor.detach()[: part.n]
        if not torch.equal(computed.view(torch.int32), part.values.view(torch.int32)):
            found.append((piece.role, piece.name))
    return found


class Root(nn.Module):
    """Wrap the model for the engine. Results are plain tensors, because DeepSpeed's hooks must see them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, ops: Any, batch: Any) -> Any:
        model: Any = self.module
        if method == "predict":
            return model.predict(ops, batch)
        loss = check_loss(model.forward(ops, batch), model)
        return loss.sum, loss.weight_B, loss.loss_B


def outside_of_stacks(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the model's own call may use from anywhere: tied parameters and tables."""
    inside = {id(p) for m in module.modules() if isinstance(m, Stack) for p in m.parameters()}
    return [p for p in module.parameters() if id(p) not in inside]


def settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its reports alone: boundaries are set by hand
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_scatter": True,
            "overlap_comm": False,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 62,
    }


def in_rows(flat: Tensor) -> Tensor:
    """Return a long vector in rows, so that its norm is summed in two steps."""
    n = flat.numel() // 4096
    return (
        torch.cat([torch.linalg.vector_norm(flat[: n * 4096].view(n, 4096), dim=1), flat[n * 4096 :]])
        if n > 1
        else flat
    )


def boxes_of(tensor: StateTensor, index: tuple[int, ...], flat: Tensor, start: int) -> Iterator[LocalBox]:
    info, lead, at = tensor.info, (1,) * len(index), 0
    for box in flat_range_boxes(info.shape[info.stack_dims :], start, start + flat.numel()):
        part, whole = flat[at : at + box.size], (*lead, *box.shape)
        yield LocalBox(
            name=info.name,
            role=tensor.role,
            offset=(*index, *box.offset),
            shape=whole,
            fetch=functools.partial(_fetched, part, whole),
        )
        at += box.size


def _fetched(part: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    return part.detach().to("cpu", copy=True).numpy().reshape(shape)
