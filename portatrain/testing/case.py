"""A case of the contract, and the functions that draw its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from portatrain.backends.base import Context

Rng = np.random.Generator
Args = tuple[np.ndarray, ...]
BOTH = ("fp32", "bf16")
FP32 = ("fp32",)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """`fn(ops, *args)` with arguments drawn by `args(rng)`.

    gradient: whether gradients are compared (first_only: of the first result alone). constant: arguments through
    which no gradient may flow. exact: the result must equal the oracle's float32 values bit for bit.
    """

    name: str
    fn: Callable[..., Any]
    args: Callable[[Rng], Args]
    gradient: bool = True
    first_only: bool = False
    constant: tuple[int, ...] = ()
    exact: bool = False
    precisions: tuple[str, ...] = BOTH
    context: Context = field(default_factory=Context)


def normal(*shapes: tuple[int, ...], scale: float = 1.0) -> Callable[[Rng], Args]:
    return lambda rng: tuple((scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes)


def with_ints(*shapes: tuple[int, ...], ints: list[Any]) -> Callable[[Rng], Args]:
    """Normal arrays, then the given integer arrays."""
    return lambda rng: (*normal(*shapes)(rng), *(np.array(i, np.int32) for i in ints))
