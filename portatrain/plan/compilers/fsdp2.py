"""Trace the torch backend's own step with tensors without contents, on a simulated process group. The result is the
peak memory of one process of FSDP2. Runs in a separate process.

The trace sees what eager execution allocates, to the byte of each tensor's storage. It does not see the allocator's
fragments, NCCL's buffers or a compiler's fusions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from portatrain.backends import choose_kernel
from portatrain.backends.program import make_program
from portatrain.recipe import load_recipe
from portatrain.recipe.overrides import override


def run(asked: Mapping[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """Trace one step of rank 0; return peak bytes by kind, FLOPs and bytes of collectives."""
    stage("loading torch")
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from portatrain.backends.torch.step_counter import Watch
    from portatrain.plan.compilers.xla import batch_of

    recipe = override(load_recipe(asked["recipe"], cwd=None), asked["overrides"])
    world = int(asked["options"]["world"])
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    program = make_program(recipe, mesh=asked["mesh"])
    batch = batch_of(recipe.data, recipe.batch, recipe.accumulation)
    stage(f"tracing rank 0 of {world}, layer by layer")
    backend = _backend(program)  # its process groups are made of real ranks
    # The tensors are a CPU's, since torch derives a GPU's only in a build for it. The kernels are those of the target.
    backend.site = dataclasses.replace(backend.site, device=asked["options"]["device"])
    choose_kernel.taken()
    with _real_meshes(), FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        infos = backend.definition.tensors

        def part(role: str, name: str, index: tuple[int, ...]) -> Any:
            return torch.empty(backend._part(infos[role, name], role)[1], dtype=torch.float32)

        state = backend._lowered(part)
        backend._accumulate(state, batch, 1)
        backend._norm(state)
        torch._foreach_mul_(backend._grads(state), 1.0)
        state.optimizer.step(scale=1.0)
    return {
        "compiler": f"FSDP2 traced, torch {torch.__version__}",
        "fits": True,
        "peak_bytes": watch.peak_bytes,
        "flops": watch.flops,
        "devices": world,
        "kernel_choices": choose_kernel.taken(),
        "collective_bytes": {_axes(program.layout.mesh, n): moved for n, moved in sorted(watch.moved.items())},
    }


@contextmanager
def _real_meshes() -> Iterator[None]:
    """Give the device meshes that torch makes inside this context rank tensors with contents (FSDP2 joins its own mesh
    with tensor's)."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.utils._python_dispatch import _disable_current_modes

    begin = DeviceMesh.__init__

    def begin_with_contents(self: Any, *args: Any, **options: Any) -> None:
        with _disable_current_modes():
            begin(self, *args, **options)

    with mock.patch.object(DeviceMesh, "__init__", begin_with_contents):
        yield


def _backend(program: Any) -> Any:
    import torch

    from portatrain.backends.state import sample_words
    from portatrain.backends.torch.mesh_backend import MeshBackend

    class Traced(MeshBackend):
        """Take batches without contents, and read no values."""

        def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
            mine = {}
            for key, value in batch.items():
                rows = value[self.world.my_rows(value.shape[0])]
                rows = sample_words(rows) if key == "sample" else rows
                mine[key] = torch.zeros(rows.shape, dtype=torch.from_numpy(rows[:0]).dtype)
            return self._values(mine)

    return Traced(program)


def _axes(mesh: Any, size: int) -> str:
    """Return the mesh axes whose groups have ``size`` processes, in the planner's form; the size if several do."""
    found = [axis for axis, n in mesh.sizes.items() if n == size > 1]
    return found[0] if len(found) == 1 else f"{size} processes"
