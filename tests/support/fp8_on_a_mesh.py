"""Products of precision fp8 in jax on four simulated devices and on one: print by what shares a scale, and by how the
weight is sharded, which arrays differ in any bit. Run in a process of its own."""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from portatrain.backends.choose_kernel import choose
from portatrain.backends.jax import fp8
from portatrain.backends.kernels import Case, Site
from portatrain.model.fp8 import SCALINGS, form_of

NAMES = ("result", "gradient of x", "gradient of w")


def arrays() -> list[np.ndarray]:
    """Return x (4, 6, 8), w (8, 4) and the gradient of the result. Every shard has numbers of another size, so a scale
    of a shard alone would round others; they are small integers times powers of two, so no sum is rounded."""
    rng = np.random.default_rng(3)
    shapes = ((4, 6, 8), (8, 4), (4, 6, 4))
    found = [rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes]
    for x in found:
        for axis, n in enumerate(x.shape):
            if (x.ndim, axis) == (3, 0):  # samples
                continue
            size = np.where(np.arange(n) < n // 2, 1.0, 2.0**-9)
            x *= size.reshape([-1 if i == axis else 1 for i in range(x.ndim)]).astype(np.float32)
    return found


def run(scaling: str, cut: int | None) -> list[np.ndarray]:
    """Return the product and the gradients of both operands. `cut`: the axis of w that is sharded over tensor, the
    contracted one (0) or the other; None: one device."""
    form = form_of("bse,em->bsm", 1, scaling)
    assert form is not None
    kernel = choose("fp8_matmul", Case(site=Site(backend="jax"), dtype="bfloat16", shape=(8, 8, 8))).kernel

    def of(x: Any, w: Any) -> Any:
        return fp8.contraction(form, jnp.float32, w.dtype, (None, None), (kernel, ""), x, w)

    @jax.jit
    def both(x: Any, w: Any, g: Any) -> Any:
        y, back = jax.vjp(of, x, w)
        return y, *back(g)

    mesh = Mesh(
        np.array(jax.devices()[: 1 if cut is None else 4]).reshape((1, 1) if cut is None else (2, 2)), ("f", "t")
    )
    over = functools.partial(NamedSharding, mesh)
    lies = [P("f", None, "t"), P("t"), P("f")] if cut == 0 else [P("f"), P(None, "t"), P("f", None, "t")]
    x, w, g = (jax.device_put(a, over(s)) for a, s in zip(arrays(), lies, strict=True))
    return [np.asarray(a) for a in both(x, w, g)]


def main() -> int:
    found = {}
    for scaling in SCALINGS:
        one = run(scaling, None)
        for cut in (0, 1):
            many = run(scaling, cut)
            bad = [name for name, a, b in zip(NAMES, one, many, strict=True) if not np.array_equal(a, b)]
            found[f"{scaling}, axis {cut}"] = bad
        found[f"{scaling}, rounded"] = [name for name, a, b in zip(NAMES, one, exact(), strict=True) if (a != b).any()]
    print(json.dumps(found))
    return 0


def exact() -> list[np.ndarray]:
    """Return the products of the operands as they are."""
    x, w, g = arrays()
    return [np.einsum("bse,em->bsm", x, w), np.einsum("bsm,em->bse", g, w), np.einsum("bse,bsm->em", x, g)]


if __name__ == "__main__":
    sys.exit(main())
