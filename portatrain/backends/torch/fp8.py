"""The matmuls of precision fp8 in torch; `model/fp8.py` defines them, and the table of kernels says which runs.

`scaled_mm` is `torch._scaled_mm`, which takes a scale for each row and each column and adds in float32. AMD's gfx942
has formats of its own, without negative zero: half of a number of `E4M3` or `E5M2` is a number of these, so values are
halved and scales doubled. `emulated` multiplies the rounded operands in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from portatrain.backends import choose_kernel, fp8_chips, kernels
from portatrain.backends.fp8_chips import FNUZ
from portatrain.model.fp8 import E4M3, E5M2, Form, Format, Product, aligned, axes_of

_TYPES = {E4M3.name: torch.float8_e4m3fn, E5M2.name: torch.float8_e5m2}
_HALVED = {E4M3.name: torch.float8_e4m3fnuz, E5M2.name: torch.float8_e5m2fnuz}
_MULTIPLE = 16
"""The sizes of matrices that `torch._scaled_mm` takes are multiples of this."""


def formats_of(device: torch.device, kind: str) -> str:
    """Return the formats of a device's 8-bit matmuls, a word of `fp8_chips`; '' if it has none. `kind`: the name of its
    row in `devices.DEVICES`."""
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_properties(device)
    capability = found.gcnArchName if kind == "rocm" else f"{found.major}.{found.minor}"
    return fp8_chips.of_gpu(capability, found.name)


def name_of(device: torch.device, kind: str) -> str:
    """Return the name of a device, for a message."""
    return torch.cuda.get_device_properties(device).name if device.type == "cuda" else kind


Operand = tuple[Tensor, Tensor]
"""(Values over their scales, not rounded yet; the scales), both float32."""
Most = Callable[[Tensor, str], Tensor]
"""A function of the largest values, as the bits of float32 numbers without sign, and the letters of the axes that share
a scale. It returns the largest values over all processes if each has a part."""


def _own(largest: Tensor, over: str) -> Tensor:
    return largest


def scaled(x: Tensor, term: str, over: str, kind: Format, most: Most = _own) -> tuple[Tensor, Tensor]:
    """Return an `Operand`. The values along the axes of `over` in `term` share a scale; the scales have none of these
    axes."""
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


def rounded(x: Tensor, kind: Format) -> Tensor:
    """Round float32 numbers to the format; the result is float32."""
    return x.to(_TYPES[kind.name]).float()


def emulated(product: Product, a: Operand, b: Operand, *, formats: str, dtype: torch.dtype) -> Tensor:
    """Round the operands, and multiply them in float32. See `Kernel`."""
    total = torch.einsum(product.spec, rounded(a[0], product.a.kind), rounded(b[0], product.b.kind))
    for (_, scale), side in ((a, product.a), (b, product.b)):
        order, index = aligned(side.left, product.out)
        total = total * scale.permute(order)[index]
    return total.to(dtype)


def scaled_mm(product: Product, a: Operand, b: Operand, *, formats: str, dtype: torch.dtype) -> Tensor:
    """Multiply by `torch._scaled_mm`, one call for each element of the batch letters. See `Kernel`."""
    out, over = product.out, product.over
    batch = "".join(c for c in product.a.term if c in product.b.term and c not in over)
    sizes = {c: n for (x, _), side in ((a, product.a), (b, product.b)) for c, n in zip(side.term, x.shape, strict=True)}
    k = math.prod([sizes[c] for c in over])  # a list: torch.compile takes no generator here
    flat, scales, own = [], [], []
    types = _HALVED if formats == FNUZ else _TYPES
    for (x, scale), side in ((a, product.a), (b, product.b)):
        kind = types[side.kind.name]
        free = "".join(c for c in side.term if c not in batch + over)
        rows = math.prod([sizes[c] for c in free])
        x = x.permute([side.term.index(c) for c in batch + free + over]).reshape(-1, rows, k)
        order, index = aligned(side.left, batch + free)
        scale = scale.permute(order)[index].expand([sizes[c] for c in batch + free]).reshape(-1, rows)
        if formats == FNUZ:
            x, scale = 0.5 * x, 2 * scale
        # Rows of zeros with the scale 1 make up the sizes.
        x = torch.nn.functional.pad(x.to(kind).view(torch.uint8), (0, -k % _MULTIPLE, 0, -rows % _MULTIPLE))
        flat.append(x.view(kind))
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
    return y.reshape([sizes[c] for c in letters]).permute([letters.index(c) for c in out]).to(dtype)


LOADED: dict[str, Callable[..., Tensor]] = {}
"""Implementations by `Kernel.where`."""


@torch.compiler.assume_constant_result
def kernel_of(
    backend: str,
    device: str,
    mesh: str,
    formats: str,
    named: kernels.Named,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    scaling: str,
) -> str:
    """Return the key in `LOADED` of the kernel that runs. Arguments and result are constants only, so torch.compile
    calls this once and does not trace it."""
    site = kernels.Site(backend=backend, device=device, mesh=mesh, formats=formats, named=named)
    traits = frozenset({f"{scaling}-scales"})
    case = kernels.Case(site=site, dtype=str(dtype).removeprefix("torch."), shape=shape, traits=traits)
    kernel = choose_kernel.choose("fp8_matmul", case).kernel
    LOADED.setdefault(kernel.where, kernel.load())
    return kernel.where


def load_kernels() -> None:
    """Fill `LOADED` with every kernel that may run, because a compiled block cannot import the functions that it
    calls."""
    for kernel in kernels.rows("fp8_matmul", "torch"):
        LOADED.setdefault(kernel.where, kernel.load())


def _product(product: Product, a: Tensor, b: Tensor, where: str, formats: str, most: Most) -> Tensor:
    found = [scaled(x, side.term, side.shared, side.kind, most) for x, side in ((a, product.a), (b, product.b))]
    return LOADED[where](product, *found, formats=formats, dtype=b.dtype)


class _Contraction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, form: Form, where: str, formats: str, most: Most) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.form, ctx.how = form, (where, formats, most)
        return _product(form.forward, x, w, where, formats, most)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (x, w), form = ctx.saved_tensors, ctx.form
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _product(form.of_x, g, w, *ctx.how)
        if ctx.needs_input_grad[1]:
            dw = torch.einsum(form.of_w, x, g)
        return dx, dw, None, None, None, None


def contraction(form: Form, x: Tensor, w: Tensor, where: str, formats: str, most: Most = _own) -> Tensor:
    """Return the product `form` of an activation and a parameter, both in the compute dtype, and in this dtype.
    `where`: the key of a kernel in `LOADED`. `formats`: a word of `fp8_chips`."""
    return _Contraction.apply(x, w, form, where, formats, most)
