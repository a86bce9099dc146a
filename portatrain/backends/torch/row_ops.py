"""Implement `Ops` on the batch axes of a mesh: activations are plain tensors of this process's rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from portatrain.backends.torch.mesh_experts import RowExperts
from portatrain.backends.torch.mesh_values import SumRows, of_all_experts
from portatrain.backends.torch.ops import TorchOps
from portatrain.model.fp8 import Form
from portatrain.model.layout import BATCH_MESH_AXES
from portatrain.model.lora import adapts, not_adapted


@dataclasses.dataclass
class RowOps(RowExperts, TorchOps):
    """Sum over the batch across processes, and gather parameters that are sharded over expert."""

    world: Any = None

    def weight(self, p: Any) -> Any:
        p = not_adapted(p)
        value = of_all_experts(p, self.world)
        return value.to(self.static.compute) if isinstance(p, nn.Parameter) else value

    @adapts
    def einsum(self, spec: str, *operands: Any, dtype: str | None = None) -> Any:
        return super().einsum(spec, *(of_all_experts(x, self.world) for x in operands), dtype=dtype)

    def einsum_fp8(self, form: Form, x: Tensor, w: Tensor, **options: Any) -> Tensor:
        return super().einsum_fp8(form, x, of_all_experts(w, self.world), **options)

    def sum(self, x: Tensor, axes: Sequence[str | None], *, over: Sequence[str]) -> Tensor:
        y = super().sum(x, axes, over=over)
        return SumRows.apply(y, self.world) if self._crosses(axes, over) else y

    def mean(self, x: Tensor, axes: Sequence[str | None], *, over: Sequence[str]) -> Tensor:
        count = math.prod(n for n, a in zip(x.shape, axes, strict=True) if a in over)
        rows = self.world.row_blocks if self._crosses(axes, over) else 1
        return self.sum(x, axes, over=over) / (count * rows)

    def _row_parts(self) -> tuple[int, int]:
        return self.world.row_blocks, self.world.row_block

    def _all_rows(self, x: Tensor) -> Tensor:
        return self.world.gather(x.detach(), BATCH_MESH_AXES, 0)

    def _crosses(self, axes: Sequence[str | None], over: Sequence[str]) -> bool:
        return "batch" in over and "batch" in axes and self.world.row_blocks > 1
