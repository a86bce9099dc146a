"""Cross-entropy over a large vocabulary, one chunk of logits at a time, as on the jax backend.

The gradient is formed in the forward pass and only scaled in the backward pass. Every part of the batch and of the
sequence sums the table's gradient of its own tokens over all chunks, and the parts are added once. Legend: B batch,
S positions, C chunk of positions, E embed, V vocab; over devices, R parts of the batch and P of the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portatrain.backends.torch.losses import scaled

CHUNK_BYTES = 64 << 20
"""The largest size of a chunk of float32 logits on a device."""


def chunks(rows: int, positions: int, vocab: int) -> int:
    """Return the number of chunks of the positions: the smallest that divides them and keeps within CHUNK_BYTES."""
    for n in range(1, positions):
        if positions % n == 0 and rows * (positions // n) * vocab * 4 <= CHUNK_BYTES:
            return n
    return max(positions, 1)


@dataclass(frozen=True)
class Cut:
    """How the tokens of a loss are sharded: in `rows` parts of the batch and `parts` of the sequence. `table`
    shards the table during the computation, `sums` the sums of its gradient, (R, P, V, E)."""

    rows: int = 1
    parts: int = 1
    table: Callable[[Tensor], Tensor] = lambda x: x
    sums: Callable[[Tensor], Tensor] = lambda x: x


def cross_entropy(
    x: Tensor, table_VE: Tensor, targets: Tensor, mask: Tensor | None, *, z_loss: float, softcap: float | None, cut: Cut
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum, loss_B, weight_B); see `portatrain.model.ops.Ops.cross_entropy`."""
    if x.ndim == 2:  # one target a sample
        x, targets = x[:, None], targets[:, None]
        mask = None if mask is None else mask[:, None]
    mask = torch.ones(targets.shape, device=x.device) if mask is None else mask.detach().float()
    total, loss_B = _Loss.apply(x.to(table_VE.dtype), cut.table(table_VE), targets, mask, z_loss, softcap, cut)
    return total, loss_B.detach(), mask.sum(1)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSE: Tensor,
        table_VE: Tensor,
        targets_BS: Tensor,
        mask_BS: Tensor,
        z_loss: float,
        softcap: float | None,
        cut: Cut,
    ) -> tuple[Tensor, Tensor]:
        b, s, e = x_BSE.shape
        if b % cut.rows or s % cut.parts:  # an evaluation's last batch
            cut = Cut(table=cut.table)
        r, p = cut.rows, cut.parts
        n = chunks(b // r, s // p, table_VE.shape[0])

        def split(a: Tensor) -> tuple[Tensor, ...]:
            """Reshape (B, S, ...) to n arrays (R, B/R, P, C, ...)."""
            return a.reshape(r, b // r, p, n, s // p // n, *a.shape[2:]).unbind(3)

        dxs: list[Tensor] = []
        loss_RB: Any = 0.0
        dtable: Any = None
        for x, targets, mask in zip(split(x_BSE), split(targets_BS), split(mask_BS), strict=True):
            mine_RB, dx, sums = _chunk(x, table_VE, targets, mask, z_loss, softcap)
            loss_RB = loss_RB + mine_RB
            dxs.append(dx)
            dtable = cut.sums(sums) if dtable is None else dtable + cut.sums(sums)
        dx_BSE = torch.stack(dxs, 3).reshape(b, s, e)
        ctx.save_for_backward(dx_BSE, dtable.sum((0, 1)).to(table_VE.dtype))
        loss_B = loss_RB.reshape(b)
        ctx.mark_non_differentiable(loss_B)
        return loss_B.sum(), loss_B

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple:
        return scaled(ctx.saved_tensors, g, given=7)


def _chunk(
    x: Tensor, table_VE: Tensor, targets: Tensor, mask: Tensor, z_loss: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss by sample (R, B), dx, the table's gradient (R, P, V, E)) for the loss of (R, B, P, C) tokens."""
    z = torch.einsum("rbpce,ve->rbpcv", x, table_VE).float()
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    high = capped.amax(-1, keepdim=True)
    exps = torch.exp(capped - high)
    sums = exps.sum(-1, keepdim=True)
    lse = (torch.log(sums) + high)[..., 0]
    hit = torch.arange(z.shape[-1], dtype=targets.dtype, device=z.device) == targets[..., None]
    loss = lse - torch.where(hit, capped, 0.0).sum(-1) + z_loss * lse * lse
    dz = exps / sums * (1 + 2 * z_loss * lse)[..., None] - hit.float()
    if softcap is not None:
        dz = dz * (1 - (capped / softcap).square())
    dz = (dz * mask[..., None]).to(x.dtype)
    dx = torch.einsum("rbpcv,ve->rbpce", dz, table_VE)
    dtable = torch.einsum("rbpcv,rbpce->rpve", dz.float(), x.float())
    return (loss * mask).sum((2, 3)), dx, dtable
