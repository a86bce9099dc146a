"""Implement `Ops.across_samples` in torch; `portatrain.model.across_samples` says how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from portatrain.model.across_samples import Across, check_arrays, fits, grouped, outside_stacks, results
from portatrain.model.measured import hushing
from portatrain.model.ops_results import Loss


class _Scaled(torch.autograd.Function):
    """Return x; its gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.factor, None


class AcrossSamples:
    """The operation for plain tensors. `RowOps` gathers the rows of all processes."""

    across: Across | None
    sample: Tensor
    aux: Callable[..., None]

    def _row_parts(self) -> tuple[int, int]:
        """Return (the number of parts into which the rows of a microbatch are cut, the index of this one)."""
        return 1, 0

    def _all_rows(self, x: Tensor) -> Tensor:
        """Return the rows of all parts of the microbatch, without gradient."""
        return x.detach()

    @hushing
    def across_samples(self, fn: Callable[..., Any], *xs: Tensor, group: int | None = None) -> Loss:
        across = outside_stacks(self.across)
        rows = check_arrays(xs, group)
        there_B = (self.sample[:, 1] >= 0).expand(rows).to(torch.int32)
        values = (*xs, there_B)
        if fits(rows, group, across):
            return self._compared(fn, values, group, slice(0, rows), 1)
        call, across.calls = across.calls, across.calls + 1
        parts, part = self._row_parts()
        if across.collecting:
            across.found.append([self._all_rows(x) for x in values])
            return _no_loss(there_B)
        if across.microbatches > 1 and across.held is None:
            across.wanted = True
            return _no_loss(there_B)
        if across.microbatches == 1:
            whole = [self._all_rows(x) for x in values] if parts > 1 else list(values)
        else:
            whole = across.held[call]  # type: ignore[index]
        start, parts = (across.index * parts + part) * rows, parts * across.microbatches
        if parts > 1:
            whole = [_with_live_rows(w, x, start, parts) for w, x in zip(whole, values, strict=True)]
        whole = [w[: across.rows] for w in whole]
        return self._compared(fn, tuple(whole), group, slice(start, start + rows), parts)

    def _compared(
        self, fn: Callable[..., Any], whole: tuple[Tensor, ...], group: int | None, mine: slice, parts: int
    ) -> Loss:
        shape = grouped(whole[0].shape[0], group)
        *xs, there = (x.reshape(*shape, *x.shape[1:]) for x in whole)
        loss, weight, metrics = results(fn(*xs, there > 0), shape)
        for name, value in metrics.items():
            self.aux(name, _rows(value.detach(), mine))
        total = loss.float().sum()
        return Loss(total / parts if parts > 1 else total, _rows(weight, mine), _rows(loss.detach(), mine))


def _with_live_rows(whole: Tensor, x: Tensor, start: int, parts: int) -> Tensor:
    x = _Scaled.apply(x, parts) if x.is_floating_point() else x
    return torch.cat([whole[:start], x, whole[start + x.shape[0] :]])


def _rows(value_GN: Tensor, mine: slice) -> Tensor:
    """Return the values of this part's rows; rows that fill up a mesh have 0."""
    found = value_GN.float().flatten()[mine]
    missing = mine.stop - mine.start - found.shape[0]
    return torch.nn.functional.pad(found, (0, missing)) if missing else found


def _no_loss(like_B: Tensor) -> Loss:
    zeros_B = torch.zeros_like(like_B, dtype=torch.float32)
    return Loss(zeros_B.sum(), zeros_B, zeros_B)


def joined(found: list[list[list[Tensor]]]) -> list[list[Tensor]]:
    """Join what every microbatch found, by call and array, along the rows."""
    return [[torch.cat(parts) for parts in zip(*calls, strict=True)] for calls in zip(*found, strict=True)]
