"""The operations of `portatrain.model.ops_arrays.ArrayOps` in NumPy float64. Docstrings and legend are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from portatrain.backends.reference.trees import tree_map
from portatrain.errors import UserError
from portatrain.model import dropout_hash
from portatrain.model.ops_checks import (
    Axes,
    Sizes,
    axes_of,
    axis_of,
    check_kernel,
    check_kind,
    check_quiet,
    one_length,
    order_of,
    pieces_of,
    recorded,
    taps,
    windows,
)
from portatrain.model.ops_composed import STREAM

Array = np.ndarray


class ReferenceArrays:
    """The part of `ReferenceOps` that works on arrays."""

    step: Array
    layer: Array
    sample: Array
    _seed_2: Array

    # ---- elementwise

    def abs(self, x: Array) -> Array:
        return np.abs(x)

    def sign(self, x: Array) -> Array:
        return np.sign(x)

    def floor(self, x: Array) -> Array:
        return np.floor(x)

    def sqrt(self, x: Array) -> Array:
        return np.sqrt(x)

    def rsqrt(self, x: Array) -> Array:
        return 1 / np.sqrt(x)

    def sin(self, x: Array) -> Array:
        return np.sin(x)

    def cos(self, x: Array) -> Array:
        return np.cos(x)

    def erf(self, x: Array) -> Array:
        return np.vectorize(math.erf, otypes=[float])(x)

    def log1p(self, x: Array) -> Array:
        return np.log1p(x)

    def expm1(self, x: Array) -> Array:
        return np.expm1(x)

    def softplus(self, x: Array) -> Array:
        return np.logaddexp(0, x)

    def clip(self, x: Array, low: float, high: float) -> Array:
        return np.clip(x, low, high)

    def maximum(self, x: Array, y: Array | float) -> Array:
        return np.maximum(x, y)

    def minimum(self, x: Array, y: Array | float) -> Array:
        return np.minimum(x, y)

    # ---- reductions

    def max(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        return x.max(axes_of("ops.max", x, axis, some=True), keepdims=keepdims)

    def min(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        return x.min(axes_of("ops.min", x, axis, some=True), keepdims=keepdims)

    def argmax(self, x: Array, *, axis: int = -1) -> Array:
        return x.argmax(axes_of("ops.argmax", x, axis, some=True)[0]).astype(np.int32)

    def argmin(self, x: Array, *, axis: int = -1) -> Array:
        return x.argmin(axes_of("ops.argmin", x, axis, some=True)[0]).astype(np.int32)

    def logsumexp(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        axes = axes_of("ops.logsumexp", x, axis, some=True)
        top = x.max(axes, keepdims=True)
        top = np.where(np.isinf(top), 0.0, top)
        found = np.log(np.exp(x - top).sum(axes, keepdims=True)) + top
        return found if keepdims else found.squeeze(axes)

    def log_softmax(self, x: Array, *, axis: int = -1) -> Array:
        axis = axis_of("ops.log_softmax", x, axis)
        centred = x - x.max(axis, keepdims=True, initial=-np.inf)
        return centred - np.log(np.exp(centred).sum(axis, keepdims=True))

    def var(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        return x.var(axes_of("ops.var", x, axis, some=True), keepdims=keepdims)

    def std(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        return x.std(axes_of("ops.std", x, axis, some=True), keepdims=keepdims)

    def norm(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        return np.sqrt((x * x).sum(axes_of("ops.norm", x, axis), keepdims=keepdims))

    def cumsum(self, x: Array, *, axis: int) -> Array:
        return x.cumsum(axis_of("ops.cumsum", x, axis), dtype=x.dtype)

    # ---- order and indices

    def sort(self, x: Array, *, axis: int = -1, descending: bool = False) -> Array:
        return np.take_along_axis(x, self.argsort(x, axis=axis, descending=descending), axis)

    def argsort(self, x: Array, *, axis: int = -1, descending: bool = False) -> Array:
        axis = axis_of("ops.argsort", x, axis)
        if not descending:
            return np.argsort(x, axis, kind="stable").astype(np.int32)
        backwards = np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
        return (x.shape[axis] - 1 - backwards).astype(np.int32)

    def take_along(self, x: Array, index: Array, *, axis: int) -> Array:
        axis = axis_of("ops.take_along", x, axis)
        return np.take_along_axis(*_along(x, index, axis), axis)

    def scatter_add(self, x: Array, index: Array, value: Array, *, axis: int) -> Array:
        axis = axis_of("ops.scatter_add", x, axis)
        index = np.clip(np.broadcast_to(index, value.shape), 0, x.shape[axis] - 1)
        places: list[Any] = list(np.indices(value.shape, sparse=True))
        places[axis] = index
        found = x.copy()
        np.add.at(found, tuple(places), value)
        return found

    # ---- shapes

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return x.transpose(order_of("ops.transpose", x, axes))

    def flip(self, x: Array, *, axis: Axes) -> Array:
        return np.flip(x, axes_of("ops.flip", x, axis))

    def roll(self, x: Array, shift: int, *, axis: int) -> Array:
        return np.roll(x, shift, axis_of("ops.roll", x, axis))

    def pad(self, x: Array, *, axis: int, before: int = 0, after: int = 0, value: float = 0.0) -> Array:
        axis = axis_of("ops.pad", x, axis)
        return np.pad(x, [(before, after) if a == axis else (0, 0) for a in range(x.ndim)], constant_values=value)

    def join(self, xs: Sequence[Array], *, axis: int) -> Array:
        return np.stack(xs, axis_of("ops.join", xs[0][..., None], axis))

    def split(self, x: Array, parts: int | Sequence[int], *, axis: int = -1) -> tuple[Array, ...]:
        axis = axis_of("ops.split", x, axis)
        ends = np.cumsum(pieces_of("ops.split", x, parts, axis))
        return tuple(np.split(x, ends[:-1], axis))

    # ---- convolutions and images

    def conv(
        self, x: Array, kernel: Array, *, stride: Sizes = 1, padding: str = "same", dilation: Sizes = 1, groups: int = 1
    ) -> Array:
        check_kernel(x, kernel, groups)
        size = kernel.shape[0] if x.ndim == 3 else kernel.shape[:2]
        _, strides, dilations, pads = windows("ops.conv", x, size, stride, padding, dilation)
        seen = _windows(np.pad(x, [(0, 0), *pads, (0, 0)]), kernel.shape[:-2], strides, dilations)  # (B, ..., C, K...)
        into, out = kernel.shape[-2], kernel.shape[-1] // groups
        spatial = "k" if x.ndim == 3 else "kl"
        return np.concatenate(
            [
                np.einsum(
                    f"...c{spatial},{spatial}cd->...d",
                    seen.take(range(g * into, (g + 1) * into), x.ndim - 1),
                    kernel[..., g * out : (g + 1) * out],
                )
                for g in range(groups)
            ],
            -1,
        )

    def pool(self, x: Array, size: Sizes, *, kind: str, stride: Sizes | None = None, padding: str = "valid") -> Array:
        check_kind("ops.pool, kind", kind, ("max", "mean"))
        sizes, strides, dilations, pads = windows("ops.pool", x, size, stride, padding)
        fill, whole = (-np.inf if kind == "max" else 0.0), [(0, 0), *pads, (0, 0)]
        last = tuple(range(-len(sizes), 0))
        seen = _windows(np.pad(x, whole, constant_values=fill), sizes, strides, dilations)
        if kind == "max":
            return seen.max(last)
        return seen.sum(last) / _windows(np.pad(np.ones_like(x), whole), sizes, strides, dilations).sum(last)

    def resize(self, x: Array, size: Sizes, *, method: str) -> Array:
        for axis, m in enumerate(windows("ops.resize", x, size, None, "same")[0], start=1):
            low, high, weights = taps(x.shape[axis], m, method)
            at = np.array(weights).reshape(m, *(1,) * (x.ndim - axis - 1))
            x = x.take(low, axis) * (1 - at) + x.take(high, axis) * at if any(weights) else x.take(low, axis)
        return x

    # ---- scans and noise

    def scan(self, fn: Callable[..., Any], carry: Any, xs: Any) -> tuple[Any, Any]:
        before, ys = recorded(self), []
        for t in range(_length("ops.scan", xs, 1)):
            carry, y = fn(carry, tree_map(lambda x, t=t: x[:, t], xs))
            ys.append(y)
        check_quiet(self, before)
        return carry, tree_map(lambda *parts: np.stack(parts, 1), *ys)

    def associative_scan(self, fn: Callable[[Any, Any], Any], xs: Any, *, axis: int = 1) -> Any:
        n = _length("ops.associative_scan", xs, axis)
        each = [tree_map(lambda x, i=i: x.take([i], axis), xs) for i in range(n)]
        for i in range(1, n):
            each[i] = fn(each[i - 1], each[i])
        return tree_map(lambda *parts: np.concatenate(parts, axis), *each)

    def noise(self, *shape: int, site: int, kind: str = "normal", draw: int = 0) -> Array:
        check_kind("ops.noise, kind", kind, ("normal", "uniform"))
        with np.errstate(over="ignore"):
            keys_B = dropout_hash.sample_keys(self._seed_2, self.step, site, self.layer, self.sample)
            first_B1 = dropout_hash.mix(keys_B ^ np.int32(STREAM + draw))[:, None]
            at = np.arange(math.prod(shape), dtype=np.int32)[None, :]
            one, two = (dropout_hash.random_bits(k, at) * 2.0**-24 for k in (first_B1, dropout_hash.mix(first_B1 + 1)))
        made = one if kind == "uniform" else np.sqrt(-2 * np.log(1 - one)) * np.cos(2 * np.pi * two)
        return made.reshape(self.sample.shape[0], *shape)


def _along(x: Array, index: Array, axis: int) -> tuple[Array, Array]:
    """x and index, clipped, with sizes of 1 broadcast but along the axis."""
    if index.ndim != x.ndim:
        raise UserError(
            "ops.take_along",
            expected=f"an index with the {x.ndim} axes of the array",
            got=f"{index.ndim} axes",
            do="Give it axes of size 1 where it is the same for all: index[:, :, None].",
        )
    index = np.clip(index, 0, x.shape[axis] - 1)
    shape = np.broadcast_shapes(*((*a.shape[:axis], 1, *a.shape[axis + 1 :]) for a in (x, index)))
    return tuple(  # type: ignore[return-value]
        np.broadcast_to(a, (*shape[:axis], a.shape[axis], *shape[axis + 1 :])) for a in (x, index)
    )


def _windows(x: Array, sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """(B, L', C, K) or (B, H', W', C, K, K')."""
    reach = [(k - 1) * d + 1 for k, d in zip(sizes, dilations, strict=True)]
    seen = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(1, len(sizes) + 1)))
    steps = [slice(None, None, s) for s in strides]
    return seen[(slice(None), *steps, slice(None), *(slice(None, None, d) for d in dilations))]


def _length(what: str, xs: Any, axis: int) -> int:
    """The size of the axis, of all arrays of a tree."""
    sizes: set[int] = set()
    tree_map(lambda x: sizes.add(x.shape[axis_of(what, x, axis)]), xs)
    return one_length(what, sizes)
