"""Save and restore a plain torch module and its torch.optim optimizer, with whole parameters or FSDP2's DTensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from checkpoints_format import Box
from portatrain.backends.state import COUNT
from portatrain.checkpoint.interop.plain_shared import About, Part, check_shapes, count_of, open_newest, read, write
from portatrain.checkpoint.interop.plain_table import TORCH_SLOTS, Entry, Table
from portatrain.errors import UserError


def save(
    where: Path | str,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    table: Table,
    *,
    name: str = "a1",
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Save the module's parameters and the optimizer's state as the checkpoint `step` of `where`, a folder or a URL.

    All processes of the group call it together. `name`: a name that no other attempt at this checkpoint uses. `meta`:
    any JSON object. Raises UserError for a parameter that the table does not name, and if the store refuses a write.
    """
    tensors, mine = _collect(module, optimizer, table)
    boxes = {n: [p.box for p in parts] for n, parts in mine.items()}
    every: list[Any] = [boxes]
    process, barrier = 0, _nothing
    if dist.is_initialized() and dist.get_world_size() > 1:
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, boxes)
        process, barrier = dist.get_rank(), dist.barrier
    write(where, step, tensors, mine, every, process=process, barrier=barrier, save=name, meta=meta)


def restore(
    where: Path | str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    table: Table,
    *,
    step: int | None = None,
) -> int:
    """Fill the module and the optimizer, in place, from the checkpoint `step` of `where` (by default the newest).

    Returns the step. The optimizer may be a fresh one. Raises UserError, with nothing changed, if names or shapes
    differ.
    """
    if optimizer is not None:
        _make_state(optimizer)
    tensors, _ = _collect(module, optimizer, table)
    found, reader = open_newest(where, step)
    check_shapes(reader, tensors)
    count = count_of(reader)
    with torch.no_grad():
        for full, entry, index, tensor in _tensors(module, optimizer, table):
            local, box = _box(entry, index, tensor)
            array = _theirs(entry, index, read(reader, full, box))
            local.copy_(torch.from_numpy(np.array(array)).view_as(local))
        if optimizer is not None:
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"] = (
                        torch.full_like(state["step"], count) if isinstance(state["step"], Tensor) else count
                    )
    return found


def _nothing() -> None:
    """Do nothing: one process has no others to wait for."""


def _tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, table: Table
) -> Iterator[tuple[str, Entry, int | None, Tensor]]:
    """Yield (full name, entry, index, tensor) of every parameter and of its slots."""
    for name, parameter in module.named_parameters():
        entry, index = table.by_torch(name)
        yield f"params/{entry.name}", entry, index, parameter.detach()
        if optimizer is None:
            continue
        for key, value in optimizer.state.get(parameter, {}).items():
            if key == "step" or value is None:
                continue
            if key not in TORCH_SLOTS:
                raise UserError(
                    f"optimizer state {key!r} of {name}",
                    expected=f"one of {', '.join(TORCH_SLOTS)}",
                    got=repr(key),
                    do="Add its name to portatrain.checkpoint.interop.plain_table.TORCH_SLOTS.",
                )
            yield f"opt/{TORCH_SLOTS[key]}/{entry.name}", entry, index, value


def _collect(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, table: Table
) -> tuple[dict[str, About], dict[str, list[Part]]]:
    tensors: dict[str, About] = {}
    parts: dict[str, list[Part]] = {}
    for full, entry, index, tensor in _tensors(module, optimizer, table):
        shape = _ours(entry, index, tuple(tensor.shape))
        if index is not None:
            known = tensors[full].shape[0] if full in tensors else 0
            shape = (max(known, index + 1), *shape[1:])
        tensors[full] = About(full, str(tensor.dtype).removeprefix("torch."), shape, entry.axes)
        local, box = _box(entry, index, tensor)
        if local.numel():
            parts.setdefault(full, []).append(Part(box, functools.partial(_array, entry, index, local)))
    counts = {int(s["step"]) for s in (optimizer.state.values() if optimizer else ()) if "step" in s}
    if len(counts) > 1:
        raise UserError(
            "optimizer",
            expected="one count of steps for all parameters",
            got=str(sorted(counts)),
            do="Save parameters that began at different steps in separate checkpoints.",
        )
    if counts:
        tensors[COUNT] = About(COUNT, "int32", (), ())
        count = counts.pop()
        parts[COUNT] = [Part(Box((), ()), lambda: np.asarray(count, np.int32))]
    return tensors, parts


def _box(entry: Entry, index: int | None, tensor: Tensor) -> tuple[Tensor, Box]:
    """Return (this process's part, its box in the logical tensor)."""
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
    else:
        shape, offset, local = tuple(tensor.shape), (0,) * tensor.ndim, tensor
    return local, Box(_ours(entry, index, tuple(offset), at=True), _ours(entry, index, tuple(shape)))


def _ours(entry: Entry, index: int | None, dims: tuple[int, ...], *, at: bool = False) -> tuple[int, ...]:
    """Return sizes, or with `at` offsets, of torch's dimensions in the order of the logical tensor."""
    if entry.transposed:
        dims = (*dims[:-2], dims[-1], dims[-2])
    return dims if index is None else (index if at else 1, *dims)


def _array(entry: Entry, index: int | None, local: Tensor) -> np.ndarray:
    from portatrain.checkpoint.interop.trees import _as_numpy

    array = _as_numpy(local.detach().cpu().contiguous())
    if entry.transposed:
        array = np.swapaxes(array, -1, -2)
    array = np.array(array, order="C")
    return array if index is None else array[None]


def _theirs(entry: Entry, index: int | None, array: np.ndarray) -> np.ndarray:
    array = array if index is None else array[0]
    return np.swapaxes(array, -1, -2) if entry.transposed else array


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of a fresh optimizer by a step with zero gradients and zero rate, which changes no parameter."""
    if optimizer.state:
        return
    groups = optimizer.param_groups
    kept = [(g["lr"], g.get("weight_decay")) for g in groups]
    for group in groups:
        group["lr"] = 0.0 if not isinstance(group["lr"], Tensor) else torch.zeros_like(group["lr"])
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, (lr, decay) in zip(groups, kept, strict=True):
        group["lr"] = lr
        if decay is not None:
            group["weight_decay"] = decay
