"""Values on a mesh as autograd sees them: parameters, sums over rows, what a remat policy keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from portatrain.backends.torch.mesh import World
from portatrain.backends.torch.remat import keep
from portatrain.model.layout import BATCH_MESH_AXES


def plain(x: Any) -> Any:
    """The value of a DTensor that is (made) whole on every process; other values as they are."""
    return x.full_tensor() if isinstance(x, DTensor) else x


class SumRows(torch.autograd.Function):
    """Sum over processes; every one has its own loss of the result, so gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.all_reduce(x.contiguous().clone(), BATCH_MESH_AXES)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.world.all_reduce(g.contiguous().clone(), BATCH_MESH_AXES), None


class Experts(torch.autograd.Function):
    """A parameter that is cut over expert, of all experts: plain, or a DTensor over tensor. It is gathered where it is
    used, as over fsdp; its gradient, of this process's rows, is summed in float32 and cut again."""

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
    """`p`, gathered if it is a parameter that is cut over expert."""
    if isinstance(p, DTensor) and "expert" in (p.device_mesh.mesh_dim_names or ()):
        return Experts.apply(p, world)
    return p


class Weight(torch.autograd.Function):
    """A parameter, plain or a DTensor over tensor, as a value on the mesh. Its gradient is left as this process's share
    of a sum over the axes on which it is whole: over those the sum is made once a step, not here."""

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


class Kept(torch.autograd.Function):
    """x, of which a remat policy keeps this process's part. A gradient passes as it lies: a sum need not be made."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return DTensor.from_local(
            keep(x._local_tensor), x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
        )

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g
