"""Implement `portatrain.model.ops_arrays.ArrayOps` in torch. That module has the docstrings and the legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from portatrain.model.measured import hushing
from portatrain.model.ops_checks import (
    Axes,
    Sizes,
    axes_of,
    axis_of,
    check_kernel,
    check_kind,
    check_quiet,
    one_length,
    order_of,
    pieces_of,
    recorded,
    windows,
)
from portatrain.model.ops_composed import Composed, associative_scan


class TorchArrays(Composed):
    """Implement the operations of `TorchOps` that work on arrays."""

    static: Any
    step: Tensor
    weight: Callable[[Any], Any]

    # ---- what `Composed` needs

    def _total(self, x: Tensor, axis: Axes, keepdims: bool) -> Tensor:
        return x.sum(axes_of("ops.sum", x, axis), keepdim=keepdims)

    def _as(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype)

    def _without(self, x: Tensor, axis: Axes) -> Tensor:
        return x.squeeze(axes_of("ops.squeeze", x, axis))

    def _take(self, x: Tensor, at: Sequence[int], axis: int) -> Tensor:
        return x.index_select(axis, torch.tensor(at, device=x.device))

    def _constant(self, values: Sequence[float], shape: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.step.device).reshape(shape)

    # ---- elementwise

    def abs(self, x: Tensor) -> Tensor:
        return torch.abs(x)

    def sign(self, x: Tensor) -> Tensor:
        return torch.where(x.isnan(), x, torch.sign(x)) if x.is_floating_point() else torch.sign(x)

    def floor(self, x: Tensor) -> Tensor:
        return torch.floor(x)

    def sqrt(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)

    def rsqrt(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x)

    def sin(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def cos(self, x: Tensor) -> Tensor:
        return torch.cos(x)

    def erf(self, x: Tensor) -> Tensor:
        return torch.erf(x)

    def log1p(self, x: Tensor) -> Tensor:
        return torch.log1p(x)

    def expm1(self, x: Tensor) -> Tensor:
        return torch.expm1(x)

    def softplus(self, x: Tensor) -> Tensor:
        return F.softplus(x)

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        return torch.clamp(x, low, high)

    def maximum(self, x: Tensor, y: Any) -> Tensor:
        return torch.maximum(x, y if isinstance(y, Tensor) else torch.full_like(x, y))

    def minimum(self, x: Tensor, y: Any) -> Tensor:
        return torch.minimum(x, y if isinstance(y, Tensor) else torch.full_like(x, y))

    # ---- reductions

    def max(self, x: Tensor, *, axis: Axes = -1, keepdims: bool = False) -> Tensor:
        return torch.amax(x, axes_of("ops.max", x, axis, some=True), keepdim=keepdims)

    def argmax(self, x: Tensor, *, axis: int = -1) -> Tensor:
        return torch.argmax(x, axes_of("ops.argmax", x, axis, some=True)[0]).to(torch.int32)

    def log_softmax(self, x: Tensor, *, axis: int = -1) -> Tensor:
        axis = axis_of("ops.log_softmax", x, axis)
        return torch.log_softmax(x, dim=axis, dtype=torch.float32).to(x.dtype)

    def cumsum(self, x: Tensor, *, axis: int) -> Tensor:
        axis = axis_of("ops.cumsum", x, axis)
        return torch.cumsum(x, axis, dtype=torch.float32 if x.is_floating_point() else x.dtype).to(x.dtype)

    # ---- order and indices

    def argsort(self, x: Tensor, *, axis: int = -1, descending: bool = False) -> Tensor:
        axis = axis_of("ops.argsort", x, axis)
        if not descending:
            return torch.sort(x, dim=axis, stable=True).indices.to(torch.int32)
        backwards = torch.sort(x.flip(axis), dim=axis, stable=True).indices.flip(axis)
        return (x.shape[axis] - 1 - backwards).to(torch.int32)

    def take_along(self, x: Tensor, index: Tensor, *, axis: int) -> Tensor:
        axis = axis_of("ops.take_along", x, axis)
        index = index.long().clamp(0, x.shape[axis] - 1)
        sizes = [max(a, b) if 1 in (a, b) else a for a, b in zip(x.shape, index.shape, strict=True)]
        sizes = [min(a, b) if 0 in (a, b) else n for n, a, b in zip(sizes, x.shape, index.shape, strict=True)]
        whole, at = list(sizes), list(sizes)
        whole[axis], at[axis] = x.shape[axis], index.shape[axis]
        return torch.gather(x.expand(whole), axis, index.expand(at))

    def scatter_add(self, x: Tensor, index: Tensor, value: Tensor, *, axis: int) -> Tensor:
        axis = axis_of("ops.scatter_add", x, axis)
        index = index.long().clamp(0, x.shape[axis] - 1).expand(value.shape)
        return x.scatter_add(axis, index, value.to(x.dtype))

    # ---- shapes

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return x.permute(order_of("ops.transpose", x, axes))

    def flip(self, x: Tensor, *, axis: Axes) -> Tensor:
        return torch.flip(x, axes_of("ops.flip", x, axis))

    def roll(self, x: Tensor, shift: int, *, axis: int) -> Tensor:
        return torch.roll(x, shift, axis_of("ops.roll", x, axis))

    def pad(self, x: Tensor, *, axis: int, before: int = 0, after: int = 0, value: float = 0.0) -> Tensor:
        axis = axis_of("ops.pad", x, axis)
        return F.pad(x, [*(0, 0) * (x.ndim - 1 - axis), before, after], value=value)

    def join(self, xs: Sequence[Tensor], *, axis: int) -> Tensor:
        return torch.stack(list(xs), axis_of("ops.join", xs[0][..., None], axis))

    def split(self, x: Tensor, parts: int | Sequence[int], *, axis: int = -1) -> tuple[Tensor, ...]:
        axis = axis_of("ops.split", x, axis)
        return tuple(torch.split(x, pieces_of("ops.split", x, parts, axis), axis))

    # ---- convolutions and images

    def conv(
        self,
        x: Tensor,
        kernel: Tensor,
        *,
        stride: Sizes = 1,
        padding: str = "same",
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Tensor:
        kernel = self.weight(kernel)
        check_kernel(x, kernel, groups)
        size = kernel.shape[0] if x.ndim == 3 else tuple(kernel.shape[:2])
        _, strides, dilations, pads = windows("ops.conv", x, size, stride, padding, dilation)
        compute, run = self.static.compute, F.conv1d if x.ndim == 3 else F.conv2d
        y = _padded(x.to(compute).movedim(-1, 1), pads, 0.0)
        kernel = kernel.to(compute).movedim((-1, -2), (0, 1))
        return run(y, kernel, None, strides, 0, dilations, groups).movedim(1, -1)

    def pool(self, x: Tensor, size: Sizes, *, kind: str, stride: Sizes | None = None, padding: str = "valid") -> Tensor:
        check_kind("ops.pool, kind", kind, ("max", "mean"))
        sizes, strides, _, pads = windows("ops.pool", x, size, stride, padding)
        y = x.movedim(-1, 1)
        if kind == "max":
            run = F.max_pool1d if x.ndim == 3 else F.max_pool2d
            return run(_padded(y, pads, -torch.inf), sizes, strides).movedim(1, -1)
        mean = F.avg_pool1d if x.ndim == 3 else F.avg_pool2d
        found = mean(_padded(y.float(), pads, 0.0), sizes, strides)
        if any(map(any, pads)):
            ones = torch.ones((1, 1, *y.shape[2:]), dtype=torch.float32, device=x.device)
            found = found / mean(_padded(ones, pads, 0.0), sizes, strides)
        return found.to(x.dtype).movedim(1, -1)

    # ---- scans

    @hushing
    def scan(self, fn: Callable[..., Any], carry: Any, xs: Any) -> tuple[Any, Any]:
        before, ys = recorded(self), []
        for t in range(_length("ops.scan", xs, 1)):
            carry, y = fn(carry, tree_map(lambda x, t=t: x[:, t], xs))
            ys.append(y)
        check_quiet(self, before)
        return carry, tree_map(lambda *parts: torch.stack(parts, 1), *ys)

    @hushing
    def associative_scan(self, fn: Callable[[Any, Any], Any], xs: Any, *, axis: int = 1) -> Any:
        def cut(tree: Any, part: slice) -> Any:
            return tree_map(lambda x: x[(slice(None),) * axis + (part,)], tree)

        def weave(even: Any, odd: Any) -> Any:
            def one(a: Tensor, b: Tensor) -> Tensor:
                n = b.shape[axis]
                both = torch.stack([a.narrow(axis, 0, n), b], axis + 1).flatten(axis, axis + 1)
                return torch.cat([both, a.narrow(axis, n, 1)], axis) if a.shape[axis] > n else both

            return tree_map(one, even, odd)

        def join(a: Any, b: Any) -> Any:
            return tree_map(lambda a, b: torch.cat([a, b], axis), a, b)

        n = _length("ops.associative_scan", xs, axis)
        axis = axis_of("ops.associative_scan", tree_leaves(xs)[0], axis)
        return associative_scan(fn, xs, n, cut, weave, join)


def _padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float) -> Tensor:
    """Return x, (B, C, ...), with its spatial axes padded."""
    return F.pad(x, [n for pair in reversed(pads) for n in pair], value=value) if any(map(any, pads)) else x


def _length(what: str, xs: Any, axis: int) -> int:
    return one_length(what, {x.shape[axis_of(what, x, axis)] for x in tree_leaves(xs)})
