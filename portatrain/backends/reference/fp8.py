"""The matmuls of precision fp8 in float64, from operands that are rounded by ml_dtypes. `model/fp8.py` defines them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from portatrain.model.fp8 import Form, Format, Product, aligned

Array = np.ndarray


def rounded(x: Array, axes: tuple[int, ...], kind: Format) -> tuple[Array, Array]:
    """Return (x over its scales, rounded to `kind`; the scales), both float64. `axes` together are a row; the scales
    have none of them. x is rounded to bfloat16 first."""
    x = _bfloat16(x)
    x = np.where(np.abs(x) < 2.0**-126, 0.0, x)
    scale = np.vectorize(lambda largest: _scale(float(largest), kind), otypes=[float])(np.abs(x).max(axes))
    with np.errstate(invalid="ignore", over="ignore"):
        values = x / np.expand_dims(scale, axes)
        return values.astype(getattr(ml_dtypes, kind.name)).astype(np.float64), scale


def _bfloat16(x: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(x, np.float64).astype(ml_dtypes.bfloat16).astype(np.float64)


def _scale(largest: float, kind: Format) -> float:
    """Return the smallest power of two, at least 2^-126, that brings `largest` to at most the largest number."""
    if not np.isfinite(largest):
        return np.nan
    if largest == 0:
        return 1.0
    exponent = -126
    while largest / 2.0**exponent > kind.largest:
        exponent += 1
    return 2.0**exponent


def product(form: Form, x: Array, w: Array) -> Array:
    """Return the einsum `form` of an activation and a parameter, float64."""
    return _multiplied(form.forward, x, w)


def gradients(form: Form, x: Array, w: Array, g: Array) -> tuple[Array, Array]:
    """Return the gradients of x and of w, given the gradient `g` of the result."""
    low_x, low_g = _bfloat16(x), _bfloat16(g)
    with np.errstate(invalid="ignore"):
        return _multiplied(form.of_x, g, w), np.einsum(form.of_w, low_x, low_g)


def _multiplied(product: Product, a: Array, b: Array) -> Array:
    found, scales = [], []
    for array, side in ((a, product.a), (b, product.b)):
        values, scale = rounded(array, side.axes, side.kind)
        order, index = aligned(side.left, product.out)
        found.append(values)
        scales.append(scale.transpose(order)[index])
    with np.errstate(invalid="ignore"):
        return np.einsum(product.spec, *found) * scales[0] * scales[1]
