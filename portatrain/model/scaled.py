"""`Scaled`: a parameter with a multiplier where its features are contracted, as muP has it (`portatrain.model.widths`).

It replaces the parameter in the built model and has its name, as the modules of LoRA and fp8 do. The operation decides:
`ops.einsum` multiplies by 1 / (the growth of the axes that it contracts), `ops.cross_entropy` by that of the features,
and `ops.embed`, which looks rows up, by nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

from portatrain.errors import UserError
from portatrain.model.module import Module, Param


class Scaled(Module):
    """A parameter whose axes have grown by `growth` since the base width, without axes of Stacks."""

    unnamed: ClassVar[tuple[str, ...]] = ("base",)

    def __init__(self, base: Param, growth: tuple[float, ...]) -> None:
        self.base: Any = base
        self.growth = growth
        self.is_table = base.fan_in_axes == 0

    def contracted(self, einsum: Callable[..., Any], spec: str, operands: tuple[Any, ...], dtype: str | None) -> Any:
        """Return `einsum(spec, *operands)` with this parameter, one of the operands, and its multiplier."""
        at = next(i for i, x in enumerate(operands) if x is self)
        product = einsum(spec, *operands[:at], self.base, *operands[at + 1 :], dtype=dtype)  # refuses a wrong spec
        inputs, _, out = spec.replace(" ", "").partition("->")
        mine = inputs.split(",")[at]
        grown = math.prod(n for letter, n in zip(mine, self.growth, strict=True) if letter not in out)
        return product if grown == 1 else product * (1 / grown)


def unscaled(p: Any) -> Any:
    """Return the parameter in `p` if it is a `Scaled` table, else `p`.

    Raises:
        UserError: `p` is a scaled weight, in an operation other than `ops.einsum`.
    """
    if not isinstance(p, Scaled):
        return p
    if not p.is_table:
        raise UserError(
            f"muP on {p.path}",
            expected="an output weight (its fan-in grows with the width, its fan-out does not) in ops.einsum alone",
            got="a use in another operation",
            do="Use ops.einsum, or leave it as in the standard parametrization: add it to `fixed` of MuP.",
        )
    return p.base


def looks_up(embed: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method `embed` of an `Ops` class, extended to scaled tables: their rows are as they are."""

    @functools.wraps(embed)
    def through(self: Any, table_VE: Any, ids: Any) -> Any:
        return self.embed(unscaled(table_VE), ids) if isinstance(table_VE, Scaled) else embed(self, table_VE, ids)

    return through


def scores(cross_entropy: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method `cross_entropy` of an `Ops` class, extended to scaled tables: it multiplies the features."""

    @functools.wraps(cross_entropy)
    def through(self: Any, x: Any, table_VE: Any, targets: Any, **options: Any) -> Any:
        if not isinstance(table_VE, Scaled):
            return cross_entropy(self, x, table_VE, targets, **options)
        return self.cross_entropy(x * (1 / table_VE.growth[-1]), table_VE.base, targets, **options)

    return through
