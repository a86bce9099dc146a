"""Locate this process in the mesh: coordinates, process groups, and the device meshes of DTensor and FSDP2.

Ranks count row-major over `MESH_AXES`, as `Mesh.coordinates` does. Three views of the same processes:

- rows: the axes that split the batch (replica, fsdp, expert). Activations are plain tensors over them.
- values: those of context and tensor that are larger than 1. Activations are DTensors over them.
- params: replicas x fsdp x expert x tensor, for FSDP2. `replicas` joins replica and context: over both, a parameter
  is whole, and its gradient is the sum of the gradients of the processes.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from portatrain.backends.torch.devices import detect, local_device, process_group_backend
from portatrain.errors import UserError
from portatrain.model.layout import BATCH_MESH_AXES, MESH_AXES, Layout, Mesh
from portatrain.system.processes import world_size

TIMEOUT_S = 600
"""The time after which a collective gives up on a process that does not answer."""

REPLICAS = ("replica", "context")
"""Mesh axes over which FSDP2 replicates its shards."""


def check_processes(mesh: Mesh, processes: int | None) -> None:
    """Raise UserError unless the number of processes equals the number of devices of the mesh. None: no process
    group."""
    if processes is None:
        raise UserError(
            f"mesh {mesh} on the torch backend",
            expected=f"{mesh.devices} processes, one a device",
            got="one process",
            do=f"Start it with `portatrain train ... --devices {mesh.devices}` on one machine, or with torchrun.",
        )
    if processes != mesh.devices:
        raise UserError(
            f"mesh {mesh} on the torch backend",
            expected=f"{mesh.devices} processes, one a device",
            got=str(processes),
            do=f"Use a mesh of {processes} devices, such as fsdp={processes}, or start {mesh.devices} processes.",
        )


def join(mesh: Mesh) -> torch.device:
    """Join the process group that the environment names, unless this process has joined; return the process's device.

    torchrun and `portatrain train --devices` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. gloo
    carries tensors of the host, the device's own library (`devices`) all others. Raises UserError before it waits for
    other processes.
    """
    if dist.is_initialized():
        check_processes(mesh, dist.get_world_size())
    else:
        check_processes(mesh, world_size())
    row = detect()
    device = local_device(row, f"mesh {mesh}")
    if not dist.is_initialized():
        dist.init_process_group(
            process_group_backend(row),
            timeout=timedelta(seconds=TIMEOUT_S),
            device_id=device if row.type == "cuda" else None,
        )
        atexit.register(leave)
    return device


def leave() -> None:
    """Destroy the process group, if there is one."""
    _groups_of.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class _Groups:
    """The process groups of a mesh. They own threads and connections, so all programs on a mesh share them."""

    params: DeviceMesh
    values: DeviceMesh | None
    lines: dict[tuple[str, ...], dist.ProcessGroup | None]


@functools.cache
def _groups_of(mesh: Mesh, device_type: str) -> _Groups:
    sizes = mesh.sizes
    ranks = torch.arange(mesh.devices).view(tuple(sizes.values()))
    r, f, e, c, t = sizes.values()
    by_params = ranks.permute(0, 3, 1, 2, 4).reshape(r * c, f, e, t)
    params = DeviceMesh(device_type, by_params, mesh_dim_names=("replicas", "fsdp", "expert", "tensor"))
    names = tuple(a for a in ("context", "tensor") if sizes[a] > 1)
    values = None
    if names:
        kept = ranks.view(r * f * e, *(sizes[a] for a in names))
        values = DeviceMesh(device_type, kept, mesh_dim_names=("rows", *names))[names]
    return _Groups(params, values, {})


class World:
    """The processes of one program. All processes must call collectives in the same order."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.mesh, self.device = layout, layout.mesh, device
        self.rank = dist.get_rank()
        self.at = self.mesh.coordinates(self.rank)
        groups = _groups_of(self.mesh, device.type)
        self.params, self.values, self._lines = groups.params, groups.values, groups.lines
        self.row_blocks = self.mesh.over(BATCH_MESH_AXES)
        """The number of parts that a microbatch is cut into."""
        self.row_block = self.mesh.index(BATCH_MESH_AXES, self.at)
        """The index of this process's part."""

    @property
    def data_parallel(self) -> DeviceMesh | None:
        """Return FSDP2's mesh: fsdp, or replicas x fsdp; None if there is nothing to shard or to reduce."""
        replicas, fsdp, *_ = self.params.shape
        if replicas > 1:
            return self.params["replicas", "fsdp"]
        return self.params["fsdp"] if fsdp > 1 else None

    def group(self, axes: Sequence[str]) -> dist.ProcessGroup | None:
        """Return the group of the processes that differ from this one only along `axes`; None if there are no
        others."""
        wanted = tuple(a for a in MESH_AXES if a in axes and self.mesh.sizes[a] > 1)
        if wanted not in self._lines:
            self._lines[wanted] = self._new_group(wanted)
        return self._lines[wanted]

    def _new_group(self, axes: tuple[str, ...]) -> dist.ProcessGroup | None:
        if not axes:
            return None
        if self.mesh.over(axes) == self.mesh.devices:
            return dist.group.WORLD
        mine = None
        others = [a for a in MESH_AXES if a not in axes]
        for fixed in itertools.product(*(range(self.mesh.sizes[a]) for a in others)):
            at = dict(zip(others, fixed, strict=True))
            moved = itertools.product(*(range(self.mesh.sizes[a]) for a in axes))
            ranks = [self.mesh.index(MESH_AXES, {**at, **dict(zip(axes, m, strict=True))}) for m in moved]
            made = dist.new_group(ranks)  # every process makes every group
            if self.rank in ranks:
                mine = made
        return mine

    # ---- collectives without gradient

    def all_reduce(self, x: Tensor, axes: Sequence[str] = MESH_AXES, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce x in place over `axes` and return it. All processes along the axes get the same bits."""
        group = self.group(axes)
        if group is not None:
            dist.all_reduce(x, op=op, group=group)
        return x

    def gather(self, x: Tensor, axes: Sequence[str], dim: int) -> Tensor:
        """All-gather the parts along `axes` (major first) and join them along `dim`."""
        for axis in reversed(axes):
            group = self.group((axis,))
            if group is not None:
                parts = [torch.empty_like(x) for _ in range(self.mesh.sizes[axis])]
                dist.all_gather(parts, x.contiguous(), group=group)
                x = torch.cat(parts, dim=dim)
        return x

    def scatter_sum(self, x: Tensor, axis: str, dim: int) -> Tensor:
        """Reduce-scatter x over `axis`: return this process's part along `dim` of the sum."""
        group = self.group((axis,))
        if group is None:
            return x
        parts = x.chunk(self.mesh.sizes[axis], dim=dim)
        mine = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        # The name of the function until torch 2.12.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(mine, torch.cat(parts), group=group)
        return mine

    def swapped(self, x: Tensor, axis: str, partner: int) -> Tensor:
        """Send x to the process with index `partner` along `axis`, and return what that process sends."""
        group = self.group((axis,))
        if group is None:
            return x
        sizes = [x.numel() if i == partner else 0 for i in range(self.mesh.sizes[axis])]
        theirs = torch.empty_like(x)
        dist.all_to_all_single(theirs.view(-1), x.view(-1), sizes, sizes, group=group)
        return theirs

    def gather_tensor(self, x: Tensor, spec: Sequence[Sequence[str]]) -> Tensor:
        """Return the logical tensor, gathered from boxes under `spec`; `x` is the box of this process."""
        for dim, axes in enumerate(spec):
            x = self.gather(x, axes, dim)
        return x

    def first(self, axes: Sequence[str]) -> bool:
        """Return whether this process is first along every one of `axes`. Of equal copies only the first one counts."""
        return all(self.at[a] == 0 for a in axes)

    def my_rows(self, rows: int) -> slice:
        """Return this process's part of `rows` samples."""
        mine = math.ceil(rows / self.row_blocks)
        return slice(self.row_block * mine, (self.row_block + 1) * mine)
