"""What a step would do, as norms: sums inside the compiled program, small arrays out of it."""

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
    """By 'ROLE/NAME' the 2-norm of every tensor of the state and, as 'grad/NAME' and 'update/NAME', of `grads` and
    `deltas`; each has the axes of the tensor's Stacks."""
    found = {full_name(*tensor.key): _norm(array, tensor.info.stack_dims) for tensor, array in state_arrays}
    for role, named in (("grad", grads), ("update", deltas)):
        for name, array in named.items():
            found[f"{role}/{name}"] = _norm(array, params[name].stack_dims)
    return found


def _norm(array: Any, keep: int) -> Any:
    """Over all axes but the first `keep`, of what is scaled to at most 1: squares of second moments would vanish.

    Rows first: XLA on a CPU adds one after another, and would merge the two sums.
    """
    x = array.astype(jnp.float32)
    axes = tuple(range(keep, x.ndim))
    top = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    squares = jnp.square(x / jnp.where(top > 0, top, 1.0))
    if len(axes) > 1:
        squares = jax.lax.optimization_barrier(jnp.sum(squares, axis=-1))
    return jnp.squeeze(top, axes) * jnp.sqrt(jnp.sum(squares, axis=tuple(range(keep, squares.ndim))))
