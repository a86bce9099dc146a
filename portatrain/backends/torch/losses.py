"""Cross-entropy over a large vocabulary, one chunk of logits at a time.

The gradient is formed in the pass that computes the loss, while a chunk's logits exist, and only scaled in the
backward pass: the three matmuls of an ordinary output layer, and memory for one chunk of logits and the gradients
of its operands. Legend: T tokens (samples x positions), C tokens of a chunk, E embed, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""The most that a chunk of float32 logits may take."""


def chunk_loss(x_CE: Tensor, table_VE: Tensor, targets_C: Tensor, mask_C: Tensor, z_loss: float,
               softcap: float | None, gradients: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Loss of each token, and with `gradients` those of their sum: (loss_C, dx_CE, dtable_VE)."""
    z = (x_CE @ table_VE.mT).float()
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(capped, dim=-1)
    at = targets_C.long()[:, None]
    nll_C1 = -logp.gather(1, at)
    loss_C1 = nll_C1
    if z_loss:
        lse_C1 = capped.gather(1, at) + nll_C1
        loss_C1 = loss_C1 + z_loss * lse_C1.square()
    loss_C = loss_C1[:, 0] * mask_C
    if not gradients:
        return loss_C, None, None
    dz = logp.exp()
    if z_loss:
        dz = dz * (1 + 2 * z_loss * lse_C1)
    dz = dz.scatter_add(1, at, torch.full_like(nll_C1, -1.0))
    if softcap is not None:
        dz = dz * (1 - (capped / softcap).square())
    dz = (dz * mask_C[:, None]).to(x_CE.dtype)
    return loss_C, dz @ table_VE, dz.mT @ x_CE


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, table_VE: Tensor, targets_T: Tensor, mask_T: Tensor, z_loss: float,
                softcap: float | None, chunk: Callable[..., Any]) -> tuple[Tensor, Tensor]:  # fmt: skip
        gradients = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        size = max(1, CHUNK_BYTES // (4 * table_VE.shape[0]))
        cuts = zip(x_TE.split(size), targets_T.split(size), mask_T.split(size), strict=True)
        losses, dxs, dtable = [], [], None
        for x_CE, targets_C, mask_C in cuts:
            loss_C, dx, dw = chunk(x_CE, table_VE, targets_C, mask_C, z_loss, softcap, gradients)
            losses.append(loss_C)
            if gradients:
                dxs.append(dx)
                # Chunks accumulate in float32 whatever the compute dtype.
                dtable = dw if dtable is None else dtable.float() + dw
        loss_T = torch.cat(losses) if len(losses) > 1 else losses[0]
        if gradients:
            ctx.save_for_backward(torch.cat(dxs) if len(dxs) > 1 else dxs[0], dtable.to(table_VE.dtype))
        ctx.mark_non_differentiable(loss_T)
        return loss_T.sum(), loss_T

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple:
        dx, dtable = ctx.saved_tensors
        return dx * g.to(dx.dtype), dtable * g.to(dtable.dtype), None, None, None, None, None


def cross_entropy(
    x: Tensor,
    table_VE: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    *,
    z_loss: float,
    softcap: float | None,
    chunk: Callable[..., Any] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, loss_B, weight_B); see `portatrain.ops.Ops.cross_entropy`."""
    b = targets.shape[0]
    mask = torch.ones(targets.shape, device=x.device) if mask is None else mask.float()
    total, loss_T = _CrossEntropy.apply(
        x.flatten(0, -2), table_VE, targets.flatten(), mask.flatten(), z_loss, softcap, chunk or chunk_loss
    )
    return total, loss_T.view(b, -1).sum(1), mask.view(b, -1).sum(1)
