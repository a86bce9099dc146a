"""List the state of a run as logical tensors, with names and initial values. Imports no framework.

Roles: 'params', 'state' (a model's `State`s), 'ema' (averages), 'opt/<slot>' (optimizer slots), and the scalar
'opt/count', the number of steps applied. `inventory` is the only list of them: backends, checkpoints, the probe and
the memory report are loops over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints_format.dtypes import NUMPY
from portatrain.backends.program import Program
from portatrain.model.module import Constant, TensorInfo, Values
from portatrain.model.precision import averaged
from portatrain.model.rng import truncated_normal
from portatrain.optim import Rule, declared_slots

COUNT = "opt/count"


@dataclass(frozen=True)
class StateTensor:
    """A logical tensor of a run's state.

    role: 'params', 'state', 'ema' or 'opt/<slot>'. laid_out_as: the role that `Layout.tensor_spec` uses for it. An
    average has the layout of its parameter.
    """

    info: TensorInfo
    role: str
    laid_out_as: str

    @property
    def key(self) -> tuple[str, str]:
        """Return (role, name)."""
        return self.role, self.info.name

    @property
    def slot(self) -> str | None:
        """Return the name of the slot; None if this tensor is no slot."""
        return self.role.removeprefix("opt/") if self.role.startswith("opt/") else None


def inventory(program: Program) -> tuple[StateTensor, ...]:
    """Return every tensor of a run's state, in the order of the checkpoint; the scalar `COUNT` comes after them."""
    params, found = program.definition.params, []
    found += [StateTensor(info, "params", "params") for info in params.values()]
    found += [StateTensor(info, "state", "state") for info in program.definition.states.values()]
    found += [StateTensor(averaged(info), "ema", "params") for name, info in params.items() if name in program.ema]
    for name, info in params.items():
        if name in program.trainable:
            slots = slot_tensors(program.optimizer, info).values()
            found += [StateTensor(slot, slot.role, slot.role) for slot in slots]
    return tuple(found)


def beside_params(program: Program) -> dict[str, list[StateTensor]]:
    """Return the averages and slots of every parameter, by the parameter's name."""
    found: dict[str, list[StateTensor]] = {}
    for tensor in inventory(program):
        if tensor.role not in ("params", "state"):
            found.setdefault(tensor.info.name, []).append(tensor)
    return found


def bytes_by_kind(held: Iterable[tuple[StateTensor, Any]], nbytes: Callable[[Any], int]) -> dict[str, int]:
    """Return the bytes of the arrays in `held`, summed by the first part of their roles."""
    found = dict.fromkeys(("params", "state", "ema", "opt"), 0)
    for tensor, array in held:
        kind = tensor.role.partition("/")[0]
        found[kind] = found.get(kind, 0) + nbytes(array)
    return found


def full_name(role: str, name: str) -> str:
    """Return the name of tensor `name` of `role` in a checkpoint."""
    return f"{role}/{name}" if name else role


def slot_tensors(rule: Rule, info: TensorInfo) -> dict[str, TensorInfo]:
    """Return the optimizer's slots for the parameter `info`, each as a logical tensor of role 'opt/<slot>'."""
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
        for slot, what in declared_slots(rule, info).items()
    }


def initial_box(tensor: TensorInfo, seed: int, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Return the initial values of a box of `tensor`, a pure function of seed, name and logical index; the name is that
    of the tensor with whose values it starts."""
    if isinstance(tensor.init, Constant):
        return np.full(shape, tensor.init.value, NUMPY[tensor.dtype])
    if isinstance(tensor.init, Values):
        given = np.array(tensor.init.values, np.float32).reshape(tensor.shape[tensor.stack_dims :])
        at = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        return np.broadcast_to(given, tensor.shape)[at].astype(NUMPY[tensor.dtype])
    values = truncated_normal(
        seed, tensor.start or tensor.name, tensor.shape, std=tensor.init.std, offset=offset, box=shape
    )
    return values.astype(NUMPY[tensor.dtype], copy=False)


def sample_words(sample: np.ndarray) -> np.ndarray:
    """Return (...,) int64 sample indices as (..., 2) int32 words, low and high, because frameworks lack 64-bit
    integers."""
    return np.ascontiguousarray(sample, "<i8")[..., None].view("<i4").reshape(*sample.shape, 2)
