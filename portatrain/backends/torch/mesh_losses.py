"""Implement the losses of `Ops` on DTensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.utils._pytree import tree_map

from portatrain.backends.torch.losses import cross_entropy
from portatrain.backends.torch.row_ops import RowOps
from portatrain.backends.torch.vocab_parallel import vocab_parallel_loss
from portatrain.model.ops import Loss
from portatrain.model.scaled import scores


class MeshLosses(RowOps):
    """Implement the losses of `MeshOps`; `MeshOps` has the helpers."""

    axes: Any
    _value: Callable[[Any], Any]
    _local: Callable[..., Tensor]
    _from: Callable[..., Any]
    _beside: Callable[..., list[Any]]

    @scores
    def cross_entropy(
        self,
        x: Any,
        table_VE: Any,
        targets: Any,
        *,
        mask: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> Loss:
        self._note(table_VE, targets)
        x, table, targets = self._value(x), self.weight(table_VE), self._value(targets)
        vocab = [isinstance(p, Shard) and p.dim == 0 for p in table.placements]
        # Tokens stay sharded over their own axes, but each process of the vocab axis needs its whole row of logits.
        at = [
            p if isinstance(p, Shard) and p.dim < x.ndim - 1 and not v else Replicate()
            for p, v in zip(x.placements, vocab, strict=True)
        ]
        local_x = self._local(x, at, [Partial() if v else p for p, v in zip(at, vocab, strict=True)])
        cut: list[Placement] = [Shard(0) if v else Replicate() for v in vocab]
        grads = [Shard(0) if v else b for v, b in zip(vocab, self._beside(at), strict=True)]
        local_table = self._local(table, cut, grads)
        local_targets = self._local(targets, at)
        local_mask = None if mask is None else self._local(self._value(mask), at)
        if any(vocab):
            total, loss_B, weight_B = vocab_parallel_loss(
                self.world, local_x, local_table, local_targets, local_mask, z_loss=z_loss, softcap=softcap
            )
        else:
            whole, chunk = self.losses
            total, loss_B, weight_B = cross_entropy(
                local_x,
                local_table,
                local_targets,
                local_mask,
                z_loss=z_loss,
                softcap=softcap,
                whole=whole,
                chunk=chunk,
            )
        over = self._beside(at)
        return Loss(*(self._made(self._from(v, over)) for v in (total, weight_B, loss_B)))

    def _made(self, x: Any) -> Any:
        return x.redistribute(placements=[Replicate() for _ in self.axes])

    def loss(self, loss_B: Any, weight_B: Any) -> Loss:
        return super().loss(self._made(self._value(loss_B)), self._made(self._value(weight_B)))

    def across_samples(self, fn: Callable[..., Any], *xs: Any, group: int | None = None) -> Loss:
        """Compare whole arrays: every process of the context and tensor axes does the same."""
        whole = [Replicate() for _ in self.axes]

        def on_mesh(*parts: Tensor) -> Any:
            found = fn(*(self._from(part, whole) for part in parts))
            return tree_map(lambda y: self._local(self._value(y), whole) if isinstance(y, Tensor) else y, found)

        made = super().across_samples(on_mesh, *(self._local(self._value(x), whole) for x in xs), group=group)
        return Loss(*(self._from(v, whole) for v in (made.sum, made.weight_B, made.loss_B)))
