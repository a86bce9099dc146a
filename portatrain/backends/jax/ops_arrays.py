"""Implement `portatrain.model.ops_arrays.ArrayOps` in JAX. That module has the docstrings and the legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from portatrain.model.measured import hushing
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
    windows,
)
from portatrain.model.ops_composed import Composed, associative_scan


class JaxArrays(Composed):
    """Implement the operations of `JaxOps` that work on arrays."""

    compute: Any
    _precision: Any
    weight: Callable[[Any], Any]

    # ---- what `Composed` needs

    def _total(self, x: Any, axis: Axes, keepdims: bool) -> Any:
        return jnp.sum(x, axis=axes_of("ops.sum", x, axis), keepdims=keepdims)

    def _as(self, x: Any, like: Any) -> Any:
        return x.astype(like.dtype)

    def _without(self, x: Any, axis: Axes) -> Any:
        return jnp.squeeze(x, axes_of("ops.squeeze", x, axis))

    def _take(self, x: Any, at: Sequence[int], axis: int) -> Any:
        return jnp.take(x, np.array(at, np.int32), axis=axis)

    def _constant(self, values: Sequence[float], shape: tuple[int, ...]) -> Any:
        return jnp.asarray(np.array(values, np.float32).reshape(shape))

    # ---- elementwise

    def abs(self, x: Any) -> Any:
        return x * jax.lax.stop_gradient(jnp.sign(x))  # jnp.abs has derivative 1 at 0

    def sign(self, x: Any) -> Any:
        return jnp.sign(x)

    def floor(self, x: Any) -> Any:
        return jnp.floor(x)

    def sqrt(self, x: Any) -> Any:
        return jnp.sqrt(x)

    def rsqrt(self, x: Any) -> Any:
        return jax.lax.rsqrt(x)

    def sin(self, x: Any) -> Any:
        return jnp.sin(x)

    def cos(self, x: Any) -> Any:
        return jnp.cos(x)

    def erf(self, x: Any) -> Any:
        return jax.lax.erf(x)

    def log1p(self, x: Any) -> Any:
        return jnp.log1p(x)

    def expm1(self, x: Any) -> Any:
        return jnp.expm1(x)

    def softplus(self, x: Any) -> Any:
        return jax.nn.softplus(x)

    def clip(self, x: Any, low: float, high: float) -> Any:
        # jnp.clip has derivative 1/2 at its bounds.
        return jnp.where(x < low, low, jnp.where(x > high, high, x)).astype(x.dtype)

    def maximum(self, x: Any, y: Any) -> Any:
        return jnp.maximum(x, y)

    def minimum(self, x: Any, y: Any) -> Any:
        return jnp.minimum(x, y)

    # ---- reductions

    def max(self, x: Any, *, axis: Axes = -1, keepdims: bool = False) -> Any:
        return jnp.max(x, axis=axes_of("ops.max", x, axis, some=True), keepdims=keepdims)

    def argmax(self, x: Any, *, axis: int = -1) -> Any:
        return jnp.argmax(x, axis=axes_of("ops.argmax", x, axis, some=True)[0]).astype(jnp.int32)

    def log_softmax(self, x: Any, *, axis: int = -1) -> Any:
        axis = axis_of("ops.log_softmax", x, axis)
        return jax.nn.log_softmax(x.astype(jnp.float32), axis=axis).astype(x.dtype)

    def cumsum(self, x: Any, *, axis: int) -> Any:
        axis = axis_of("ops.cumsum", x, axis)
        wide = jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jnp.cumsum(x, axis=axis, dtype=wide).astype(x.dtype)

    # ---- order and indices

    def argsort(self, x: Any, *, axis: int = -1, descending: bool = False) -> Any:
        axis = axis_of("ops.argsort", x, axis)
        if not descending:
            return jnp.argsort(x, axis=axis, stable=True).astype(jnp.int32)
        backwards = jnp.flip(jnp.argsort(jnp.flip(x, axis), axis=axis, stable=True), axis)
        return (x.shape[axis] - 1 - backwards).astype(jnp.int32)

    def take_along(self, x: Any, index: Any, *, axis: int) -> Any:
        return jnp.take_along_axis(x, index, axis=axis_of("ops.take_along", x, axis), mode="clip")

    def scatter_add(self, x: Any, index: Any, value: Any, *, axis: int) -> Any:
        axis = axis_of("ops.scatter_add", x, axis)
        index = jnp.clip(jnp.broadcast_to(index, value.shape), 0, x.shape[axis] - 1)
        places = list(jnp.indices(value.shape, sparse=True))
        places[axis] = index
        return x.at[tuple(places)].add(value.astype(x.dtype))

    # ---- shapes

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        return jnp.transpose(x, order_of("ops.transpose", x, axes))

    def flip(self, x: Any, *, axis: Axes) -> Any:
        return jnp.flip(x, axes_of("ops.flip", x, axis))

    def roll(self, x: Any, shift: int, *, axis: int) -> Any:
        return jnp.roll(x, shift, axis_of("ops.roll", x, axis))

    def pad(self, x: Any, *, axis: int, before: int = 0, after: int = 0, value: float = 0.0) -> Any:
        axis = axis_of("ops.pad", x, axis)
        return jnp.pad(x, [(before, after) if a == axis else (0, 0) for a in range(x.ndim)], constant_values=value)

    def join(self, xs: Sequence[Any], *, axis: int) -> Any:
        return jnp.stack(list(xs), axis_of("ops.join", xs[0][..., None], axis))

    def split(self, x: Any, parts: int | Sequence[int], *, axis: int = -1) -> tuple[Any, ...]:
        axis = axis_of("ops.split", x, axis)
        ends = np.cumsum(pieces_of("ops.split", x, parts, axis))
        return tuple(jnp.split(x, ends[:-1], axis))

    # ---- convolutions and images

    def conv(
        self, x: Any, kernel: Any, *, stride: Sizes = 1, padding: str = "same", dilation: Sizes = 1, groups: int = 1
    ) -> Any:
        kernel = self.weight(kernel)
        check_kernel(x, kernel, groups)
        size = kernel.shape[0] if x.ndim == 3 else kernel.shape[:2]
        _, strides, dilations, pads = windows("ops.conv", x, size, stride, padding, dilation)
        return jax.lax.conv_general_dilated(
            x.astype(self.compute),
            kernel.astype(self.compute),
            strides,
            pads,
            rhs_dilation=dilations,
            dimension_numbers=("NHC", "HIO", "NHC") if x.ndim == 3 else ("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            precision=self._precision,
        )

    def pool(self, x: Any, size: Sizes, *, kind: str, stride: Sizes | None = None, padding: str = "valid") -> Any:
        check_kind("ops.pool, kind", kind, ("max", "mean"))
        sizes, strides, _, pads = windows("ops.pool", x, size, stride, padding)
        over = (1, *sizes, 1), (1, *strides, 1), ((0, 0), *pads, (0, 0))
        if kind == "max":
            return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *over)
        total = jax.lax.reduce_window(x.astype(jnp.float32), 0.0, jax.lax.add, *over)
        ones = jnp.ones((1, *x.shape[1:-1], 1), jnp.float32)
        return (total / jax.lax.reduce_window(ones, 0.0, jax.lax.add, *over)).astype(x.dtype)

    # ---- scans

    @hushing
    def scan(self, fn: Callable[..., Any], carry: Any, xs: Any) -> tuple[Any, Any]:
        _length("ops.scan", xs, 1)
        before = recorded(self)
        carry, ys = jax.lax.scan(fn, carry, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))
        check_quiet(self, before)
        return carry, jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), ys)

    @hushing
    def associative_scan(self, fn: Callable[[Any, Any], Any], xs: Any, *, axis: int = 1) -> Any:
        def cut(tree: Any, part: slice) -> Any:
            return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, part.start, part.stop, part.step or 1, axis), tree)

        def weave(even: Any, odd: Any) -> Any:
            def one(a: Any, b: Any) -> Any:
                n = b.shape[axis]
                both = jnp.stack([jax.lax.slice_in_dim(a, 0, n, axis=axis), b], axis + 1)
                both = both.reshape(*b.shape[:axis], 2 * n, *b.shape[axis + 1 :])
                rest = jax.lax.slice_in_dim(a, n, a.shape[axis], axis=axis)
                return jnp.concatenate([both, rest], axis) if a.shape[axis] > n else both

            return jax.tree.map(one, even, odd)

        def join(a: Any, b: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis), a, b)

        n = _length("ops.associative_scan", xs, axis)
        axis = axis_of("ops.associative_scan", jax.tree.leaves(xs)[0], axis)
        return associative_scan(fn, xs, n, cut, weave, join)


def _length(what: str, xs: Any, axis: int) -> int:
    return one_length(what, {x.shape[axis_of(what, x, axis)] for x in jax.tree.leaves(xs)})
