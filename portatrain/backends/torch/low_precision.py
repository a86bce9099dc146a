"""Look rows up in a low precision and sum their gradient in float32. In bfloat16, where 256 + 1 is 256, the gradient
of a frequent token would stop growing, as it does on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_VE: Tensor, ids: Tensor, compute: torch.dtype) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.kind = table_VE.shape[0], table_VE.dtype
        return F.embedding(ids, table_VE.to(compute))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return (torch.ops.aten.embedding_dense_backward(g.float(), ids, ctx.rows, -1, False).to(ctx.kind), None, None)


def low_rows(table_VE: Tensor, ids: Tensor, compute: torch.dtype) -> Tensor:
    """Return rows of a table in dtype `compute`: (..., E) for ids (...)."""
    return _Rows.apply(table_VE, ids, compute)
