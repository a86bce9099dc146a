"""The matmuls of precision fp8 in torch; `model/fp8.py` defines them.

On GPUs with 8-bit matmuls the products run in `torch._scaled_mm`, which takes a scale for each row and each column and
adds in float32. AMD's gfx942 has formats of its own, without negative zero: half of a number of `E4M3` or `E5M2` is a
number of these, so values are halved and scales doubled. On a CPU the rounded operands are multiplied in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from portatrain.backends import fp8_chips
from portatrain.backends.fp8_chips import EMULATED, FNUZ
from portatrain.model.fp8 import E4M3, E5M2, Form, Format, aligned, axes_of

_TYPES = {E4M3.name: torch.float8_e4m3fn, E5M2.name: torch.float8_e5m2}
_HALVED = {E4M3.name: torch.float8_e4m3fnuz, E5M2.name: torch.float8_e5m2fnuz}
_MULTIPLE = 16
"""The sizes of matrices that `torch._scaled_mm` takes are multiples of this."""


def formats_of(device: torch.device, kind: str) -> str:
    """Return the formats of a device's 8-bit matmuls, a word of `fp8_chips`; raise UserError if it has none. `kind`:
    the name of its row in `devices.DEVICES`."""
    if device.type == "cpu":
        return EMULATED
    if device.type != "cuda":
        return fp8_chips.checked(None, kind)
    found = torch.cuda.get_device_properties(device)
    if kind == "rocm":
        return fp8_chips.checked(fp8_chips.of_amd(found.gcnArchName), found.name)
    return fp8_chips.checked(fp8_chips.of_nvidia(f"{found.major}.{found.minor}"), found.name)


Most = Callable[[Tensor, str], Tensor]
"""A function of the largest values of rows, as the bits of float32 numbers without sign, and the letters of the axes
that are a row. It returns the largest values of the whole rows if a process has a part of each."""


def _own(largest: Tensor, over: str) -> Tensor:
    return largest


def scaled(x: Tensor, term: str, over: str, kind: Format, most: Most = _own) -> tuple[Tensor, Tensor]:
    """Return (x over its scales, not rounded yet; the scales), both float32. The axes of `over` in `term` together are
    a row; the scales have none of them."""
    axes = axes_of(over, term)
    bits = x.float().contiguous().view(torch.int32)
    size = bits & 0x7FFFFFFF
    tiny = size < 0x00800000
    bits = torch.where(tiny, bits ^ size, bits)  # below 2^-126: zero, with its sign
    largest = torch.where(tiny, 0, size).amax(axes)  # sizes are in the order of their bits
    largest = most(largest, over)
    # 1.75 2^most is the largest number of the format: a larger leading part needs the next power of two.
    exponent = (largest >> 23) - 127 - kind.most + ((largest & 0x007FFFFF) > 0x00600000).to(torch.int32)
    exponent = torch.where(largest == 0, 0, exponent.clamp(min=-126))
    # Not left to the conversion, which may turn an infinity into the largest number.
    finite = largest < 0x7F800000
    inverse, scale = (
        torch.where(finite, ((127 + sign * exponent) << 23).view(torch.float32), torch.nan) for sign in (-1, 1)
    )
    for axis in sorted(axes):
        inverse = inverse.unsqueeze(axis)
    return bits.view(torch.float32) * inverse, scale


def emulated(x: Tensor, kind: Format) -> Tensor:
    """Round float32 numbers to the format; the result is float32."""
    return x.to(_TYPES[kind.name]).float()


def product(
    spec: str, a: tuple[Tensor, Format], b: tuple[Tensor, Format], over: str, device: str, most: Most = _own
) -> Tensor:
    """Return einsum(spec, a, b) from 8-bit operands, with the dtype of b. The letters `over` are contracted."""
    inputs, _, out = spec.partition("->")
    terms = inputs.split(",")
    found = [scaled(array, term, over, kind, most) for (array, kind), term in zip((a, b), terms, strict=True)]
    if device != EMULATED and b[0].dtype == torch.bfloat16:
        return _multiplied(spec, found, (a[1], b[1]), over, device)
    total = torch.einsum(spec, *(emulated(values, kind) for (values, _), (_, kind) in zip(found, (a, b), strict=True)))
    for (_, scale), term in zip(found, terms, strict=True):
        order, index = aligned(term, over, out)
        total = total * scale.permute(order)[index]
    return total.to(b[0].dtype)


def _multiplied(
    spec: str, found: list[tuple[Tensor, Tensor]], kinds: tuple[Format, Format], over: str, device: str
) -> Tensor:
    """Return the product by `torch._scaled_mm`, one call for each element of the batch letters."""
    inputs, _, out = spec.partition("->")
    terms = inputs.split(",")
    batch = "".join(c for c in terms[0] if c in terms[1] and c not in over)
    sizes = {c: n for (x, _), term in zip(found, terms, strict=True) for c, n in zip(term, x.shape, strict=True)}
    k = math.prod(sizes[c] for c in over)
    flat, scales, own = [], [], []
    types = _HALVED if device == FNUZ else _TYPES
    for (x, scale), term, kind in zip(found, terms, kinds, strict=True):
        free = "".join(c for c in term if c not in batch + over)
        rows = math.prod(sizes[c] for c in free)
        x = x.permute([term.index(c) for c in batch + free + over]).reshape(-1, rows, k)
        left = "".join(c for c in term if c not in over)
        scale = scale.permute([left.index(c) for c in batch + free]).reshape(-1, rows)
        if device == FNUZ:
            x, scale = 0.5 * x, 2 * scale
        # Rows of zeros with the scale 1 make up the sizes.
        x = torch.nn.functional.pad(x.to(types[kind.name]).view(torch.uint8), (0, -k % _MULTIPLE, 0, -rows % _MULTIPLE))
        flat.append(x.view(types[kind.name]))
        scales.append(torch.nn.functional.pad(scale, (0, -rows % _MULTIPLE), value=1.0))
        own.append((free, rows))
    products = [
        torch._scaled_mm(
            one, two.mT, scale_a=s[:, None], scale_b=t[None, :], out_dtype=torch.bfloat16, use_fast_accum=False
        )
        for one, two, s, t in zip(*flat, *scales, strict=True)
    ]
    y = torch.stack(products)[:, : own[0][1], : own[1][1]]
    letters = batch + own[0][0] + own[1][0]
    return y.reshape([sizes[c] for c in letters]).permute([letters.index(c) for c in out])


class _Contraction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, form: Form, device: str, most: Most) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.form, ctx.device, ctx.most = form, device, most
        return product(form.forward, (x, E4M3), (w, E4M3), form.k, device, most)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x, w), form = ctx.saved_tensors, ctx.form
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(form.of_x, (g, E5M2), (w, E4M3), form.n, ctx.device, ctx.most)
        if ctx.needs_input_grad[1]:
            dw = torch.einsum(form.of_w, x, g)
        return dx, dw, None, None, None


def contraction(form: Form, x: Tensor, w: Tensor, device: str, most: Most = _own) -> Tensor:
    """Return the product `form` of an activation and a parameter, both in the compute dtype, and in this dtype.
    `device`: a word of `fp8_chips`."""
    return _Contraction.apply(x, w, form, device, most)
