"""Mixtures of experts on a mesh: rows travel over the expert axis, features of the body are split over tensor.

Every process of a tensor axis sends the rows of its tokens, with all their features, to the process of their expert
that has its own index along tensor. In a body, rows and parameters are DTensors over tensor. Legend as in
`model/ops_experts.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from portatrain.backends.torch.experts import Rows, TorchExperts, order_of, permuted, same_number
from portatrain.backends.torch.mesh import World
from portatrain.errors import UserError
from portatrain.model.lora import Factored, factored, not_adapted
from portatrain.model.ops_experts import check_experts, check_grouped, outside


class RowExperts(TorchExperts):
    """Implement the operations of `RowOps` for mixtures of experts."""

    world: Any

    def _expert_param(self, p: Any) -> Any:
        if not isinstance(p, DTensor):
            return self.weight(p)
        return _Mine.apply(p, self.world, ()).to(self.static.compute)

    def _on_their_devices(self, run: Callable[..., Any], rows_NE: Tensor, sizes_X: Tensor, mine: int) -> Tensor:
        group = self.world.group(("expert",))
        if group is None or mine == len(sizes_X):
            return run(rows_NE, sizes_X, rows_NE.shape[0])
        mine_RY = sizes_X.reshape(self.world.mesh.expert, -1)
        theirs_RY = torch.empty_like(mine_RY)
        dist.all_to_all_single(theirs_RY, mine_RY.contiguous(), group=group)
        sends, gets = torch.stack([mine_RY.sum(1), theirs_RY.sum(1)]).tolist()
        got = _Exchanged.apply(rows_NE, sends, gets, group)
        # Rows came process by process, sorted by expert on each.
        experts = torch.arange(theirs_RY.shape[1], device=theirs_RY.device).repeat(len(theirs_RY))
        order, back = order_of(experts.repeat_interleave(theirs_RY.flatten()))
        found = run(permuted(got, order, back), theirs_RY.sum(0), rows_NE.shape[0])
        return _Exchanged.apply(permuted(found, back, order), gets, sends, group)


class MeshExperts(RowExperts):
    """Implement the operations of `MeshOps` for mixtures of experts; `MeshOps` has the helpers."""

    axes: Any
    parts: Any
    _value: Callable[[Any], Any]
    _local: Callable[..., Tensor]
    _from: Callable[..., Any]

    def experts(self, body: Callable[..., Any], x_BSE: Any, experts_BSC: Any, weights_BSC: Any, *params: Any) -> Any:
        self._not_inside()
        body, params = factored(body, params)
        x, experts, weights = (self._value(v) for v in (x_BSE, experts_BSC, weights_BSC))
        n = check_experts(x, experts, weights, [tuple(p.shape) for p in params])
        mesh = self.world.mesh
        split = any(isinstance(_over_tensor(p), Shard) for p in params)
        by_seq = mesh.context > 1 and x.shape[1] % mesh.context == 0
        copies = tuple(a for a in ("context",) if mesh.context > 1 and not by_seq)
        at = [Shard(1) if axis == "context" and by_seq else Replicate() for axis in self.axes]
        # Split features make partial sums; so do the gradients of what every process of tensor has whole.
        summed: list[Placement] = [
            Partial() if a == "tensor" and split else p for a, p in zip(self.axes, at, strict=True)
        ]
        tokens = self._local(x, at, summed).to(self.static.compute)
        held = [_Mine.apply(p, self.world, copies) for p in params]
        run = self._on_tensor(self._body(body, [p.to(self.static.compute) for p in held]), split)
        out = self._of_tokens(
            run, tokens, self._local(experts, at), self._local(weights, at, summed), n, same_number(held)
        )
        return self._from(out, summed)

    def _on_tensor(self, run: Callable[..., Any], split: bool) -> Callable[..., Tensor]:
        """Return a function of plain rows that runs a body on DTensors over tensor; with split features it returns this
        process's part of a sum."""
        if self.world.mesh.tensor == 1:
            return run

        def on_tensor(x_NE: Tensor, sizes_X: Tensor, expected: int) -> Tensor:
            found = run(_In.apply(x_NE, self.world, split), sizes_X, expected)
            if isinstance(found.placements[0], Shard):
                found = found.redistribute(placements=[Replicate()])
            partial = isinstance(found.placements[0], Partial)
            local = found.to_local(grad_placements=[Replicate()])
            return local if partial or not split else _First.apply(local, self.world)

        return on_tensor

    def _inside(self, rows: Rows) -> Any:
        inner = super()._inside(rows)
        return inner if self.world.mesh.tensor > 1 else _plain_inside(self.parts, rows)

    def grouped_matmul(self, x_NE: Any, w_XEF: Any) -> Any:
        rows = self.rows if self.rows is not None else outside("ops.grouped_matmul")
        check_grouped("ops.grouped_matmul", x_NE, tuple(w_XEF.shape))
        if isinstance(w_XEF, Factored):
            return w_XEF.multiplied(self.grouped_matmul, x_NE)
        at = w_XEF.placements[0]
        if isinstance(x_NE.placements[0], Partial) and at == Replicate():  # a factor: parts of a sum stay parts
            x = _part(x_NE, Partial(), Replicate()).to(self.static.compute)
            return _made(self.world, self._grouped(x, w_XEF.to_local(grad_placements=[Partial()]), rows), Partial())
        contracted, kept = at == Shard(1), at == Shard(2)
        x_at, grad_at = (Shard(1),) * 2 if contracted else (Replicate(), Partial() if kept else Replicate())
        x = _part(x_NE, x_at, grad_at).to(self.static.compute)
        w = w_XEF.to_local(grad_placements=[at])
        return _made(self.world, self._grouped(x, w, rows), Partial() if contracted else Shard(1) if kept else at)

    def grouped_bias(self, x_NF: Any, p_XF: Any) -> Any:
        rows = self.rows if self.rows is not None else outside("ops.grouped_bias")
        p_XF = not_adapted(p_XF)
        check_grouped("ops.grouped_bias", x_NF, tuple(p_XF.shape))
        x_at, p_at = x_NF.placements[0], p_XF.placements[0]
        if isinstance(x_at, Partial) and p_at == Replicate():  # once, on the first of the processes
            p = _First.apply(p_XF.to_local(grad_placements=[Replicate()]), self.world)
            return _made(self.world, self._biased(_part(x_NF, x_at, Replicate()), p, rows), x_at)
        at = Shard(1) if Shard(1) in (x_at, p_at) else Replicate()
        return _made(self.world, self._biased(_part(x_NF, at, at), _part(p_XF, at, at), rows), at)


def _plain_inside(parts: Any, rows: Rows) -> Any:
    return dataclasses.replace(parts, rows=rows, auxes={}, tallies={}, across=None)


def _part(x: Any, at: Placement, grad: Placement) -> Tensor:
    if x.placements != (at,):
        x = x.redistribute(placements=[at])
    return x.to_local(grad_placements=[grad])


def _made(world: World, local: Tensor, at: Placement) -> Any:
    return DTensor.from_local(local, world.params["tensor"], [at], run_check=False)


def _over_tensor(p: Any) -> Placement:
    """Return how a param is placed over tensor."""
    if not isinstance(p, DTensor):
        return Replicate()
    return dict(zip(p.device_mesh.mesh_dim_names or (), p.placements, strict=True)).get("tensor", Replicate())


class _Mine(torch.autograd.Function):
    """Return a param for the experts of this process: plain, or a DTensor over tensor. Over `copies`, and over tensor
    where it has equal gradients, of equal gradients the first one counts."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, world: World, copies: Sequence[str]) -> Any:
        at = _over_tensor(p)
        ctx.world, ctx.copies, ctx.at, ctx.of = world, copies, at, p._spec if isinstance(p, DTensor) else None
        local = p._local_tensor if isinstance(p, DTensor) else p
        if at == Shard(0):
            raise UserError(
                "ops.experts on a mesh of the torch backend",
                expected="experts over the mesh axis expert",
                got="experts over tensor",
                do="Map the axis experts to 'expert'.",
            )
        return _made(world, local.view_as(local), at) if world.mesh.tensor > 1 else local.view_as(local)

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Any, None, None]:
        local, copies = g, ctx.copies
        if isinstance(g, DTensor):
            if isinstance(ctx.at, Shard) and g.placements != (ctx.at,):
                g = g.redistribute(placements=[ctx.at])
            elif isinstance(g.placements[0], Shard) and not isinstance(ctx.at, Shard):
                g = g.redistribute(placements=[Replicate()])
            copies = (*copies, "tensor") if g.placements == (Replicate(),) else copies
            local = g._local_tensor
        if not ctx.world.first(copies):
            local = torch.zeros_like(local)
        if ctx.of is None:
            return local, None, None
        spec = ctx.of
        return (
            DTensor.from_local(
                local, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride
            ),
            None,
            None,
        )


class _In(torch.autograd.Function):
    """Turn rows, which every process of tensor has, into a DTensor. With split features the gradient is this process's
    part of a sum, else it is whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World, split: bool) -> Any:
        ctx.world, ctx.split = world, split
        return _made(world, x.view_as(x), Replicate())

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Tensor, None, None]:
        if ctx.split and isinstance(g.placements[0], Partial):
            return g._local_tensor, None, None
        whole = g.redistribute(placements=[Replicate()])._local_tensor
        return (torch.zeros_like(whole) if ctx.split and ctx.world.at["tensor"] else whole), None, None


class _First(torch.autograd.Function):
    """Make a value that every process of tensor has the sum of parts: the first has it, the others have zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.first = world.at["tensor"] == 0
        return x.view_as(x) if ctx.first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class _Exchanged(torch.autograd.Function):
    """Send the first sends[0] rows to process 0 of the group, the next sends[1] to process 1, and so on; return the
    gets[0] rows from process 0, and so on."""

    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, sends: list[int], gets: list[int], group: Any) -> Tensor:
        ctx.sends, ctx.gets, ctx.group = sends, gets, group
        out = x_NE.new_empty(sum(gets), x_NE.shape[1])
        dist.all_to_all_single(out, x_NE.contiguous(), gets, sends, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchanged.forward(ctx, g, ctx.gets, ctx.sends, ctx.group), None, None, None
