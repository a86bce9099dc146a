"""What a step would do, as norms: sums inside the compiled program, small arrays out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from portatrain.backends.state import slot_tensors
from portatrain.model.module import Definition


def norms(
    definition: Definition, rule: Any, state: Mapping[str, Any], grads: Mapping[str, Any], deltas: Mapping[str, Any]
) -> dict[str, Any]:
    """By 'ROLE/NAME' the 2-norm of every tensor of `state` and, as 'grad/NAME' and 'update/NAME', of `grads` and
    `deltas`; each has the axes of the tensor's Stacks."""
    params = definition.params
    found = {}
    for role in ("params", "state", "ema"):
        for name, array in state[role].items():
            info = definition.states[name] if role == "state" else params[name]
            found[f"{role}/{name}"] = _norm(array, info.stack_dims)
    for slot, named in state["opt"].slots.items():
        for name, array in named.items():
            found[f"opt/{slot}/{name}"] = _norm(array, slot_tensors(rule, params[name])[slot].stack_dims)
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
