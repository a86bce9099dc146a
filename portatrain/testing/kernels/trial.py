"""A trial: one call of an operation whose result and gradients a kernel owes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from portatrain.testing.kernels.bounds import Due, Operands, representable

Rng = np.random.Generator
Draw = Callable[[Rng], dict[str, np.ndarray]]
BOTH = ("float32", "bfloat16")
FLOAT32 = ("float32",)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One hard case of an operation.

    shape, traits: as in `kernels.Case`. draw: draws the floating operands in the order of the kernel's arguments, and
    last the gradient of the result, called 'g'. keywords: the operands that a kernel takes by keyword. indices: integer
    arrays, by keyword; one may be a pair. options: constants, by keyword. oracle(operands, indices, options, dtype)
    returns what is due.
    """

    operation: str
    name: str
    shape: tuple[int, ...]
    draw: Draw
    keywords: tuple[str, ...] = ()
    oracle: Callable[[Operands, Operands, Operands, str], list[Due]]
    indices: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    traits: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = BOTH


@functools.lru_cache(maxsize=1024)
def operands(trial: Trial, dtype: str) -> dict[str, np.ndarray]:
    """Return operands and gradient in float32, as numbers that `dtype` has. They depend on the trial's name alone."""
    rng = np.random.default_rng(list(f"{trial.operation} {trial.name}".encode()))
    return {name: representable(array, dtype) for name, array in trial.draw(rng).items()}


@functools.lru_cache(maxsize=1024)
def owed(trial: Trial, dtype: str) -> tuple[Due, ...]:
    """Return the exact result and the exact gradient of every operand, with their bounds."""
    wide = {name: array.astype(np.float64) for name, array in operands(trial, dtype).items()}
    with np.errstate(under="ignore"):
        return tuple(trial.oracle(wide, trial.indices, trial.options, dtype))
