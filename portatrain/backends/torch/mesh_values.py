"""Give autograd the values on a mesh: parameters, sums over rows, and values that a remat policy keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from portatrain.backends.torch.mesh import World
from portatrain.backends.torch.remat import keep
from portatrain.model.layout import BATCH_MESH_AXES


def plain(x: Any) -> Any:
    """Return a DTensor as a tensor that is whole on every process; return other values unchanged."""
    return x.full_tensor() if isinstance(x, DTensor) else x


class SumRows(torch.autograd.Function):
    """Sum over processes. Every process has its own loss of the result, so the gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.all_reduce(x.contiguous().clone(), BATCH_MESH_AXES)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.world.all_reduce(g.contiguous().clone(), BATCH_MESH_AXES), None


class Experts(torch.autograd.Function):
    """All-gather a parameter, plain or a DTensor over tensor, that is sharded over expert. Its gradient, from this
    process's rows, is summed in float32 and sharded again."""

    @staticmethod
    def forward(ctx: Any, p: DTensor, world: World) -> Tensor:
        at = dict(zip(p.device_mesh.mesh_dim_names or (), p.placements, strict=True))
        ctx.world, ctx.of, ctx.dim = world, p._spec, at["expert"].dim  # type: ignore[attr-defined]
        ctx.over_tensor = at.get("tensor")
        whole = world.gather(p._local_tensor.detach(), ("expert",), ctx.dim)
        if ctx.over_tensor is None:
            return whole
        return DTensor.from_local(
            whole, world.params["tensor"], [ctx.over_tensor], run_check=False, shape=p.shape, stride=p.stride()
        )

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Tensor, None]:
        spec = ctx.of
        local = g._local_tensor if isinstance(g, DTensor) else g
        mine = ctx.world.scatter_sum(local.float(), "expert", ctx.dim).to(local.dtype)
        return DTensor.from_local(
            mine, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride
        ), None


def of_all_experts(p: Any, world: World) -> Any:
    """Return `p`, gathered over expert if it is a parameter that is sharded over expert."""
    if isinstance(p, DTensor) and "expert" in (p.device_mesh.mesh_dim_names or ()):
        return Experts.apply(p, world)
    return p


class Weight(torch.autograd.Function):
    """Turn a parameter, plain or a DTensor over tensor, into a value on the mesh. Its gradient stays this process's
    share of a sum over the axes on which the parameter is whole; `Sharded.reduce` makes that sum once a step."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, world: World) -> Tensor:
        mesh = world.values
        assert mesh is not None and mesh.mesh_dim_names is not None
        ctx.world, ctx.of = world, p._spec if isinstance(p, DTensor) else None
        over_tensor = p.placements[0] if isinstance(p, DTensor) else Replicate()
        ctx.placements = tuple(over_tensor if n == "tensor" else Replicate() for n in mesh.mesh_dim_names)
        local = p._local_tensor if isinstance(p, DTensor) else p
        return DTensor.from_local(
            local.view_as(local), mesh, ctx.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Tensor, None]:
        keep = [
            have if isinstance(have, Partial) and isinstance(want, Replicate) else want
            for have, want in zip(g.placements, ctx.placements, strict=True)
        ]
        local = g.redistribute(placements=keep).to_local()
        names = ctx.world.values.mesh_dim_names
        # Of equal copies the first one counts: the others add nothing to the sum.
        for name, kept in zip(names, keep, strict=True):
            if isinstance(kept, Replicate) and ctx.world.at[name]:
                local = torch.zeros_like(local)
        if ctx.of is None:
            return local, None
        spec = ctx.of
        return DTensor.from_local(
            local, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride
        ), None


class Exchanged(torch.autograd.Function):
    """Exchange the second half of the positions of x (B, S, ...) between the processes r and n-1-r of context. Doing it
    twice changes nothing, so the gradient is exchanged in the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        half = x.shape[1] // 2
        partner = world.mesh.context - 1 - world.at["context"]
        return torch.cat([x[:, :half], world.swapped(x[:, half:].contiguous(), "context", partner)], dim=1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return Exchanged.forward(ctx, g, ctx.world), None


class Kept(torch.autograd.Function):
    """Pass x through; a remat policy keeps this process's part. Gradients keep their placements, partial sums too."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return DTensor.from_local(
            keep(x._local_tensor), x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
        )

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g
