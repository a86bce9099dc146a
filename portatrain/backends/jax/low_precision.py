"""Contract and look up in a low precision, and sum the gradients of parameters in float32.

Without this the compiler would round the gradients before devices add them, and would add the rows of a token one
after another in bfloat16, where 256 + 1 is 256. Legend: V vocab, E embed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

SMALL_TABLES = 1 << 20
"""The largest number of elements of the embedding tables, one a sample, for which `rows` sums gradients in two
steps."""


def transposable(spec: str) -> bool:
    """Return whether the gradients of both operands of an einsum are einsums too: no letter is in one term alone."""
    terms, _, out = spec.replace(" ", "").partition("->")
    if terms.count(",") != 1:
        return False
    x, w = terms.split(",")
    return all(len(set(t)) == len(t) for t in (x, w, out)) and set(x) ^ set(w) <= set(out) and set(out) <= {*x, *w}


def laid(x: Any, sharding: Any) -> Any:
    """Constrain x to a sharding; with None return x as given."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


Gathering = tuple[Any, Any]
"""The shardings of a parameter as used and as stored, or (None, None)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def contraction(spec: str, compute: Any, kind: Any, gathering: Gathering, x: Any, w: Any) -> Any:
    """Return einsum(spec, x, w) in dtype `compute`. w is a parameter of dtype `kind`, which is all-gathered first. Its
    gradient is summed in float32 and reduce-scattered."""
    return _einsum(spec, x.astype(compute), laid(w.astype(compute), gathering[0]), compute)


def _einsum(spec: str, x: Any, w: Any, out: Any) -> Any:
    return jnp.einsum(spec, x, w, preferred_element_type=out)


def _contraction(spec: str, compute: Any, kind: Any, gathering: Gathering, x: Any, w: Any) -> Any:
    used, stored = gathering
    low = laid(w.astype(compute), stored)  # kept with its stored sharding, gathered again in the backward pass
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
    """Return rows of a table: (..., E) for ids (...)."""
    b, (v, e) = ids.shape[0], table_VE.shape
    if ids.ndim < 2 or b * v * e > SMALL_TABLES:
        return jnp.take(table_VE, ids, axis=0, mode="clip")
    # One table a sample, so that the gradient is first summed within samples. In a small vocabulary some ids are so
    # frequent that adding their rows one after another would lose precision in float32.
    at = jnp.arange(b).reshape(b, *(1,) * (ids.ndim - 1))
    return jnp.broadcast_to(table_VE, (b, v, e)).at[at, ids].get(mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def low_rows(compute: Any, kind: Any, shape: tuple[int, int], find: Any, table_VE: Any, ids: Any) -> Any:
    """Run `find` (`rows`, or its version for a mesh) in dtype `compute`, for a parameter of dtype `kind` and this
    shape."""
    return find(table_VE.astype(compute), ids)


def _low_rows(compute: Any, kind: Any, shape: tuple[int, int], find: Any, table_VE: Any, ids: Any) -> Any:
    return find(table_VE.astype(compute), ids), ids


def _low_rows_back(compute: Any, kind: Any, shape: tuple[int, int], find: Any, ids: Any, g: Any) -> Any:
    _, back = jax.vjp(lambda table: find(table, ids), jnp.zeros(shape, jnp.float32))
    return back(g.astype(jnp.float32))[0].astype(kind), None


low_rows.defvjp(_low_rows, _low_rows_back)
