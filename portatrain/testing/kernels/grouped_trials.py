"""The hard cases of a grouped matmul: x (N, E) rows sorted by expert, w (X, E, F), sizes (X,) with a sum <= N."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from portatrain.testing.kernels.grouped_oracle import grouped_matmul
from portatrain.testing.kernels.trial import BOTH, FLOAT32, Draw, Rng, Trial

# name -> (N, E, F), sizes
_SIZES: dict[str, tuple[tuple[int, int, int], list[int]]] = {
    "even": ((24, 16, 16), [6, 6, 6, 6]),
    "ragged": ((24, 16, 16), [1, 11, 3, 9]),
    "first empty": ((24, 16, 16), [0, 8, 8, 8]),
    "last empty": ((24, 16, 16), [8, 8, 8, 0]),
    "neighbours empty": ((24, 16, 16), [12, 0, 0, 12]),
    "all to the first": ((24, 16, 16), [24, 0, 0, 0]),
    "all to the last": ((24, 16, 16), [0, 0, 0, 24]),
    "one row": ((24, 16, 16), [0, 1, 0, 0]),
    "nothing": ((24, 16, 16), [0, 0, 0, 0]),
    "rows past the sum": ((24, 16, 16), [5, 0, 7, 3]),
    "one row past the sum": ((24, 16, 16), [5, 8, 7, 3]),
    "127 rows": ((127, 16, 16), [64, 0, 63, 0]),
    "128 rows": ((128, 16, 16), [64, 0, 64, 0]),
    "129 rows": ((129, 16, 16), [127, 1, 0, 1]),
    "129 rows, 128 used": ((129, 16, 16), [1, 127, 0, 0]),
    "one expert": ((33, 16, 16), [33]),
    "one row of one expert": ((1, 16, 16), [1]),
    "sixteen experts": ((40, 8, 24), [3, 0, 5, 1, 0, 0, 7, 2, 4, 0, 1, 6, 0, 3, 8, 0]),
    "sizes 64 x 128": ((48, 64, 128), [16, 0, 17, 15]),
    "sizes 128 x 64": ((48, 128, 64), [15, 17, 0, 10]),
    "sizes 256 x 8": ((16, 256, 8), [3, 0, 13]),
    "sizes 127 x 129": ((20, 127, 129), [3, 0, 10, 7]),
    "sizes 129 x 127": ((20, 129, 127), [3, 0, 10, 5]),
    "sizes 1 x 1": ((9, 1, 1), [2, 0, 4]),
    "sizes 1 x 16": ((9, 1, 16), [2, 0, 7]),
    "sizes 16 x 1": ((9, 16, 1), [2, 0, 7]),
    "long groups": ((520, 8, 8), [513, 0, 7]),
    "no rows": ((0, 16, 16), [0, 0, 0]),
}

_SHAPE = (24, 16, 16)
_ALSO_BFLOAT16 = ("129 rows", "sizes 64 x 128", "sizes 127 x 129", "long groups")


def _normal(n: int, e: int, f: int, x: int) -> Draw:
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": rng.normal(size=(n, e)), "w": rng.normal(size=(x, e, f)), "g": rng.normal(size=(n, f))}

    return draw


def _scaled(draw: Draw, **factors: Any) -> Draw:
    """Multiply operands by a factor or an array that broadcasts to them."""

    def changed(rng: Rng) -> dict[str, np.ndarray]:
        return {name: array * factors.get(name, 1.0) for name, array in draw(rng).items()}

    return changed


def grouped_trials() -> list[Trial]:
    """Return the table."""
    found = []

    def add(name: str, shape: tuple[int, int, int], sizes: Sequence[int], draw: Draw) -> None:
        found.append(
            Trial(
                operation="grouped_matmul",
                name=name,
                shape=(*shape, len(sizes)),
                draw=draw,
                oracle=grouped_matmul,
                indices={"sizes_X": np.array(sizes, np.int32)},
                dtypes=BOTH if shape == _SHAPE or name in _ALSO_BFLOAT16 else FLOAT32,
            )
        )

    for name, (shape, sizes) in _SIZES.items():
        add(name, shape, sizes, _normal(*shape, len(sizes)))
    shape, sizes = _SHAPE, [5, 0, 7, 3]
    plain, past = _normal(*shape, 4), np.where(np.arange(24) < 15, 1.0, 1e9)[:, None]
    add("zeros", shape, sizes, _scaled(plain, x=0.0))
    add("all zeros", shape, sizes, _scaled(plain, x=0.0, w=0.0, g=0.0))
    add("numbers of 1e-30", shape, sizes, _scaled(plain, x=1e-30))
    add("weights of 1e-30", shape, sizes, _scaled(plain, w=1e-30))
    add("numbers of 1e15", shape, sizes, _scaled(plain, x=1e15, w=1e15))
    add("denormals", shape, sizes, _scaled(plain, x=1e-40))
    add("huge rows past the sum", shape, sizes, _scaled(plain, x=past))
    add("huge gradients past the sum", shape, sizes, _scaled(plain, g=past))
    add("huge weights of an empty expert", shape, sizes, _scaled(plain, w=np.array([1, 1e9, 1, 1])[:, None, None]))
    add("weights of very different experts", shape, sizes, _scaled(plain, w=10.0 ** np.arange(-8, 8, 4)[:, None, None]))
    return found
