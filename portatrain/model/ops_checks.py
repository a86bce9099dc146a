"""Checks of the arguments of operations on arrays, which all backends make, and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from portatrain.errors import UserError, choice

Array = Any
Axes = int | Sequence[int]
Sizes = int | tuple[int, ...]
"""One number for all spatial axes, or one for each."""


def axis_of(what: str, x: Array, axis: int) -> int:
    """`axis` counted from the front; raise UserError for the batch's axis and for one that x does not have."""
    if not 1 <= (found := axis + x.ndim if axis < 0 else axis) < x.ndim:
        batch = found == 0
        raise UserError(
            f"{what}, axis={axis} of an array with {x.ndim} axes",
            expected="one of its axes but the first, which is the batch's",
            got="the first" if batch else "none of them",
            do="Reduce over samples with ops.sum or ops.mean and over=; give an array without batch as x[None]."
            if batch
            else f"Use an axis from 1 to {x.ndim - 1}, or from -1 to {1 - x.ndim}.",
        )
    return found


def axes_of(what: str, x: Array, axis: Axes, *, some: bool = False) -> tuple[int, ...]:
    """`axis` as distinct axes counted from the front; some: each must have an element."""
    found = tuple(axis_of(what, x, a) for a in ((axis,) if isinstance(axis, int) else axis))
    if len(set(found)) != len(found):
        raise UserError(f"{what}, axis={axis}", expected="every axis once", got=str(axis), do="Name each axis once.")
    if some and any(x.shape[a] == 0 for a in found):
        raise UserError(
            f"{what} of shape {tuple(x.shape)}",
            expected="at least one element along the axis",
            got="none",
            do="Choose among at least one element.",
        )
    return found


def order_of(what: str, x: Array, axes: Sequence[int]) -> tuple[int, ...]:
    """The axes of a transpose."""
    found = tuple(a + x.ndim if a < 0 else a for a in axes)
    if sorted(found) != list(range(x.ndim)) or found[:1] != (0,):
        raise UserError(
            f"{what} of an array with {x.ndim} axes",
            expected="every axis once, the batch's first: 0, ...",
            got=str(tuple(axes)),
            do="Leave axis 0 in its place; give an array without batch as x[None].",
        )
    return found


def pieces_of(what: str, x: Array, parts: int | Sequence[int], axis: int) -> list[int]:
    """The sizes of the pieces of a split."""
    n = x.shape[axis]
    sizes = list(parts) if not isinstance(parts, int) else [n // parts] * parts if parts > 0 else []
    if not sizes or sum(sizes) != n or min(sizes) < 0:
        raise UserError(
            f"{what} of {n} elements",
            expected="a number of parts that divides them, or sizes that add up to them",
            got=str(parts),
            do="Give other parts.",
        )
    return sizes


def windows(
    what: str, x: Array, size: Sizes, stride: Sizes | None, padding: str, dilation: Sizes = 1
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    """(sizes, strides, dilations, zeros before and after) for each of the one or two spatial axes of x."""
    rank = x.ndim - 2
    if rank not in (1, 2):
        raise UserError(
            what,
            expected="an array (B, L, C) or (B, H, W, C)",
            got=f"{x.ndim} axes",
            do="Reshape it: channels come last.",
        )
    kinds = ("same", "valid", "causal") if what == "ops.conv" and rank == 1 else ("same", "valid")
    if padding not in kinds:
        raise choice(f"{what}, padding", padding, kinds)

    def each(value: Sizes | None) -> tuple[int, ...]:
        found = value if isinstance(value, tuple) else (value,) * rank
        if len(found) != rank or not all(isinstance(n, int) and n >= 1 for n in found):
            raise UserError(
                what, expected=f"a whole number of at least 1, or {rank} of them", got=repr(value), do="Give those."
            )
        return found

    sizes, dilations = each(size), each(dilation)
    strides = sizes if stride is None else each(stride)
    pads = []
    for n, k, s, d in zip(x.shape[1:-1], sizes, strides, dilations, strict=True):
        reach = (k - 1) * d
        if padding == "same":
            zeros = max(0, (-(-n // s) - 1) * s + reach + 1 - n)
            pads.append((zeros // 2, zeros - zeros // 2))
        else:
            pads.append((reach, 0) if padding == "causal" else (0, 0))
        if n + sum(pads[-1]) <= reach:
            raise UserError(
                f"{what} of shape {tuple(x.shape)}",
                expected=f"at least {reach + 1} elements along each axis of the window",
                got=str(n),
                do="Use a smaller window, or padding='same'.",
            )
    return sizes, strides, dilations, tuple(pads)


def check_kernel(x: Array, kernel: Array, groups: int) -> None:
    """Raise UserError unless a kernel fits the channels."""
    channels, into, out = x.shape[-1], kernel.shape[-2], kernel.shape[-1]
    if kernel.ndim != x.ndim or groups < 1 or into * groups != channels or out % groups:
        raise UserError(
            f"ops.conv of {tuple(x.shape)} with groups={groups}",
            expected=f"a kernel of {x.ndim} axes that ends in ({channels}/groups, D), D a multiple of groups",
            got=str(tuple(kernel.shape)),
            do="Give the kernel as (K, C/groups, D) or (K, K', C/groups, D).",
        )


def taps(n: int, m: int, method: str) -> tuple[list[int], list[int], list[float]]:
    """Resizing n elements to m: (lower neighbours, upper neighbours, weights of the upper), for each of the m."""
    if method not in ("nearest", "linear"):
        raise choice("ops.resize, method", method, ("nearest", "linear"))
    if method == "nearest":
        at = [min((2 * i + 1) * n // (2 * m), n - 1) for i in range(m)]
        return at, at, [0.0] * m
    low, high, weights = [], [], []
    for i in range(m):
        centre = min(max((i + 0.5) * n / m - 0.5, 0.0), n - 1.0)
        low.append(int(centre))
        high.append(min(int(centre) + 1, n - 1))
        weights.append(centre - int(centre))
    return low, high, weights


def recorded(ops: Any) -> list[Any]:
    """What a model has recorded so far, for `check_quiet`."""
    return [*ops.auxes.values(), *ops.tallies.values()]


def check_quiet(ops: Any, before: list[Any], what: str = "ops.scan") -> None:
    """Raise UserError if something was recorded since: what a function that `what` runs records cannot leave it."""
    after = recorded(ops)
    if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
        raise UserError(
            what,
            expected="a function that records nothing",
            got="a call of ops.aux or ops.tally inside",
            do=f"Return the value, and record it after {what}.",
        )


def check_kind(what: str, kind: str, kinds: Sequence[str]) -> None:
    if kind not in kinds:
        raise choice(what, kind, kinds)


def one_length(what: str, sizes: set[int]) -> int:
    """The one length of arrays that are scanned; raise UserError where they differ."""
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(
            what,
            expected="arrays of one length, at least 1, along the axis",
            got=", ".join(map(str, sorted(sizes))) or "no arrays",
            do="Give xs of equal length.",
        )
    return next(iter(sizes))
