"""Compute the norms of a step that is not applied: sums inside the compiled program, small arrays out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from portatrain.backends.state import StateTensor, full_name
from portatrain.model.module import TensorInfo


def norms(
    params: Mapping[str, TensorInfo],
    state_arrays: Iterable[tuple[StateTensor, Any]],
    grads: Mapping[str, Any],
    deltas: Mapping[str, Any],
) -> dict[str, Any]:
    """Return 2-norms: 'ROLE/NAME' of every tensor of the state, 'grad/NAME' of `grads`, 'update/NAME' of `deltas`. Each
    array has the axes of the tensor's Stacks."""
    found = {full_name(*tensor.key): _norm(array, tensor.info.stack_dims) for tensor, array in state_arrays}
    for role, named in (("grad", grads), ("update", deltas)):
        for name, array in named.items():
            found[f"{role}/{name}"] = _norm(array, params[name].stack_dims)
    return found


def _norm(array: Any, keep: int) -> Any:
    """Return the 2-norm over all axes but the first `keep`. Values are scaled to at most 1, because squares of second
    moments would underflow.

    Rows are summed first: XLA on a CPU adds one after another, and would otherwise merge the two sums.
    """
    x = array.astype(jnp.float32)
    axes = tuple(range(keep, x.ndim))
    top = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    squares = jnp.square(x / jnp.where(top > 0, top, 1.0))
    if len(axes) > 1:
        squares = jax.lax.optimization_barrier(jnp.sum(squares, axis=-1))
    return jnp.squeeze(top, axes) * jnp.sqrt(jnp.sum(squares, axis=tuple(range(keep, squares.ndim))))
