"""Grouped matmuls, for mixtures of experts; `kernels.Kernel` has the contract. N rows, X experts, E and F sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(x_NE: Tensor, w_XEF: Tensor, *, sizes_X: Tensor) -> Tensor:
    """Run torch's grouped matmul. It leaves rows past the sum as they are in memory, both in the result and in the
    gradient, so they are set to zero before and after it."""
    ends = sizes_X.cumsum(0)
    used = _used(x_NE, ends)
    out_NF = F.grouped_mm(torch.where(used, x_NE, 0.0), w_XEF, offs=ends.to(torch.int32))
    return torch.where(used, out_NF, 0.0)


def written_out(x_NE: Tensor, w_XEF: Tensor, *, sizes_X: Tensor) -> Tensor:
    """Multiply all rows by the weights of each expert in turn, and keep the rows that are its own. No size is read on
    the host."""
    ends = sizes_X.cumsum(0)
    x_NE = torch.where(_used(x_NE, ends), x_NE, 0.0)
    at = torch.arange(len(x_NE), device=x_NE.device)
    expert_N = torch.searchsorted(ends, at, right=True)
    out_NF = x_NE.new_zeros(len(x_NE), w_XEF.shape[2])
    for i, w_EF in enumerate(w_XEF):
        out_NF = torch.where((expert_N == i)[:, None], x_NE @ w_EF, out_NF)
    return out_NF


def _used(x_NE: Tensor, ends: Tensor) -> Tensor:
    """Return (N, 1): whether a row belongs to an expert."""
    return (torch.arange(len(x_NE), device=x_NE.device) < ends[-1])[:, None]
