"""Measure activations that are DTensors over context and tensor: each process its part, and then all together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from portatrain.backends.torch.probe import square


class MeshMeasured:
    """The part of `MeshOps` that measures; `MeshOps` has the helpers."""

    parts: Any
    axes: Any
    path: str
    measures: bool
    _value: Callable[[Any], Any]
    _local: Callable[..., Tensor]
    _from: Callable[..., Any]
    _keep: Callable[..., list[Placement]]
    _measure: Callable[..., None]

    def _square(self, x: Any) -> Tensor:
        x, at = self._complete(x)
        each: list[Placement] = [Partial() if isinstance(p, Shard) else Replicate() for p in at]
        total: Tensor = self._from(square(self._local(x, at)), each).full_tensor()
        return total

    def _peaks(self, x: Any) -> Tensor:
        with torch.no_grad():
            x, at = self._complete(x)
            last = x.ndim - 1
            each: list[Placement] = [
                (Shard(0) if p.dim == last else Partial("max")) if isinstance(p, Shard) else Replicate() for p in at
            ]
            local = self._local(x, at).amax(tuple(range(last))).float()
            whole: Tensor = self._from(local, each).full_tensor()
            return whole[None, None]

    def _complete(self, x: Any) -> tuple[Any, list[Placement]]:
        """Return x without gradient, and its placements with partial sums completed."""
        x = self._value(x).detach()
        return x, self._keep(x)

    def attention(self, *args: Any, **options: Any) -> Any:
        """Compute attention; the largest logit is that of all processes."""
        self.parts.auxes.clear()
        out = super().attention(*args, **options)  # type: ignore[misc]
        if self.measures:
            found = [aux.value_B for aux in self.parts.auxes.values()]
            self.parts.auxes.clear()
            with torch.no_grad():
                mine = torch.cat(found).amax().reshape(1)
                top = self._from(mine, [Partial("max") for _ in self.axes]).full_tensor()
            self._measure("logit", self.path, top[None, None], "peaks")
        return out
