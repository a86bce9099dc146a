"""A call of every operation of `ArrayOps`, with sizes that two devices divide: what the tests of meshes run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SHAPE = (2, 4, 6)
_INDEX = np.array([[[3], [0], [9]], [[1], [1], [-1]]], np.int32)

ELEMENTWISE = ("abs", "sign", "floor", "sin", "cos", "erf", "expm1", "softplus")
POSITIVE = ("sqrt", "rsqrt", "log1p")
REDUCTIONS = ("max", "min", "logsumexp", "var", "std", "norm")
CHOICES = ("argmax", "argmin")
ORDERS = ("log_softmax", "cumsum", "sort", "argsort", "flip")

Call = Callable[[Any, Any, Any, Any], Any]
"""fn(ops, x, kernel, index) with x of SHAPE, kernel (3, 6, 4), index (2, 3, 1)."""


def _table() -> dict[str, Call]:
    made: dict[str, Call] = {}
    for name in ELEMENTWISE:
        made[name] = lambda ops, x, k, i, name=name: getattr(ops, name)(x)  # type: ignore[misc]
    for name in POSITIVE:
        made[name] = lambda ops, x, k, i, name=name: getattr(ops, name)(x * x + 0.5)  # type: ignore[misc]
    for name in (*REDUCTIONS, *CHOICES, *ORDERS):
        for axis in (1, 2):
            made[f"{name} {axis}"] = lambda ops, x, k, i, name=name, axis=axis: getattr(ops, name)(x, axis=axis)  # type: ignore[misc]
    for axis in (1, 2):
        made |= {
            f"roll {axis}": lambda ops, x, k, i, axis=axis: ops.roll(x, 1, axis=axis),  # type: ignore[misc]
            f"pad {axis}": lambda ops, x, k, i, axis=axis: ops.pad(x, axis=axis, before=1, after=3, value=2.0),  # type: ignore[misc]
            f"join {axis}": lambda ops, x, k, i, axis=axis: ops.join([x, x * 2.0], axis=axis),  # type: ignore[misc]
            f"split {axis}": lambda ops, x, k, i, axis=axis: ops.split(x, 2, axis=axis)[1],  # type: ignore[misc]
            f"associative_scan {axis}": lambda ops, x, k, i, axis=axis: ops.associative_scan(  # type: ignore[misc]
                lambda a, b: a * 0.5 + b, x, axis=axis
            ),
        }
    return made | {
        "max of both, kept": lambda ops, x, k, i: ops.max(x, axis=(1, 2), keepdims=True),
        "clip": lambda ops, x, k, i: ops.clip(x, -0.5, 0.5),
        "maximum": lambda ops, x, k, i: ops.maximum(x, 0.25),
        "minimum": lambda ops, x, k, i: ops.minimum(x, x * 0.5),
        "take_along": lambda ops, x, k, i: ops.take_along(x, i, axis=1),
        "scatter_add": lambda ops, x, k, i: ops.scatter_add(x, i, ops.take_along(x, i, axis=1) * 2.0, axis=1),
        "transpose": lambda ops, x, k, i: ops.transpose(x, (0, 2, 1)),
        "conv": lambda ops, x, k, i: ops.conv(x, k, padding="causal"),
        "pool": lambda ops, x, k, i: ops.pool(x, 2, kind="max"),
        "pool, mean": lambda ops, x, k, i: ops.pool(x, 3, kind="mean", stride=1, padding="same"),
        "resize": lambda ops, x, k, i: ops.resize(x, 7, method="linear"),
        "scan": lambda ops, x, k, i: ops.scan(lambda h, x: (h * 0.5 + x, h * x), x[:, 0], x)[1],
        "noise": lambda ops, x, k, i: ops.noise(4, 6, site=5) + x,
    }


TABLE = _table()


def arguments() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=SHAPE).astype(np.float32), rng.normal(size=(3, 6, 4)).astype(np.float32), _INDEX


def weight(shape: tuple[int, ...]) -> np.ndarray:
    """What a result is weighted with before it is summed, so that its gradient is of no special form."""
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)
