"""Present the devices of torch-xla as one SPMD mesh: shard tensors over them, and read tensors from them.

One process holds all devices. A tensor has its global shape, an annotation gives its sharding, and XLA's partitioner
adds the collectives.
"""

from __future__ import annotations

import functools
import logging
import math
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.backends as backends
import torch_xla.core.xla_model as xla_model
import torch_xla.distributed.spmd as spmd
import torch_xla.runtime as runtime
from torch import Tensor
from torch_xla.debug import metrics

from portatrain.errors import UserError
from portatrain.model.layout import Layout, Mesh, Spec
from portatrain.system import processes

Part = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape) of a device's part of a tensor."""

MOST_AXES = 5
"""The largest number of axes of an array that is sharded on its way to the devices: torch-xla 2.9 cannot shard six."""


@functools.cache
def device() -> torch.device:
    """Return the one virtual device that stands for all devices. The first call starts XLA's client."""
    runtime.use_spmd()
    return torch_xla.device()


def kind() -> str:
    """Return the kind of the devices, such as cpu or tpu."""
    return str(runtime.device_type()).lower()


def on_cpu() -> bool:
    return kind() == "cpu"


def check_mesh(mesh: Mesh) -> None:
    """Raise UserError unless `mesh` has all devices, because SPMD on torch-xla uses every device."""
    if (n := processes.world_size() or 1) > 1:
        raise UserError(
            f"{n} processes on the torch-xla backend",
            expected="one process, which sees all devices of its host",
            got=str(n),
            do="Start one process; for several hosts use --backend jax.",
        )
    there = runtime.global_runtime_device_count()
    if there != mesh.devices:
        more = f"or set CPU_NUM_DEVICES={mesh.devices} before it starts" if on_cpu() else "or hide the others from it"
        raise UserError(
            f"mesh {mesh} on the torch-xla backend",
            expected=f"a mesh of the {there} device(s) that torch-xla sees",
            got=f"{mesh.devices}",
            do=f"Use one of {there}, as in fsdp={there}; {more}.",
        )


def sync() -> None:
    """Run all pending operations as one graph."""
    torch_xla.sync()


def use_precision(precision: str) -> None:
    """Set the precision of products that are traced from now on: without it an accelerator would round float32 operands
    to bfloat16. For bfloat16 operands it sets nothing."""
    wanted = "highest" if precision == "fp32" else "default"
    if backends.get_mat_mul_precision() != wanted:
        # torch-xla warns on a second call in a process, as the precisions of graphs are easily mixed up.
        logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)
        backends.set_mat_mul_precision(wanted)


def compilations() -> int:
    """Return the number of graphs that this process has compiled."""
    found = metrics.metric_data("CompileTime")
    return 0 if found is None else int(found[0])


class Devices:
    """The mesh of a layout: `laid` annotates a tensor, `put` makes one, `parts` reads one."""

    def __init__(self, layout: Layout) -> None:
        self.device = device()
        check_mesh(layout.mesh)
        self.layout = layout
        # Axes of size 1 shard nothing; the other axes keep the layout's order.
        self.sizes = {axis: n for axis, n in layout.mesh.sizes.items() if n > 1}
        self.mesh: Any = None
        if self.sizes:
            ids = np.arange(layout.mesh.devices)
            self.mesh = spmd.Mesh(ids, tuple(self.sizes.values()), tuple(self.sizes))

    def partition(self, spec: Spec) -> tuple[Any, ...]:
        """Return a spec in torch-xla's form: None, an axis or a tuple of axes for each dimension."""
        found = []
        for dim in spec:
            axes = tuple(a for a in dim if a in self.sizes)
            found.append(axes[0] if len(axes) == 1 else axes or None)
        return tuple(found)

    def laid(self, tensor: Tensor, spec: Spec) -> Tensor:
        """Annotate `tensor` in place and return it. Contents that exist move to the devices that hold them; contents
        that are still to be computed will have this sharding."""
        if self.mesh is not None:
            spmd.mark_sharding(tensor, self.mesh, self.partition(spec))
        else:  # the form in which a step leaves it; any other would make the next step a new graph
            torch_xla._XLAC._xla_mark_sharding(tensor, torch_xla._XLAC.OpSharding([], [], [], 0))
        return tensor

    def constrained(self, x: Tensor, spec: Spec) -> Tensor:
        """Constrain x, and its gradient, to the sharding of `spec`."""
        return x if self.mesh is None else _Constrained.apply(x, self, spec)

    def put(self, array: np.ndarray, spec: Spec | None = None) -> Tensor:
        """Return a tensor with the contents of `array`, sharded by `spec`; without it, whole on every device."""
        tensor = torch.from_numpy(np.array(array)).to(self.device)
        return self.laid(tensor, ((),) * array.ndim if spec is None else spec)

    def parts(self, tensor: Tensor) -> list[Part]:
        """Return the part of each device, for a tensor that has been computed."""
        shape = tuple(tensor.shape)
        whole = ((0,) * len(shape), shape)
        if self.mesh is None:
            return [whole]
        xla_model.wait_device_ops()  # the sharding is known once the contents exist
        found = []
        for _, index in torch_xla._XLAC._get_local_shard_replica_and_indices([tensor])[0]:
            if index is Ellipsis or not isinstance(index, Sequence):
                found.append(whole)
                continue
            bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
            found.append((tuple(b[0] for b in bounds), tuple(b[1] - b[0] for b in bounds)))
        return found

    def contents(self, tensor: Tensor) -> list[np.ndarray]:
        """Return the host's copies of the parts that `parts` lists."""
        if self.mesh is None:
            return [fetched(tensor)]
        shards = torch_xla._XLAC._get_local_shards([tensor])[0]
        parts = self.parts(tensor)
        return [_array(shard).reshape(shape) for (shard, _), (_, shape) in zip(shards, parts, strict=True)]

    def whole(self, tensor: Tensor) -> np.ndarray:
        """Return the whole of a tensor that has been computed, on the host."""
        if self.mesh is None or not tensor.ndim:
            return fetched(tensor)
        parts, arrays = self.parts(tensor), self.contents(tensor)
        out = np.empty(tuple(tensor.shape), arrays[0].dtype)
        for (offset, shape), array in zip(parts, arrays, strict=True):
            out[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] = array
        return out

    def bytes_held(self, tensor: Tensor) -> int:
        """Return the bytes of a tensor on all devices together."""
        return sum(math.prod(shape) for _, shape in self.parts(tensor)) * tensor.element_size()


class _Constrained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, devices: Devices, spec: Spec) -> Tensor:
        ctx.devices, ctx.spec = devices, spec
        return devices.laid(_computed(x), spec)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.devices.laid(_computed(g), ctx.spec), None, None


def _computed(x: Tensor) -> Tensor:
    """Return x as the result of an operation, which XLA removes: to annotate x itself would move its contents."""
    return x * 1


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


def fetched(tensor: Tensor) -> np.ndarray:
    """Return a copy on the host."""
    return _array(tensor.detach().cpu())


def describe() -> dict[str, Any]:
    kind = runtime.device_type()
    name = f"cpu ({platform.machine()})" if on_cpu() else str(kind).lower()
    return {
        "device": name,
        "devices": runtime.global_runtime_device_count(),
        "framework": f"torch_xla {torch_xla.__version__}, torch {torch.__version__}",
    }
