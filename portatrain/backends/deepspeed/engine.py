"""What DeepSpeed is given and what it makes of it: the engine's root, its settings, and where its flat parts lie."""

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
    """The flat range [start, start + n) of a trained piece that this process updates: elements [at, at + n) of `flat`.

    `n` is 0 where the piece lies on other processes.
    """

    flat: Tensor
    at: int
    start: int
    n: int

    @property
    def values(self) -> Tensor:
        return self.flat.detach()[self.at : self.at + self.n]

    def of(self, other: Tensor) -> Tensor:
        """The same range of something laid out as `flat` is."""
        return other[self.at : self.at + self.n]


class ZeroState(TorchState):
    """module: the root that the engine runs. parts: by position in `pieces`; what is kept beside a parameter is held as
    the parameter's part is."""

    def __init__(self, module: nn.Module, pieces: list[Piece], engine: Any, client: FlatOptimizer) -> None:
        super().__init__(module, pieces, client, {})  # type: ignore[arg-type]
        self.engine, self.client = engine, client
        self.parts: dict[int, Part] = {}
        self.factor = 1.0
        """What the gradients that DeepSpeed holds are still to be divided by."""

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer around ours."""
        return self.engine.optimizer


def zero_state(state: TorchState) -> ZeroState:
    assert isinstance(state, ZeroState)
    return state


class Root(nn.Module):
    """What the engine runs. Results are plain tensors, which DeepSpeed's hooks must see."""

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
    """The parameters that the model's own call may use from anywhere: tied ones, tables."""
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
    """A long vector in rows, of which norms are added in two steps."""
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
