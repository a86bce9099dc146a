"""Contractions and lookups in a low precision, whose gradients of parameters are summed in float32.

Left to themselves they would be rounded before devices add them up, and a token's rows added one after another in
bfloat16, where 256 + 1 is 256. Legend: V vocab, E embed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

SMALL_TABLES = 1 << 20
"""Elements of the embedding tables, one a sample, up to which `rows` sums their gradient in two steps."""


def transposable(spec: str) -> bool:
    """Whether the gradients of both operands of an einsum are einsums themselves: no letter is in one term alone."""
    terms, _, out = spec.replace(" ", "").partition("->")
    if terms.count(",") != 1:
        return False
    x, w = terms.split(",")
    return all(len(set(t)) == len(t) for t in (x, w, out)) and set(x) ^ set(w) <= set(out) and set(out) <= {*x, *w}


def laid(x: Any, sharding: Any) -> Any:
    """x, held to a sharding; None: to none."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


Gathering = tuple[Any, Any]
"""Shardings of a parameter as it is used and as it is stored, or (None, None)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def contraction(spec: str, compute: Any, kind: Any, gathering: Gathering, x: Any, w: Any) -> Any:
    """einsum(spec, x, w) in dtype `compute`, w being a parameter of dtype `kind`, gathered for it; its gradient is
    summed in float32 and scattered."""
    return _einsum(spec, x.astype(compute), laid(w.astype(compute), gathering[0]), compute)


def _einsum(spec: str, x: Any, w: Any, out: Any) -> Any:
    return jnp.einsum(spec, x, w, preferred_element_type=out)


def _contraction(spec: str, compute: Any, kind: Any, gathering: Gathering, x: Any, w: Any) -> Any:
    used, stored = gathering
    low = laid(w.astype(compute), stored)  # kept as it is stored, gathered again on the way back
    return _einsum(spec, x.astype(compute), laid(low, used), compute), (x, low)


def _contraction_back(spec: str, compute: Any, kind: Any, gathering: Gathering, saved: Any, g: Any) -> Any:
    (x, low), (used, stored) = saved, gathering
    terms, _, out = spec.replace(" ", "").partition("->")
    mine, theirs = terms.split(",")
    dx = _einsum(f"{out},{theirs}->{mine}", g, laid(low, used), compute).astype(x.dtype)
    dw = _einsum(f"{mine},{out}->{theirs}", x.astype(compute), g, jnp.float32)
    return dx, laid(dw, stored).astype(kind)


contraction.defvjp(_contraction, _contraction_back)


def rows(table_VE: Any, ids: Any) -> Any:
    """Rows of a table: (..., E) for ids (...)."""
    b, (v, e) = ids.shape[0], table_VE.shape
    if ids.ndim < 2 or b * v * e > SMALL_TABLES:
        return jnp.take(table_VE, ids, axis=0, mode="clip")
    # One table a sample, so that the gradient is summed within samples first: in a small vocabulary some ids come
    # so often that adding them one after another would show in float32.
    at = jnp.arange(b).reshape(b, *(1,) * (ids.ndim - 1))
    return jnp.broadcast_to(table_VE, (b, v, e)).at[at, ids].get(mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def low_rows(compute: Any, kind: Any, shape: tuple[int, int], find: Any, table_VE: Any, ids: Any) -> Any:
    """`find` (`rows`, or the like on a mesh) in dtype `compute`, of a parameter of dtype `kind` and of this shape."""
    return find(table_VE.astype(compute), ids)


def _low_rows(compute: Any, kind: Any, shape: tuple[int, int], find: Any, table_VE: Any, ids: Any) -> Any:
    return find(table_VE.astype(compute), ids), ids


def _low_rows_back(compute: Any, kind: Any, shape: tuple[int, int], find: Any, ids: Any, g: Any) -> Any:
    _, back = jax.vjp(lambda table: find(table, ids), jnp.zeros(shape, jnp.float32))
    return back(g.astype(jnp.float32))[0].astype(kind), None


low_rows.defvjp(_low_rows, _low_rows_back)
