"""The matmuls of precision fp8 in JAX; `model/fp8.py` defines them.

On devices with 8-bit matmuls the operands are arrays of float8, and the compiler sees their product. AMD's gfx942 has
formats of its own, without negative zero: half of a number of `E4M3` or `E5M2` is a number of these, so values are
halved, the product is multiplied by four, and the result is the same. Elsewhere the rounded operands are float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from portatrain.backends import fp8_chips
from portatrain.backends.fp8_chips import EMULATED, FNUZ
from portatrain.backends.jax.low_precision import Gathering, laid
from portatrain.model.fp8 import E4M3, E5M2, Form, Format, aligned, axes_of

_HALVED = {E4M3.name: jnp.float8_e4m3fnuz, E5M2.name: jnp.float8_e5m2fnuz}


def formats_of(device: Any) -> str:
    """Return the formats of a device's 8-bit matmuls, a word of `fp8_chips`; raise UserError if it has none."""
    if device.platform == "cpu":
        return EMULATED
    kind = str(device.device_kind)
    if device.platform == "tpu":
        return fp8_chips.checked(fp8_chips.of_tpu(kind), kind)
    capability = str(getattr(device, "compute_capability", ""))
    found = None
    if capability.startswith("gfx"):
        found = fp8_chips.of_amd(capability)
    elif capability:
        found = fp8_chips.of_nvidia(capability)
    return fp8_chips.checked(found, kind)


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


def _operand(x: Any, axes: tuple[int, ...], kind: Format, device: str) -> tuple[Any, Any]:
    values, scale = scaled(x, axes, kind)
    if device == EMULATED:
        return rounded(values, kind), scale
    if device == FNUZ:
        return (0.5 * values).astype(_HALVED[kind.name]), 2 * scale
    return values.astype(kind.name), scale


def _product(spec: str, a: tuple[Any, Format], b: tuple[Any, Format], over: str, device: str, dtype: Any) -> Any:
    inputs, _, out = spec.partition("->")
    operands, scales = [], []
    for (array, kind), term in zip((a, b), inputs.split(","), strict=True):
        values, scale = _operand(array, axes_of(over, term), kind, device)
        order, index = aligned(term, over, out)
        operands.append(values)
        scales.append(scale.transpose(order)[index])
    precision = jax.lax.Precision.HIGHEST if device == EMULATED else None
    total = jnp.einsum(spec, *operands, preferred_element_type=jnp.float32, precision=precision)
    return (total * scales[0] * scales[1]).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def contraction(form: Form, compute: Any, kind: Any, gathering: Gathering, device: str, x: Any, w: Any) -> Any:
    """Return the product `form` in dtype `compute`, as `low_precision.contraction` does: w is a parameter of dtype
    `kind`, which is all-gathered first, and its gradient is reduce-scattered. `device`: a word of `fp8_chips`."""
    return _contraction(form, compute, kind, gathering, device, x, w)[0]


def _contraction(form: Form, compute: Any, kind: Any, gathering: Gathering, device: str, x: Any, w: Any) -> Any:
    used, stored = gathering
    low = laid(w.astype(compute), stored)
    one, two = (x.astype(compute), E4M3), (laid(low, used), E4M3)
    return _product(form.forward, one, two, form.k, device, compute), (x, low)


def _contraction_back(
    form: Form, compute: Any, kind: Any, gathering: Gathering, device: str, saved: Any, g: Any
) -> Any:
    (x, low), (used, stored) = saved, gathering
    dx = _product(form.of_x, (g, E5M2), (laid(low, used), E4M3), form.n, device, compute).astype(x.dtype)
    dw = jnp.einsum(form.of_w, x.astype(compute), g, preferred_element_type=jnp.float32)
    return dx, laid(dw, stored).astype(kind)


contraction.defvjp(_contraction, _contraction_back)
