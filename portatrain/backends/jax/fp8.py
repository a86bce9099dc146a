"""The matmuls of precision fp8 in JAX; `model/fp8.py` defines them, and the table of kernels says which runs.

`float8` multiplies arrays of float8, so the compiler sees their product. AMD's gfx942 has formats of its own, without
negative zero: half of a number of `E4M3` or `E5M2` is a number of these, so values are halved, the product is
multiplied by four, and the result is the same. `emulated` multiplies the rounded operands in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from portatrain.backends import fp8_chips
from portatrain.backends.fp8_chips import FNUZ
from portatrain.backends.jax.low_precision import Gathering, laid
from portatrain.backends.kernels import Kernel
from portatrain.model.fp8 import E4M3, E5M2, Form, Format, Product, aligned

_HALVED = {E4M3.name: jnp.float8_e4m3fnuz, E5M2.name: jnp.float8_e5m2fnuz}
Operand = tuple[Any, Any]
"""(Values over their scales, not rounded yet; the scales), both float32."""


def formats_of(device: Any) -> str:
    """Return the formats of a device's 8-bit matmuls, a word of `fp8_chips`; '' if it has none."""
    kind = str(device.device_kind)
    if device.platform == "cpu":
        return ""
    if device.platform == "tpu":
        return fp8_chips.of_tpu(kind)
    return fp8_chips.of_gpu(str(getattr(device, "compute_capability", "")), kind)


def scaled(x: Any, axes: tuple[int, ...], kind: Format) -> tuple[Any, Any]:
    """Return (x over its scales, not rounded yet; the scales), both float32. `axes` together are a row; the scales have
    none of them."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    size = bits & 0x7FFFFFFF
    bits = jnp.where(size < 0x00800000, bits ^ size, bits)  # below 2^-126: zero, with its sign
    largest = jnp.max(jnp.where(size < 0x00800000, 0, size), axis=axes)  # sizes are in the order of their bits
    # 1.75 2^most is the largest number of the format: a larger leading part needs the next power of two.
    exponent = (largest >> 23) - 127 - kind.most + ((largest & 0x007FFFFF) > 0x00600000)
    exponent = jnp.maximum(exponent, -126)
    exponent = jnp.where(largest == 0, 0, exponent)
    finite = largest < 0x7F800000
    inverse = jnp.where(finite, jax.lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32), jnp.nan)
    scale = jnp.where(finite, jax.lax.bitcast_convert_type((127 + exponent) << 23, jnp.float32), jnp.nan)
    values = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return values * jnp.expand_dims(inverse, axes), scale


def rounded(x: Any, kind: Format) -> Any:
    """Round float32 numbers of at most the largest number of the format; the result is float32.

    Not by a conversion to the format and back, which a compiler may leave out.
    """
    exponent = ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127
    exponent = jnp.maximum(exponent, kind.least) - kind.digits
    power = jax.lax.bitcast_convert_type((127 + exponent) << 23, jnp.float32)
    inverse = jax.lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)
    return jax.lax.round(x * inverse, jax.lax.RoundingMethod.TO_NEAREST_EVEN) * power


def _multiplied(product: Product, a: Any, b: Any, scales: tuple[Any, Any], dtype: Any) -> Any:
    """Return the einsum of two arrays times their scales. HIGHEST: of float32 operands no digit is lost, and of 8-bit
    operands the products are added in float32 on GPUs that would otherwise add them in fewer digits."""
    total = jnp.einsum(product.spec, a, b, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    for side, scale in zip((product.a, product.b), scales, strict=True):
        order, index = aligned(side.left, product.out)
        total = total * scale.transpose(order)[index]
    return total.astype(dtype)


def emulated(product: Product, a: Operand, b: Operand, *, formats: str, dtype: Any) -> Any:
    """Round the operands, and multiply them in float32. See `Kernel`."""
    return _multiplied(product, rounded(a[0], product.a.kind), rounded(b[0], product.b.kind), (a[1], b[1]), dtype)


def float8(product: Product, a: Operand, b: Operand, *, formats: str, dtype: Any) -> Any:
    """Multiply arrays of float8. See `Kernel`."""
    values, scales = [], []
    for (x, scale), side in ((a, product.a), (b, product.b)):
        values.append((0.5 * x).astype(_HALVED[side.kind.name]) if formats == FNUZ else x.astype(side.kind.name))
        scales.append(2 * scale if formats == FNUZ else scale)
    return _multiplied(product, values[0], values[1], (scales[0], scales[1]), dtype)


How = tuple[Kernel, str]
"""The kernel that multiplies, and the formats of the devices."""


def _product(product: Product, a: Any, b: Any, how: How, dtype: Any) -> Any:
    kernel, formats = how
    found = [scaled(x, side.axes, side.kind) for x, side in ((a, product.a), (b, product.b))]
    return kernel.load()(product, *found, formats=formats, dtype=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def contraction(form: Form, compute: Any, kind: Any, gathering: Gathering, how: How, x: Any, w: Any) -> Any:
    """Return the product `form` in dtype `compute`, as `low_precision.contraction` does: w is a parameter of dtype
    `kind`, which is all-gathered first, and its gradient is reduce-scattered."""
    return _contraction(form, compute, kind, gathering, how, x, w)[0]


def _contraction(form: Form, compute: Any, kind: Any, gathering: Gathering, how: How, x: Any, w: Any) -> Any:
    used, stored = gathering
    low = laid(w.astype(compute), stored)
    return _product(form.forward, x.astype(compute), laid(low, used), how, compute), (x, low)


def _contraction_back(form: Form, compute: Any, kind: Any, gathering: Gathering, how: How, saved: Any, g: Any) -> Any:
    (x, low), (used, stored) = saved, gathering
    dx = _product(form.of_x, g, laid(low, used), how, compute).astype(x.dtype)
    dw = jnp.einsum(form.of_w, x.astype(compute), g, preferred_element_type=jnp.float32)
    return dx, laid(dw, stored).astype(kind)


contraction.defvjp(_contraction, _contraction_back)
