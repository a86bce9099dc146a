"""Compute RMSNorm on a CPU, for which torch has no kernel: there it runs six operations forward and fifteen backward,
twelve of them over the whole array. Written out with its derivative it takes seven."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """See `portatrain.model.ops.Ops.rms_norm`."""
    if scale is None or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], None if scale is None else scale.to(x.dtype), eps)
    if torch.compiler.is_compiling():  # it fuses what torch itself runs
        return F.rms_norm(x, x.shape[-1:], None, eps) * by_sample(scale, x)
    return _RMSNorm.apply(x, scale, eps)


def by_sample(p: Tensor, like: Tensor) -> Tensor:
    """Return `p` (E,) in a shape that broadcasts over `like` (B, ..., E). A CPU's compiler would add its gradient row
    by row, off by 1e-6 of its scale over 1024 rows; as (B, 1, ..., E) it is summed within samples first, then over
    them."""
    if like.ndim < 3 or like.device.type != "cpu" or not torch.compiler.is_compiling():
        return p
    return p.expand(like.shape[0], *(1,) * (like.ndim - 2), p.shape[-1])


class _RMSNorm(torch.autograd.Function):
    """Compute y = x r w with r = 1 / sqrt(mean(x^2) + eps); with u = x r over n features:

    dw = sum over rows of g u,   dx = r (g w - u (g u . w) / n)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, w)
        return (x * r).mul_(w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, r, w = ctx.saved_tensors
        u = x * r
        gu = g * u
        along = (gu @ w)[..., None].mul_(r).div_(x.shape[-1])
        dx = (g * w).mul_(r).addcmul_(u, along, value=-1)
        return dx, gu.sum(tuple(range(x.ndim - 1))), None
