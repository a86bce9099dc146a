"""Copies of one box share its reading: each process reads a part of it, and the parts are exchanged between them.

Without it a run with `replica=8` asks the storage for every byte eight times. It pays where the network between the
processes is faster than the storage: an object store, or a file system that several hosts share.
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
"""A part below this is not worth a request and an exchange: such a box is read whole by everyone."""


@dataclass(frozen=True)
class Share:
    """How the copies of a tensor's boxes are read: cut along dimension `dim` into as many equal parts as there are
    devices along the mesh `axes` (major first), each of which reads its own."""

    dim: int
    axes: tuple[str, ...]

    def part(
        self, mesh: Mesh, at: Mapping[str, int], offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(offset, shape) of what the device at mesh coordinates `at` reads of a box."""
        mine = shape[self.dim] // mesh.over(self.axes)
        moved = offset[self.dim] + mesh.index(self.axes, at) * mine
        d = self.dim
        return (*offset[:d], moved, *offset[d + 1 :]), (*shape[:d], mine, *shape[d + 1 :])


Shares = Mapping[tuple[str, str], Share]
"""By role and name. Tensors that are not in it are read by every process that holds a copy."""


def owners_of(backend: Backend) -> tuple[int, ...] | None:
    """The process of every position of the backend's mesh, row-major, where its `owners` say so; None: processes hold
    equal consecutive runs, as they do unless the network has the devices of a mesh in another order."""
    owners = getattr(backend, "owners", None)
    if owners is None or list(owners) == consecutive(len(owners), backend.processes):
        return None
    return tuple(owners)


def consecutive(positions: int, processes: int) -> list[int]:
    """The process of every position where each holds an equal run."""
    return [p * processes // positions for p in range(positions)]


def shares_of(
    program: Program, processes: int, *, owners: Sequence[int] | None = None, gap_bytes: int = 0
) -> dict[tuple[str, str], Share]:
    """What processes that hold copies can read in parts: tensors that mesh axes across processes do not cut, in a
    dimension that divides. A layer of a Stack is cut, not the Stack, as some backends ask for one layer after another.
    Left out are a model's States, which are small, and boxes whose other parts are no longer than `gap_bytes`: a store
    that reads on over such gaps would be asked for all of it by everyone."""
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
            run = math.prod(shape[d:]) * item  # bytes from one part of a device to its next
            repeated = math.prod(shape) * item > run
            if shape[d] % ways == 0 and not (repeated and run - run // ways <= gap_bytes):
                found[tensor.key] = Share(d, axes)
                break
    return found


def _across(mesh: Mesh, owners: Sequence[int]) -> tuple[str, ...]:
    """The mesh axes along which a device's neighbour may belong to another process."""
    found, stride = [], 1
    for axis in reversed(MESH_AXES):
        size = mesh.sizes[axis]
        starts = [p for p in range(mesh.devices) if not p // stride % size]
        if any(owners[p] != owners[p + i * stride] for p in starts for i in range(1, size)):
            found.append(axis)
        stride *= size
    return tuple(reversed(found))


def pays(processes: int, *, remote: bool) -> bool:
    """Whether reading once and exchanging is taken to be quicker: from an object store, and from a file system where
    the processes are on several hosts. The environment may say otherwise; UserError where that is no 0 or 1."""
    said = environment.READ_ONCE.get()
    if said is not None:
        return said
    return processes > 1 and (remote or processes > environment.LOCAL_WORLD_SIZE.get())
