"""Compute cross-entropy with vocab sharded over tensor: no process forms or receives the logits of the others.

As in `losses`, the gradient is formed in the forward pass, one chunk of tokens at a time. Per token
three numbers are exchanged: the largest logit, the sum of exponentials, the target's logit (Shoeybi et al. 2019,
section 3). Legend: T tokens, C tokens of a chunk, E embed, W this process's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from portatrain.backends.torch.losses import CHUNK_BYTES, scaled
from portatrain.backends.torch.mesh import World


def _chunk(
    world: World,
    x_CE: Tensor,
    table_WE: Tensor,
    targets_C: Tensor,
    mask_C: Tensor | None,
    z_loss: float,
    softcap: float | None,
    grads: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (loss_C, this process's share of dx_CE, dtable_WE); the last two are None without `grads`."""
    z = (x_CE @ table_WE.mT).float()
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    top_C1 = world.all_reduce(capped.amax(-1, keepdim=True), ("tensor",), dist.ReduceOp.MAX)
    exp = (capped - top_C1).exp()
    width = table_WE.shape[0]
    at = targets_C.long()[:, None] - width * world.at["tensor"]
    mine = (at >= 0) & (at < width)
    at = torch.where(mine, at, 0)
    sums = torch.cat([exp.sum(-1, keepdim=True), torch.where(mine, capped.gather(1, at), 0)], dim=1)
    total_C1, target_C1 = world.all_reduce(sums, ("tensor",)).split(1, dim=1)
    lse_C1 = top_C1 + total_C1.log()
    loss_C1 = lse_C1 - target_C1
    if z_loss:
        loss_C1 = loss_C1 + z_loss * lse_C1.square()
    if mask_C is not None:
        loss_C1 = loss_C1 * mask_C[:, None]
    if not grads:
        return loss_C1[:, 0], None, None
    dz = exp.div_(total_C1)
    if z_loss:
        dz.mul_(1 + 2 * z_loss * lse_C1)
    dz.scatter_add_(1, at, torch.where(mine, -1.0, 0.0))
    if softcap is not None:
        dz.mul_(1 - (capped / softcap).square())
    if mask_C is not None:
        dz.mul_(mask_C[:, None])
    dz = dz.to(x_CE.dtype)
    return loss_C1[:, 0], dz @ table_WE, dz.mT @ x_CE


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TE: Tensor,
        table_WE: Tensor,
        targets_T: Tensor,
        mask_T: Tensor | None,
        z_loss: float,
        softcap: float | None,
        n: int,
        world: World,
    ) -> tuple[Tensor, Tensor]:
        grads = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        masks = [None] * n if mask_T is None else mask_T.tensor_split(n)
        losses, dxs, dtable = [], [], None
        for x_CE, targets_C, mask_C in zip(x_TE.tensor_split(n), targets_T.tensor_split(n), masks, strict=True):
            loss_C, dx, dw = _chunk(world, x_CE, table_WE, targets_C, mask_C, z_loss, softcap, grads)
            losses.append(loss_C)
            if dx is not None and dw is not None:
                dxs.append(dx)
                dtable = dw.float() if dtable is None else dtable.add_(dw)
                del dw  # as large as the table's part: it would live on beside the next chunk's
        if dtable is not None:
            ctx.save_for_backward(torch.cat(dxs), dtable.to(table_WE.dtype))
        loss_T = torch.cat(losses)
        ctx.mark_non_differentiable(loss_T)
        return loss_T.sum(), loss_T

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple:
        return scaled(ctx.saved_tensors, g, given=8)


def vocab_parallel_loss(
    world: World,
    x: Tensor,
    table_WE: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    *,
    z_loss: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum, loss_B, weight_B) over this process's tokens, equal on all processes of the tensor axis; see
    `Ops.cross_entropy`. The gradient of x is this process's share of a sum over the tensor axis."""
    b, tokens = targets.shape[0], targets.numel()
    mask_T = None if mask is None else mask.float().flatten()
    n = max(1, -(-tokens * table_WE.shape[0] * 4 // CHUNK_BYTES))
    total, loss_T = _VocabParallel.apply(
        x.flatten(0, -2), table_WE, targets.flatten(), mask_T, z_loss, softcap, min(n, tokens), world
    )
    if mask_T is None:
        weight_B = torch.full((b,), float(tokens // b), device=x.device)
    else:
        weight_B = mask_T.view(b, -1).sum(1)
    return total, loss_T.view(b, -1).sum(1).detach(), weight_B
