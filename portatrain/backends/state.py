"""The state of a run as logical tensors: what there is, how it starts, how it is named. Frameworks come after.

Roles: 'params', 'state' (a model's `State`s), 'ema' (averages), 'opt/<slot>' (optimizer slots), and the scalar
'opt/count', the number of steps applied.
"""

from __future__ import annotations

import numpy as np

from checkpoints_format.dtypes import NUMPY
from portatrain.model.module import Constant, TensorInfo
from portatrain.model.rng import truncated_normal
from portatrain.optim import Rule

COUNT = "opt/count"


def full_name(role: str, name: str) -> str:
    """The name in a checkpoint of tensor `name` in `role`."""
    return f"{role}/{name}" if name else role


def slot_tensors(rule: Rule, info: TensorInfo) -> dict[str, TensorInfo]:
    """The optimizer's slots for the parameter `info`, each as a logical tensor of role 'opt/<slot>'."""
    return {
        slot: TensorInfo(
            name=info.name,
            role=f"opt/{slot}",
            shape=what.shape,
            axes=what.axes,
            batch_dims=info.batch_dims,
            fan_in_axes=0,
            init=Constant(value=0.0),
            stack_dims=info.stack_dims,
            dtype=info.dtype if what.dtype == "float32" else what.dtype,
        )
        for slot, what in rule.rule_for(info).slots(info).items()
    }


def initial_box(tensor: TensorInfo, seed: int, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The initial values of a box of `tensor`: a pure function of seed, name and logical index."""
    if isinstance(tensor.init, Constant):
        return np.full(shape, tensor.init.value, NUMPY[tensor.dtype])
    values = truncated_normal(seed, tensor.name, tensor.shape, std=tensor.init.std, offset=offset, box=shape)
    return values.astype(NUMPY[tensor.dtype], copy=False)


def sample_words(sample: np.ndarray) -> np.ndarray:
    """(...,) int64 sample indices as (..., 2) int32 words, low and high: frameworks lack 64-bit integers."""
    return np.ascontiguousarray(sample, "<i8")[..., None].view("<i4").reshape(*sample.shape, 2)
