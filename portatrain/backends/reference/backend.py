"""`ReferenceBackend`: the oracle with the two methods of the `Backend` Protocol that need no training."""

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
    """`evaluate` and `differentiate` in float64. It cannot train; tests compare other backends with it."""

    name = "reference"
    operations = ReferenceOps

    @classmethod
    def evaluate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> Any:
        """Return `fn(ops, *args)` as NumPy arrays; floating arguments are converted to float64."""
        ops = cls.operations(seed=context.seed, step=context.step, sample=context.sample, training=context.training)
        return tree_map(np.asarray, fn(ops, *(tree_map(as_reference, arg) for arg in args)))

    @classmethod
    def differentiate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> tuple[Any, tuple]:
        """Return (value, gradients), with a gradient for each floating array in `args` and None for the others.

        Each element of a gradient is a finite difference. Use small arrays: it calls `fn` at least four times per
        element.
        """

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
