"""Operations that every framework makes of others in the same way. The oracle has its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from portatrain.model import dropout_hash
from portatrain.model.ops_checks import Axes, Sizes, axes_of, axis_of, check_kind, taps, windows

Array = Any

TWO_PI = 2 * math.pi
STREAM = 1540483477
"""Sets the noise's bits apart from dropout's."""


class Composed:
    """A mixin below a class of operations, which it calls as `ops`."""

    def min(self: Any, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        axes_of("ops.min", x, axis, some=True)
        return -self.max(-x, axis=axis, keepdims=keepdims)

    def argmin(self: Any, x: Array, *, axis: int = -1) -> Array:
        axes_of("ops.argmin", x, axis, some=True)
        return self.argmax(-x, axis=axis)

    def logsumexp(self: Any, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        axes_of("ops.logsumexp", x, axis, some=True)
        x32 = self.cast(x, "float32")
        top = self.stop_gradient(self.max(x32, axis=axis, keepdims=True))
        top = self.where(self.abs(top) == math.inf, 0.0, top)
        total = self._total(self.exp(x32 - top), axis, True)
        # Where nothing is left, the logarithm is kept from the gradient: 0 / 0.
        found = self.where(total == 0, -math.inf, self.log(self.where(total == 0, 1.0, total)) + top)
        return self._as(found if keepdims else self._without(found, axis), x)

    def var(self: Any, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        axes = axes_of("ops.var", x, axis, some=True)
        x32, n = self.cast(x, "float32"), math.prod(x.shape[a] for a in axes)
        centred = x32 - self._total(x32, axis, True) / n
        return self._as(self._total(centred * centred, axis, keepdims) / n, x)

    def std(self: Any, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        return self._as(self._root(self.var(self.cast(x, "float32"), axis=axis, keepdims=keepdims)), x)

    def norm(self: Any, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        axes_of("ops.norm", x, axis)
        x32 = self.cast(x, "float32")
        return self._as(self._root(self._total(x32 * x32, axis, keepdims)), x)

    def _root(self: Any, square: Array) -> Array:
        """The square root, with derivative 0 at 0."""
        return self.where(square == 0, 0.0, self.sqrt(self.where(square == 0, 1.0, square)))

    def sort(self: Any, x: Array, *, axis: int = -1, descending: bool = False) -> Array:
        axis_of("ops.sort", x, axis)
        order = self.argsort(self.stop_gradient(x), axis=axis, descending=descending)
        return self.take_along(x, order, axis=axis)

    def resize(self: Any, x: Array, size: Sizes, *, method: str) -> Array:
        sizes = windows("ops.resize", x, size, None, "same")[0]
        x32 = self.cast(x, "float32")
        for axis, m in enumerate(sizes, start=1):
            low, high, weights = taps(x.shape[axis], m, method)
            below = self._take(x32, low, axis)
            if any(weights):
                at = self._constant(weights, (m, *(1,) * (x.ndim - axis - 1)))
                below = below * (1 - at) + self._take(x32, high, axis) * at
            x32 = below
        return self._as(x32, x)

    def noise(self: Any, *shape: int, site: int, kind: str = "normal", draw: int = 0) -> Array:
        check_kind("ops.noise, kind", kind, ("normal", "uniform"))
        keys_B = dropout_hash.sample_keys(self.seed_2, self.step, site, self.layer, self.sample)
        keys_B1 = dropout_hash.mix(keys_B ^ (STREAM + draw))[:, None]
        offsets = self.arange(math.prod(shape))[None, :]
        return noise(self, keys_B1, offsets, kind).reshape(self.sample.shape[0], *shape)


def noise(ops: Any, keys_B1: Array, offset_1F: Array, kind: str) -> Array:
    """(B, F) float32 from int32 keys: uniform numbers are multiples of 2^-24 in [0, 1), normal ones are made of two of
    them (Box and Muller 1958)."""
    first = ops.cast(dropout_hash.random_bits(keys_B1, offset_1F), "float32") * 2.0**-24
    if kind == "uniform":
        return first
    second = ops.cast(dropout_hash.random_bits(dropout_hash.mix(keys_B1 + 1), offset_1F), "float32") * 2.0**-24
    return ops.sqrt(-2.0 * ops.log(1.0 - first)) * ops.cos(TWO_PI * second)


def associative_scan(
    fn: Callable[[Any, Any], Any],
    xs: Any,
    length: int,
    cut: Callable[[Any, slice], Any],
    weave: Callable[[Any, Any], Any],
    join: Callable[[Any, Any], Any],
) -> Any:
    """Pairs are joined, the half as many results scanned, and what lies between made from them (Blelloch 1990).

    cut(tree, slice) along the axis; weave(a, b): a_0, b_0, a_1, b_1, ...; join(a, b): one behind the other.
    """
    if length < 2:
        return xs
    pairs = fn(cut(xs, slice(0, length - 1, 2)), cut(xs, slice(1, length, 2)))
    odd = associative_scan(fn, pairs, length // 2, cut, weave, join)
    left = odd if length % 2 else cut(odd, slice(0, length // 2 - 1))
    first = cut(xs, slice(0, 1))
    even = first if length == 2 else join(first, fn(left, cut(xs, slice(2, length, 2))))
    return weave(even, odd)
