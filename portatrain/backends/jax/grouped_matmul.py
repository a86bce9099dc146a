"""Grouped matmuls, for mixtures of experts; `kernels.Kernel` has the contract. N rows, X experts, E and F sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def ragged_dot(x_NE: Any, w_XEF: Any, *, sizes_X: Any, precision: Any = None) -> Any:
    """Run `jax.lax.ragged_dot`. What it makes of rows past the sum depends on the device, so they are set to zero
    before and after it: then their gradients are zero, too."""
    used = (jnp.arange(len(x_NE)) < sizes_X.sum())[:, None]
    out_NF = jax.lax.ragged_dot(
        jnp.where(used, x_NE, 0), w_XEF, sizes_X, precision=precision, preferred_element_type=x_NE.dtype
    )
    return jnp.where(used, out_NF, 0)


def written_out(x_NE: Any, w_XEF: Any, *, sizes_X: Any, precision: Any = None) -> Any:
    """Multiply all rows by the weights of each expert in turn, and keep the rows that are its own."""
    ends = jnp.cumsum(sizes_X)
    at = jnp.arange(len(x_NE))
    x_NE = jnp.where((at < ends[-1])[:, None], x_NE, 0)

    def add(out: Any, expert: tuple[Any, Any, Any]) -> tuple[Any, None]:
        w_EF, end, size = expert
        mine = ((at >= end - size) & (at < end))[:, None]
        return jnp.where(mine, jnp.matmul(x_NE, w_EF, precision=precision), out), None

    out_NF = jnp.zeros((len(x_NE), w_XEF.shape[2]), x_NE.dtype)
    return jax.lax.scan(jax.checkpoint(add, prevent_cse=False), out_NF, (w_XEF, ends, sizes_X))[0]
