"""Implement `portatrain.model.ops_arrays.ArrayOps` on DTensors.

Elementwise operations follow DTensor's own rules. All others get the axes that they act along whole, and the local part
of the other axes. The result has the placements of the operand. So every process of a mesh axis repeats the work along
an axis that this mesh axis shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.utils._pytree import tree_map

from portatrain.backends.torch.ops_arrays import TorchArrays
from portatrain.model.ops_checks import Axes, Sizes, axes_of, axis_of, order_of


class MeshArrays(TorchArrays):
    """Implement the operations of `MeshOps` that work on arrays; `MeshOps` has the helpers."""

    parts: Any
    world: Any
    _value: Callable[[Any], Any]
    _keep: Callable[..., list[Any]]
    _local: Callable[..., Tensor]
    _from: Callable[..., Any]
    _beside: Callable[..., list[Any]]
    _whole: Callable[..., Tensor]

    def _along(self, name: str, x: Any, axis: Axes, keepdims: bool | None = None, **options: Any) -> Any:
        """Apply the operation to the local part of x with `axis` whole. keepdims: for a reduction, else None."""
        x = self._value(x)
        gone = axes_of(f"ops.{name}", x, axis)
        at = self._keep(x, *gone)
        given = {"axis": axis, **options} if keepdims is None else {"axis": axis, "keepdims": keepdims, **options}
        found = getattr(self.parts, name)(self._local(x, at), **given)
        if found.ndim < x.ndim:
            at = [Shard(p.dim - sum(g < p.dim for g in gone)) if isinstance(p, Shard) else p for p in at]
        return self._from(found, at)

    # ---- elementwise, where the other operand may be plain

    def maximum(self, x: Any, y: Any) -> Any:
        x = self._value(x)
        return super().maximum(x, self._value(y))

    def minimum(self, x: Any, y: Any) -> Any:
        x = self._value(x)
        return super().minimum(x, self._value(y))

    # ---- reductions

    def max(self, x: Any, *, axis: Axes = -1, keepdims: bool = False) -> Any:
        return self._along("max", x, axis, keepdims)

    def min(self, x: Any, *, axis: Axes = -1, keepdims: bool = False) -> Any:
        return self._along("min", x, axis, keepdims)

    def argmax(self, x: Any, *, axis: int = -1) -> Any:
        return self._along("argmax", x, axis)

    def argmin(self, x: Any, *, axis: int = -1) -> Any:
        return self._along("argmin", x, axis)

    def logsumexp(self, x: Any, *, axis: Axes = -1, keepdims: bool = False) -> Any:
        return self._along("logsumexp", x, axis, keepdims)

    def log_softmax(self, x: Any, *, axis: int = -1) -> Any:
        return self._along("log_softmax", x, axis)

    def var(self, x: Any, *, axis: Axes = -1, keepdims: bool = False) -> Any:
        return self._along("var", x, axis, keepdims)

    def std(self, x: Any, *, axis: Axes = -1, keepdims: bool = False) -> Any:
        return self._along("std", x, axis, keepdims)

    def norm(self, x: Any, *, axis: Axes = -1, keepdims: bool = False) -> Any:
        return self._along("norm", x, axis, keepdims)

    def cumsum(self, x: Any, *, axis: int) -> Any:
        return self._along("cumsum", x, axis)

    # ---- order and indices

    def sort(self, x: Any, *, axis: int = -1, descending: bool = False) -> Any:
        return self._along("sort", x, axis, descending=descending)

    def argsort(self, x: Any, *, axis: int = -1, descending: bool = False) -> Any:
        return self._along("argsort", x, axis, descending=descending)

    def take_along(self, x: Any, index: Any, *, axis: int) -> Any:
        return self._whole_but_batch(lambda x, index: self.parts.take_along(x, index, axis=axis), x, index)

    def scatter_add(self, x: Any, index: Any, value: Any, *, axis: int) -> Any:
        return self._whole_but_batch(lambda *given: self.parts.scatter_add(*given, axis=axis), x, index, value)

    def _whole_but_batch(self, fn: Callable[..., Any], *xs: Any) -> Any:
        """Apply fn to whole arrays of this process's samples."""
        whole = [Replicate()] * self.world.values.ndim
        return tree_map(lambda y: self._from(y, whole), fn(*(self._local(self._value(x), whole) for x in xs)))

    # ---- shapes

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        x = self._value(x)
        order, at = order_of("ops.transpose", x, axes), self._keep(x)
        found = self._local(x, at).permute(order)
        return self._from(found, [Shard(order.index(p.dim)) if isinstance(p, Shard) else p for p in at])

    def flip(self, x: Any, *, axis: Axes) -> Any:
        return self._along("flip", x, axis)

    def roll(self, x: Any, shift: int, *, axis: int) -> Any:
        x = self._value(x)
        at = self._keep(x, axis_of("ops.roll", x, axis))
        return self._from(self.parts.roll(self._local(x, at), shift, axis=axis), at)

    def pad(self, x: Any, *, axis: int, before: int = 0, after: int = 0, value: float = 0.0) -> Any:
        return self._along("pad", x, axis, before=before, after=after, value=value)

    def join(self, xs: Sequence[Any], *, axis: int) -> Any:
        values = [self._value(x) for x in xs]
        axis = axis_of("ops.join", values[0][..., None], axis)
        at = self._keep(values[0])
        found = torch.stack([self._local(x, at) for x in values], axis)
        return self._from(found, [Shard(p.dim + (p.dim >= axis)) if isinstance(p, Shard) else p for p in at])

    def split(self, x: Any, parts: int | Sequence[int], *, axis: int = -1) -> tuple[Any, ...]:
        x = self._value(x)
        at = self._keep(x, axis_of("ops.split", x, axis))
        return tuple(self._from(y, at) for y in self.parts.split(self._local(x, at), parts, axis=axis))

    # ---- convolutions and images

    def conv(
        self, x: Any, kernel: Any, *, stride: Sizes = 1, padding: str = "same", dilation: Sizes = 1, groups: int = 1
    ) -> Any:
        whole = [Replicate()] * self.world.values.ndim
        y = self.parts.conv(
            self._local(self._value(x), whole),
            self._whole(kernel, whole),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        return self._from(y, whole)

    def pool(self, x: Any, size: Sizes, *, kind: str, stride: Sizes | None = None, padding: str = "valid") -> Any:
        x = self._value(x)
        at = self._keep(x, *range(1, x.ndim - 1))
        return self._from(self.parts.pool(self._local(x, at), size, kind=kind, stride=stride, padding=padding), at)

    def resize(self, x: Any, size: Sizes, *, method: str) -> Any:
        x = self._value(x)
        at = self._keep(x, *range(1, x.ndim - 1))
        return self._from(self.parts.resize(self._local(x, at), size, method=method), at)

    # ---- scans and noise

    def _made_whole(self, x: Any, *dims: int) -> Any:
        x = self._value(x)
        return x.redistribute(placements=self._keep(x, *dims))

    def scan(self, fn: Callable[..., Any], carry: Any, xs: Any) -> tuple[Any, Any]:
        carry, xs = tree_map(self._value, carry), tree_map(lambda x: self._made_whole(x, 1), xs)
        return super().scan(fn, carry, xs)

    def associative_scan(self, fn: Callable[[Any, Any], Any], xs: Any, *, axis: int = 1) -> Any:
        return super().associative_scan(fn, tree_map(lambda x: self._made_whole(x, axis), xs), axis=axis)

    def noise(self, *shape: int, site: int, kind: str = "normal", draw: int = 0) -> Any:
        return self._value(self.parts.noise(*shape, site=site, kind=kind, draw=draw))
