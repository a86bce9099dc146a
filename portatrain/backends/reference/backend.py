"""`ReferenceBackend`: the part of the `Backend` Protocol that an oracle can answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.differences import directional_derivative
from portatrain.backends.reference.ops import ReferenceOps
from portatrain.backends.reference.run import as_reference
from portatrain.backends.reference.trees import tree_map


class ReferenceBackend:
    """`evaluate` and `differentiate` in float64. It trains nothing: it says what the others should have computed."""

    name = "reference"
    operations = ReferenceOps

    @classmethod
    def evaluate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> Any:
        """`fn(ops, *args)`; floating arguments become float64, results are NumPy arrays."""
        ops = cls.operations(seed=context.seed, step=context.step, sample=context.sample, training=context.training)
        return tree_map(np.asarray, fn(ops, *(tree_map(as_reference, arg) for arg in args)))

    @classmethod
    def differentiate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> tuple[Any, tuple]:
        """(value, gradients with respect to every floating array of `args`, None for the others), element by element
        from differences: for small arrays, as it calls `fn` four times an element."""

        def function(*moved: np.ndarray) -> float:
            return float(cls.evaluate(fn, moved, context))

        given = [as_reference(a) for a in args]
        gradients: list[np.ndarray | None] = []
        for i, arg in enumerate(given):
            if arg.dtype.kind != "f":
                gradients.append(None)
                continue
            gradient = np.zeros(arg.shape)
            for index in np.ndindex(arg.shape):
                unit = np.zeros(arg.shape)
                unit[index] = 1.0
                gradient[index] = directional_derivative(
                    function, given, [unit if j == i else None for j in range(len(given))]
                )
            gradients.append(gradient)
        return function(*given), tuple(gradients)
