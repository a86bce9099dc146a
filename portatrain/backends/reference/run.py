"""Running a portable model in the oracle: forward pass, recorded values, and the States after a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.guard import GuardedOps, guarded, unwrapped
from portatrain.backends.reference.ops import ReferenceOps
from portatrain.model.bind import bind
from portatrain.model.module import Constant, Definition, Values
from portatrain.model.ops import Aux, Loss
from portatrain.model.state_updates import run_after_step

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The results of a forward pass.

    value: the result of the model (a `Loss` from __call__). auxes: the values of `ops.aux`, by name. states: the States
    including the sums of `ops.tally`. objective: () float64, the loss to differentiate: the summed loss plus the
    auxiliary losses, each sample weighted by its loss weight; None if the model returned no `Loss`.
    """

    value: Any
    auxes: dict[str, Aux]
    states: dict[str, np.ndarray]
    objective: np.ndarray | None


def forward(
    definition: Definition,
    params: Arrays,
    batch: Arrays,
    context: Context | None = None,
    *,
    states: Arrays | None = None,
    method: str = "__call__",
    operations: type[ReferenceOps] = GuardedOps,
) -> Forward:
    """Run `model(ops, batch)` in float64.

    Args:
        params: the parameters by name, each a whole logical array, with the leading axes of Stacks.
        batch: arrays by name.
        context: seed, step, sample numbers and training; without sample numbers, `batch['sample']` has them.
        states: the States by name, as the parameters; default: their initial values.
        method: the method of the model to run, such as 'predict'.
        operations: the class of operations; the default guards arrays, so that what frameworks do not have in common
            is a UserError (guard.py).
    """
    context = context or Context()
    states = initial_states(definition) if states is None else dict(states)
    named = {**params, **states}
    values = {key: as_reference(named[name]) for key, name in definition.owners.items()}
    sample = context.sample if context.sample is not None else batch.get("sample")
    ops = operations(seed=context.seed, step=context.step, sample=sample, training=context.training, values=values)
    model = bind(definition.model, ops.value)
    given = {key: as_reference(array) for key, array in batch.items()}
    guards = issubclass(operations, GuardedOps)
    value = unwrapped(getattr(model, method)(ops, guarded(given) if guards else given))
    for key, added in ops.tallies.items():
        states[definition.owners[key]] = states[definition.owners[key]].copy()
        for index, amount in added.items():
            states[definition.owners[key]][index] += amount
    objective = None
    if isinstance(value, Loss):
        objective = value.sum + sum(
            aux.loss * (aux.value_B * value.weight_B).sum() for aux in ops.auxes.values() if aux.loss
        )
    return Forward(value=value, auxes=ops.auxes, states=states, objective=objective)


def after_step(definition: Definition, states: Arrays) -> dict[str, np.ndarray]:
    """Return the States after `Module.after_step` of every module."""
    return run_after_step(definition, states, ReferenceOps(), np.stack)


def as_reference(array: Any) -> np.ndarray:
    """Return an array in the oracle's dtype: float64 for floating dtypes, otherwise unchanged."""
    array = np.asarray(array)
    return array.astype(np.float64) if array.dtype.kind not in "iub" else array


def initial_states(definition: Definition) -> dict[str, np.ndarray]:
    """Return the initial States of a model, by name."""
    made: dict[str, np.ndarray] = {}
    for name, info in definition.states.items():
        assert isinstance(info.init, Constant)  # State accepts nothing else
        dtype = {"float32": np.float64, "int32": np.int32, "bool": np.bool_}[info.dtype]
        made[name] = np.full(info.shape, info.init.value, dtype)
    return made


def initial(definition: Definition, seed: int = 0) -> dict[str, np.ndarray]:
    """Return initial parameters for tests: float64 arrays with values that float32 can represent.

    They are normal with each tensor's standard deviation, or its constant, from NumPy's generator. A run uses
    `portatrain.model.rng` instead.
    """

    rng = np.random.default_rng(seed)
    made = {}
    for name, info in definition.params.items():
        if isinstance(info.init, Constant):
            values = np.full(info.shape, info.init.value)
        elif isinstance(info.init, Values):
            given = np.array(info.init.values).reshape(info.shape[info.stack_dims :])
            values = np.broadcast_to(given, info.shape)
        else:
            values = rng.normal(0, info.init.std, info.shape)
        made[name] = values.astype(np.float32).astype(np.float64)
    return made
