"""Contract a value with a parameter as one product of two matrices, for XLA on a CPU.

The gradient of a weight in `bse,ehd->bshd` sums over b and s. XLA first copies an operand so that both are one
dimension and the last one, and reads it with a stride of B S numbers, often a power of two: every access falls into
the same sets of the cache. If b and s are one dimension from the start, the gradient contracts dimension 0 of both
operands, and Eigen takes them as they are. On accelerators the compiler chooses layouts, so nothing is changed there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax

from portatrain.model.layout import BATCH_MESH_AXES, Layout


@dataclass(frozen=True)
class Product:
    """An einsum of a value and a parameter as a product of matrices: the numbers of letters that both operands and the
    result have (`shared`), that only the value has (`rows`), that are contracted, and that only the parameter has.
    `transposed`: the contracted letters of the parameter come last."""

    shared: int
    rows: int
    contracted: int
    transposed: bool

    def __call__(self, x: Any, w: Any, **options: Any) -> Any:
        """Return the einsum; `options` are those of `jax.lax.dot_general`."""
        shared, rows = x.shape[: self.shared], x.shape[self.shared : self.shared + self.rows]
        cut = w.ndim - self.contracted if self.transposed else self.shared + self.contracted
        first, last = w.shape[self.shared : cut], w.shape[cut:]
        sums, made = (last, first) if self.transposed else (first, last)
        x = x.reshape(*shared, math.prod(rows), math.prod(sums))
        w = w.reshape(*shared, math.prod(first), math.prod(last))
        n = self.shared
        both = tuple(range(n))
        contracted = ((n + 1,), (n + 1 if self.transposed else n,))
        return jax.lax.dot_general(x, w, (contracted, (both, both)), **options).reshape(*shared, *rows, *made)


@functools.cache
def product_of(spec: str) -> Product | None:
    """Return the product of matrices that an einsum of a value and a parameter is, in this order; None if the letters
    of one of the dimensions are not neighbours, or if every dimension has one letter already."""
    terms, _, out = spec.replace(" ", "").partition("->")
    x, _, w = terms.partition(",")
    if "," in w or "." in spec or any(len(set(term)) < len(term) for term in (x, w, out)):
        return None
    shared = "".join(k for k in x if k in w and k in out)
    rows = "".join(k for k in x if k not in w)
    sums = "".join(k for k in x if k in w and k not in out)
    made = "".join(k for k in w if k not in x)
    if x != shared + rows + sums or out != shared + rows + made or not (rows and sums and made):
        return None
    if len(rows) < 2 and len(sums) < 2:
        return None
    if w in (shared + sums + made, shared + made + sums):
        return Product(len(shared), len(rows), len(sums), w != shared + sums + made)
    return None


def may_merge(layout: Layout | None) -> bool:
    """Return whether a value's positions may become one dimension with its samples: nothing but samples is sharded."""
    if layout is None:
        return True
    over = {axis for axis, n in layout.mesh.sizes.items() if n > 1}
    return over <= set(BATCH_MESH_AXES) and not any(
        layout.mesh.over(layout.spec((axis,))[0]) > 1 for axis in ("seq", "res_seq")
    )
