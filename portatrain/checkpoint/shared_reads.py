"""Share the reading of equal boxes: each process reads one part of a box, and the processes exchange the parts.

Without sharing, a run with `replica=8` reads every byte eight times from the storage. Sharing pays if the network
between the processes is faster than the storage: an object store, or a file system that several hosts use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checkpoints_format.dtypes import item_bytes
from portatrain.backends.base import Backend
from portatrain.backends.program import Program
from portatrain.backends.state import inventory
from portatrain.model.layout import MESH_AXES, Mesh
from portatrain.system import environment

LEAST_BYTES = 64 << 10
"""The smallest part that is worth a request and an exchange; smaller boxes are read whole by every process."""


@dataclass(frozen=True)
class Share:
    """How the copies of a tensor's boxes are read: each box is cut along dimension `dim` into one equal part
    for each device along the mesh `axes` (major first), and every device reads its own part."""

    dim: int
    axes: tuple[str, ...]

    def part(
        self, mesh: Mesh, at: Mapping[str, int], offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (offset, shape) of the part of a box that the device at mesh coordinates `at` reads."""
        mine = shape[self.dim] // mesh.over(self.axes)
        moved = offset[self.dim] + mesh.index(self.axes, at) * mine
        d = self.dim
        return (*offset[:d], moved, *offset[d + 1 :]), (*shape[:d], mine, *shape[d + 1 :])


Shares = Mapping[tuple[str, str], Share]
"""Shares by (role, name). Every process with a copy reads the tensors that have no entry."""


def owners_of(backend: Backend) -> tuple[int, ...] | None:
    """Return the process of every position of the backend's mesh, row-major, if the backend has `owners`. None: each
    process holds an equal consecutive run, as it does unless the network needs another order of devices."""
    owners = getattr(backend, "owners", None)
    if owners is None or list(owners) == consecutive(len(owners), backend.processes):
        return None
    return tuple(owners)


def consecutive(positions: int, processes: int) -> list[int]:
    """Return the process of every position if each process holds an equal consecutive run."""
    return [p * processes // positions for p in range(positions)]


def shares_of(
    program: Program, processes: int, *, owners: Sequence[int] | None = None, gap_bytes: int = 0
) -> dict[tuple[str, str], Share]:
    """Return the tensors that processes with copies can read in parts: those that no mesh axis across processes shards,
    with a dimension that divides. A layer of a Stack is cut, not the Stack, because some backends ask for one layer
    after another. A model's States are left out, because they are small. So are boxes with gaps between parts of at
    most `gap_bytes`: a store that reads across such gaps would send all of the box to every process."""
    layout, mesh = program.layout, program.layout.mesh
    across = _across(mesh, list(owners) if owners is not None else consecutive(mesh.devices, processes))
    found = {}
    for tensor in inventory(program):
        info = tensor.info
        cut = {axis for dim in layout.tensor_spec(info, role=tensor.laid_out_as) for axis in dim}
        axes = tuple(axis for axis in across if axis not in cut)
        ways = mesh.over(axes)
        _, shape = layout.box(info, mesh.coordinates(0), role=tensor.laid_out_as)
        item, inner = item_bytes(info.dtype), range(info.stack_dims, len(shape))
        layer = math.prod(shape[info.stack_dims :]) * item
        if tensor.role == "state" or ways == 1 or layer < ways * LEAST_BYTES:
            continue
        for d in inner:
            run = math.prod(shape[d:]) * item  # bytes between the parts of neighbouring devices
            repeated = math.prod(shape) * item > run
            if shape[d] % ways == 0 and not (repeated and run - run // ways <= gap_bytes):
                found[tensor.key] = Share(d, axes)
                break
    return found


def _across(mesh: Mesh, owners: Sequence[int]) -> tuple[str, ...]:
    """Return the mesh axes along which neighbouring devices may belong to different processes."""
    found, stride = [], 1
    for axis in reversed(MESH_AXES):
        size = mesh.sizes[axis]
        starts = [p for p in range(mesh.devices) if not p // stride % size]
        if any(owners[p] != owners[p + i * stride] for p in starts for i in range(1, size)):
            found.append(axis)
        stride *= size
    return tuple(reversed(found))


def pays(processes: int, *, remote: bool) -> bool:
    """Return whether to read once and exchange: from an object store, and from a file system if the processes are on
    several hosts. The environment may override this; raise UserError if its value is neither 0 nor 1."""
    said = environment.READ_ONCE.get()
    if said is not None:
        return said
    return processes > 1 and (remote or processes > environment.LOCAL_WORLD_SIZE.get())
