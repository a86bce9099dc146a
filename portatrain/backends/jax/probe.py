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
    *,
    wide: bool,
) -> dict[str, Any]:
    """Return 2-norms: 'ROLE/NAME' of every tensor of the state, 'grad/NAME' of `grads`, 'update/NAME' of `deltas`. Each
    array has the axes of the tensor's Stacks. `wide` says that the devices have float64."""
    norm = _wide_norm if wide else _norm
    found = {full_name(*tensor.key): norm(array, tensor.info.stack_dims) for tensor, array in state_arrays}
    for role, named in (("grad", grads), ("update", deltas)):
        for name, array in named.items():
            found[f"{role}/{name}"] = norm(array, params[name].stack_dims)
    return found


def _wide_norm(array: Any, keep: int) -> Any:
    """Return the 2-norm over all axes but the first `keep`, summed in float64.

    In float32 a sum of squares drifts with the number of its terms if they are alike, as the elements of a parameter
    are after the first step of a rule that takes a sign: each addition then rounds in the same direction.
    """
    with jax.enable_x64(True):
        squares = jnp.square(array.astype(jnp.float64))
        return jnp.sqrt(jnp.sum(squares, axis=tuple(range(keep, squares.ndim)))).astype(jnp.float32)


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
