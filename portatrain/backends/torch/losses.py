"""Cross-entropy over a large vocabulary, one chunk of logits at a time.

If the logits fit one chunk, autograd forms the gradient. Otherwise the gradient is formed in the forward pass, while
a chunk's logits exist, and only scaled in the backward pass: the three matmuls of an ordinary output layer in both
cases, with memory for one chunk of logits and the gradients of its operands. Legend: T tokens (samples x positions),
C tokens of a chunk, E embed, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""The largest size of a chunk of float32 logits."""


def token_losses(
    x_CE: Tensor, table_VE: Tensor, targets_C: Tensor, mask_C: Tensor | None, z_loss: float, softcap: float | None
) -> Tensor:
    """Return the loss of each token of a chunk, (C,), differentiable."""
    z = (x_CE @ table_VE.mT).float()
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    targets_C = targets_C.long()
    loss_C = F.cross_entropy(capped, targets_C, reduction="none")
    if z_loss:
        lse_C = capped.gather(1, targets_C[:, None])[:, 0] + loss_C
        loss_C = loss_C + z_loss * lse_C.square()
    return loss_C if mask_C is None else loss_C * mask_C


def chunk_loss(
    x_CE: Tensor, table_VE: Tensor, targets_C: Tensor, mask_C: Tensor | None, z_loss: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each token and the gradients of their sum: (loss_C, dx_CE, dtable_VE)."""
    z = (x_CE @ table_VE.mT).float()
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(capped, dim=-1)
    at = targets_C.long()[:, None]
    nll_C1 = -logp.gather(1, at)
    loss_C1 = nll_C1
    dz = logp.exp_()
    if z_loss:
        lse_C1 = capped.gather(1, at) + nll_C1
        loss_C1 = loss_C1 + z_loss * lse_C1.square()
        dz.mul_(1 + 2 * z_loss * lse_C1)
    dz.scatter_add_(1, at, torch.full_like(nll_C1, -1.0))
    if softcap is not None:
        dz.mul_(1 - (capped / softcap).square())
    if mask_C is not None:
        dz.mul_(mask_C[:, None])
        loss_C1 = loss_C1 * mask_C[:, None]
    dz = dz.to(x_CE.dtype)
    return loss_C1[:, 0], dz @ table_VE, dz.mT @ x_CE


def _cut(n: int, *tensors_T: Tensor | None) -> list[tuple]:
    """Cut each tensor into n chunks, whose sizes differ by at most one token."""
    return list(zip(*([None] * n if t is None else t.tensor_split(n) for t in tensors_T), strict=True))


def scaled(gradients: Sequence[Tensor], g: Tensor, *, given: int) -> tuple[Tensor | None, ...]:
    """Scale gradients that the forward pass formed, as the backward pass of a loss. The other `given` arguments have no
    gradient."""
    return (*(d * g.to(d.dtype) for d in gradients), *[None] * (given - len(gradients)))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TE: Tensor,
        table_VE: Tensor,
        targets_T: Tensor,
        mask_T: Tensor | None,
        z_loss: float,
        softcap: float | None,
        n: int,
        chunk: Callable[..., Any],
    ) -> tuple[Tensor, Tensor]:
        losses, dxs = [], []
        dtable: Any = None
        for x_CE, targets_C, mask_C in _cut(n, x_TE, targets_T, mask_T):
            loss_C, dx, dw = chunk(x_CE, table_VE, targets_C, mask_C, z_loss, softcap)
            losses.append(loss_C)
            dxs.append(dx)
            # Chunks are summed in float32, whatever the compute dtype.
            dtable = dw.float() if dtable is None else dtable.add_(dw)
            del dw  # as large as the table: it would live on beside the next chunk's
        ctx.save_for_backward(torch.cat(dxs), dtable.to(table_VE.dtype))
        loss_T = torch.cat(losses)
        ctx.mark_non_differentiable(loss_T)
        return loss_T.sum(), loss_T

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple:
        return scaled(ctx.saved_tensors, g, given=8)


def cross_entropy(
    x: Tensor,
    table_VE: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    *,
    z_loss: float,
    softcap: float | None,
    whole: Callable[..., Any] = token_losses,
    chunk: Callable[..., Any] = chunk_loss,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum, loss_B, weight_B); see `Ops.cross_entropy`. `whole` and `chunk`: the functions above, or
    compiled."""
    b, tokens = targets.shape[0], targets.numel()
    x_TE, targets_T = x.flatten(0, -2).to(table_VE.dtype), targets.flatten()
    mask_T = None if mask is None else mask.detach().float().flatten()
    n = max(1, min(tokens, -(-tokens * table_VE.shape[0] * 4 // CHUNK_BYTES)))
    # Of a frozen model, such as a reference beside the one that is trained, no gradient is formed.
    if n > 1 and torch.is_grad_enabled() and (x_TE.requires_grad or table_VE.requires_grad):
        total, loss_T = _Chunked.apply(x_TE, table_VE, targets_T, mask_T, z_loss, softcap, n, chunk)
        loss_B = loss_T.view(b, tokens // b).sum(1)
    else:
        cuts = [(x_TE, targets_T, mask_T)] if n == 1 else _cut(n, x_TE, targets_T, mask_T)
        losses = [whole(x, table_VE, t, m, z_loss, softcap) for x, t, m in cuts]
        loss_B = (torch.cat(losses) if n > 1 else losses[0]).view(b, tokens // b).sum(1)
        total = loss_B.sum()
    if mask_T is None:
        weight_B = torch.full((b,), float(tokens // b), device=x.device)
    else:
        weight_B = mask_T.view(b, tokens // b).sum(1)
    return total, loss_B.detach(), weight_B
