"""Run one kernel outside of a model: its result and its gradients, for the kernel court (`testing/kernels/`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from portatrain.backends.kernels import Kernel

ADDED: Mapping[str, Mapping[str, Any]] = {"attention": {"shards": (1, 1, 1)}, "grouped_matmul": {}}
"""The arguments that the backend adds, by operation, beside `precision`."""
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options with which XLA compiles for a CPU in half the time: there the kernel is on trial, not the compiler."""


def devices() -> set[str]:
    """Return the kinds of device at hand, by jax's names."""
    return {device.platform for device in jax.devices()} | {"cpu"}


def run(
    kernel: Kernel,
    operands: Mapping[str, np.ndarray],
    indices: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    keywords: tuple[str, ...] = (),
    dtype: str,
    device: str,
) -> tuple[str, list[np.ndarray]]:
    """Return the dtype of the result, and in float32 the result and the gradient of every operand but the last, which
    is the gradient of the result. `keywords`: the operands that the function takes by keyword. Equal shapes and options
    are compiled once."""
    program = _program(kernel, tuple(options.items()), tuple(operands), keywords, dtype, device)
    indices = dict(indices)
    if kernel.per_device and not isinstance(ids := indices.get("segment_ids"), tuple | None):
        indices["segment_ids"] = (ids, ids)
    with jax.default_device(jax.devices(device)[0]):
        found = program(tuple(operands.values()), indices)
        return found[0].dtype.name, [np.asarray(x).astype(np.float32) for x in found]


@functools.lru_cache(maxsize=512)
def _program(
    kernel: Kernel,
    options: tuple[tuple[str, Any], ...],
    names: tuple[str, ...],
    keywords: tuple[str, ...],
    dtype: str,
    device: str,
) -> Any:
    added: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST if dtype == "float32" else None}
    added |= {"device": device} if kernel.per_device else ADDED[kernel.operation]
    function = kernel.load()

    @functools.partial(jax.jit, compiler_options=QUICK if device == "cpu" else None)
    def program(given: tuple[Any, ...], indices: Mapping[str, Any]) -> tuple[Any, ...]:
        *operands, g = (x.astype(dtype) for x in given)

        def call(*given: Any) -> Any:
            named = dict(zip(names, given, strict=False))
            by_keyword = {name: named.pop(name) for name in keywords}
            return function(*named.values(), **by_keyword, **indices, **dict(options), **added)

        result, back = jax.vjp(call, *operands)
        return result, *back(g.astype(result.dtype))

    return program
