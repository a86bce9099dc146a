"""Run one kernel outside of a model: its result and its gradients, for the kernel court (`testing/kernels/`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ADDED: Mapping[str, Mapping[str, Any]] = {
    "attention": {"shards": (1, 1, 1), "precision": "highest"},
    "grouped_matmul": {"precision": "highest"},
}
"""The arguments that the backend adds, by operation."""


def devices() -> set[str]:
    """Return the kinds of device at hand, by jax's names."""
    return {device.platform for device in jax.devices()} | {"cpu"}


def run(
    operation: str,
    function: Callable[..., Any],
    operands: Mapping[str, np.ndarray],
    indices: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    dtype: str,
    device: str,
) -> tuple[str, list[np.ndarray]]:
    """Return the dtype of the result, and in float32 the result and the gradient of every operand but the last, which
    is the gradient of the result. Equal shapes and options are compiled once."""
    program = _program(operation, function, tuple(options.items()), dtype)
    with jax.default_device(jax.devices(device)[0]):
        found = program(tuple(operands.values()), dict(indices))
        kind = str(jax.eval_shape(program, tuple(operands.values()), dict(indices))[0].dtype)
        return kind, [np.asarray(x.astype(jnp.float32)) for x in found]


@functools.lru_cache(maxsize=512)
def _program(operation: str, function: Callable[..., Any], options: tuple[tuple[str, Any], ...], dtype: str) -> Any:
    added = dict(ADDED[operation], precision=jax.lax.Precision.HIGHEST if dtype == "float32" else None)

    @jax.jit
    def program(given: tuple[Any, ...], indices: Mapping[str, Any]) -> tuple[Any, ...]:
        *operands, g = (x.astype(dtype) for x in given)
        result, back = jax.vjp(lambda *x: function(*x, **indices, **dict(options), **added), *operands)
        return result, *back(g.astype(result.dtype))

    return program
