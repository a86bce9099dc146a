"""Run one kernel outside of a model: its result and its gradients, for the kernel court (`testing/kernels/`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

ADDED: Mapping[str, Mapping[str, Any]] = {"attention": {"shards": (1, 1, 1)}, "grouped_matmul": {}}
"""The arguments that the backend adds, by operation, beside `precision`."""
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options with which XLA compiles for a CPU in half the time: there the kernel is on trial, not the compiler."""


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
    program = _program(operation, function, tuple(options.items()), dtype, device)
    with jax.default_device(jax.devices(device)[0]):
        found = program(tuple(operands.values()), dict(indices))
        return found[0].dtype.name, [np.asarray(x).astype(np.float32) for x in found]


@functools.lru_cache(maxsize=512)
def _program(
    operation: str, function: Callable[..., Any], options: tuple[tuple[str, Any], ...], dtype: str, device: str
) -> Any:
    added = {"precision": jax.lax.Precision.HIGHEST if dtype == "float32" else None, **ADDED[operation]}

    @functools.partial(jax.jit, compiler_options=QUICK if device == "cpu" else None)
    def program(given: tuple[Any, ...], indices: Mapping[str, Any]) -> tuple[Any, ...]:
        *operands, g = (x.astype(dtype) for x in given)
        result, back = jax.vjp(lambda *x: function(*x, **indices, **dict(options), **added), *operands)
        return result, *back(g.astype(result.dtype))

    return program
