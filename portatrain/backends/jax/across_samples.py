"""Implement `Ops.across_samples` in JAX; `portatrain.model.across_samples` says how. The rows of a microbatch are
global, so that only microbatches are parts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from portatrain.model.across_samples import Across, check_arrays, fits, grouped, outside_stacks, results
from portatrain.model.measured import hushing
from portatrain.model.ops_results import Loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scaled(x: Any, factor: int) -> Any:
    """Return x; its gradient is multiplied by `factor`."""
    return x


_scaled.defvjp(lambda x, factor: (x, None), lambda factor, _, g: (g * factor,))


class AcrossSamples:
    """The operation, for `JaxOps`."""

    across: Across | None
    sample: Any
    aux: Callable[..., None]

    @hushing
    def across_samples(self, fn: Callable[..., Any], *xs: Any, group: int | None = None) -> Loss:
        across = outside_stacks(self.across)
        rows = check_arrays(xs, group)
        values = (*xs, jnp.broadcast_to(self.sample[:, 1] >= 0, (rows,)))
        if fits(rows, group, across):
            return self._compared(fn, values, group, 0, rows, 1)
        call, across.calls = across.calls, across.calls + 1
        if across.collecting:
            across.found.append(list(values))
            return _no_loss(rows)
        if across.microbatches == 1:
            whole = tuple(x[: across.rows] for x in values)
            return self._compared(fn, whole, group, 0, rows, 1)
        if across.held is None:
            across.wanted = True
            return _no_loss(rows)
        start, parts = across.index * rows, across.microbatches
        whole = tuple(_with_live_rows(w, x, start, parts) for w, x in zip(across.held[call], values, strict=True))
        return self._compared(fn, whole, group, start, rows, parts)

    def _compared(
        self, fn: Callable[..., Any], whole: tuple[Any, ...], group: int | None, start: Any, rows: int, parts: int
    ) -> Loss:
        shape = grouped(whole[0].shape[0], group)
        loss, weight, metrics = results(fn(*(x.reshape(*shape, *x.shape[1:]) for x in whole)), shape)
        loss_GN = loss.astype(jnp.float32)

        def mine(value_GN: Any) -> Any:
            """The values of this part's rows; rows that fill up a mesh have 0."""
            flat = value_GN.astype(jnp.float32).reshape(-1)
            if parts > 1:
                return jax.lax.dynamic_slice_in_dim(flat, start, rows)
            return jnp.pad(flat, (0, rows - flat.shape[0]))

        for name, value in metrics.items():
            self.aux(name, jax.lax.stop_gradient(mine(value)))
        return Loss(jnp.sum(loss_GN) / parts, mine(weight), jax.lax.stop_gradient(mine(loss_GN)))


def _with_live_rows(held: Any, x: Any, start: Any, parts: int) -> Any:
    """held: (microbatches, B, ...)."""
    x = _scaled(x, parts) if jnp.issubdtype(x.dtype, jnp.floating) else x
    whole = held.reshape(-1, *held.shape[2:])
    return jax.lax.dynamic_update_slice_in_dim(whole, x, start, axis=0)


def _no_loss(rows: int) -> Loss:
    zeros_B = jnp.zeros(rows, jnp.float32)
    return Loss(jnp.sum(zeros_B), zeros_B, zeros_B)
