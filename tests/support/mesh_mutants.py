"""Wrong reductions, one for each mesh axis and place: the checks must see every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Replicate

from portatrain.backends.torch import mesh_ops, parallel
from portatrain.backends.torch.mesh import World


def _method(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, make(getattr(owner, name)))


def _rows_not_summed(whole: Any) -> Any:
    def all_reduce(self: World, x: Any, axes: Any = (), *args: Any) -> Any:
        return x if set(axes) == {"replica", "fsdp", "expert"} else whole(self, x, *([axes] if axes else []), *args)

    return all_reduce


def _averaged(whole: Any) -> Any:
    return lambda self, factor: whole(self, 2.0)


@contextmanager
def _replicas_not_summed() -> Iterator[None]:
    """FSDP2's all-reduce over its replicas does nothing."""
    whole, apply = dist.all_reduce, parallel._apply_fsdp
    theirs: set[str] = set()

    def all_reduce(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if getattr(group, "group_name", None) in theirs:
            return None
        return whole(tensor, *args, group=group, **kwargs)

    def noted(module: Any, world: World, *args: Any) -> None:
        if world.params.shape[0] > 1:
            theirs.add(world.params.get_group("replicas").group_name)
        apply(module, world, *args)

    with mock.patch.object(dist, "all_reduce", all_reduce), mock.patch.object(parallel, "_apply_fsdp", noted):
        yield


def _zero(name: str, make: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    """A mutant of the deepspeed backends, which are imported where one is run."""

    def enter() -> AbstractContextManager[Any]:
        from portatrain.backends.deepspeed.backend import ZeroBackend

        return mock.patch.object(ZeroBackend, name, make(getattr(ZeroBackend, name)))

    return enter


ZERO: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "zero: gradients averaged": _zero(
        "_backward", lambda whole: lambda self, state, objective: state.engine.backward(objective, scale_wrt_gas=False)
    ),
    "zero: the weight of the batch is forgotten": _zero("_scale", lambda whole: lambda self, state, factor: None),
    "zero: norm of this process's part": _zero(
        "_norm", lambda whole: lambda self, state: whole(self, state) / self.processes**0.5
    ),
}
"""Those of the deepspeed backends."""

MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    **ZERO,
    "": nullcontext,
    "rows: loss and weight of this process alone": _method(World, "all_reduce", _rows_not_summed),
    "fsdp: gradients averaged": _method(FSDPModule, "set_gradient_divide_factor", _averaged),
    "replicas: gradients not summed": _replicas_not_summed,
    "replicas: the last microbatch is not told": _method(
        parallel.Sharded, "sync", lambda whole: lambda self, last: whole(self, last=False)
    ),
    "whole parameters: gradients not summed": _method(
        parallel.Sharded, "reduce", lambda whole: lambda self, grads, axes: None
    ),
    "tensor, context: an operand that is whole has a gradient that is not a sum": _method(
        mesh_ops.MeshOps, "_beside", lambda whole: staticmethod(lambda at: [Replicate() for _ in at])
    ),
    "tensor: logits of this process alone": _method(
        World,
        "all_reduce",
        lambda whole: lambda self, x, *args: x if args[:1] == (("tensor",),) and x.ndim == 2 else whole(self, x, *args),
    ),
    "expert: gradients not summed": _method(
        World,
        "scatter_sum",
        lambda whole: lambda self, x, axis, dim: x.chunk(self.mesh.sizes[axis], dim=dim)[self.at[axis]].contiguous(),
    ),
    "norm: copies counted": _method(World, "first", lambda whole: lambda self, axes: True),
    "rows: every process trains on the first rows": _method(
        World, "my_rows", lambda whole: lambda self, rows: slice(0, rows // self.row_blocks)
    ),
    "dropout: offsets within this process's part": _method(
        mesh_ops.MeshOps,
        "_offsets",
        lambda whole: (
            lambda self, shape, placements: torch.arange(whole(self, shape, placements).numel(), dtype=torch.int32)
        ),
    ),
}
