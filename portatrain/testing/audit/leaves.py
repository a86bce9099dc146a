"""What this process holds of a torch tensor, a jax array or a NumPy array, as NumPy boxes of the logical tensor.

No framework is imported: an object of a framework can only exist if its user has imported it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.errors import UserError


@dataclass(frozen=True)
class Held:
    """A box of a logical tensor that this process holds."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Leaf:
    """A logical tensor: its whole shape in elements, its dtype by name, and the boxes that are here."""

    shape: tuple[int, ...]
    dtype: str
    boxes: list[Held]


def loaded(name: str) -> Any:
    """Return the module `name` if this process has imported it, else None."""
    return sys.modules.get(name)


def is_torch(value: Any) -> bool:
    torch = loaded("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_jax(value: Any) -> bool:
    jax = loaded("jax")
    return jax is not None and isinstance(value, jax.Array)


def is_array(value: Any) -> bool:
    """Return whether a value is an array of any framework, or a NumPy scalar."""
    return is_torch(value) or is_jax(value) or isinstance(value, (np.ndarray, np.generic))


def leaf_of(value: Any) -> Leaf:
    """Return what this process holds of an array; raises UserError for anything else."""
    if is_torch(value):
        return _torch_leaf(value)
    if is_jax(value):
        return _jax_leaf(value)
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        return Leaf(array.shape, array.dtype.name, [_whole(array.shape, lambda: _plain(array))])
    raise UserError(
        "an array for the audit",
        expected="a torch tensor, a jax array or a NumPy array",
        got=type(value).__name__,
        do="Pass arrays, or a mapping or a tree of them.",
    )


def _whole(shape: tuple[int, ...], fetch: Callable[[], np.ndarray]) -> Held:
    return Held((0,) * len(shape), tuple(shape), fetch)


def _plain(array: np.ndarray) -> np.ndarray:
    """Return an array whose elements are real numbers of a dtype that NumPy knows."""
    if np.iscomplexobj(array):
        return np.stack([array.real, array.imag], axis=-1).reshape(*array.shape[:-1], -1) if array.ndim else array.real
    return array.astype(np.float64) if array.dtype.kind not in "fiub" else array


def _torch_leaf(tensor: Any) -> Leaf:
    tensor = tensor.detach()
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if hasattr(tensor, "placements") and hasattr(tensor, "device_mesh"):
        return Leaf(shape, dtype, _dtensor_boxes(tensor, shape))
    return Leaf(shape, dtype, [_whole(shape, lambda: torch_numpy(tensor))])


def torch_numpy(tensor: Any) -> np.ndarray:
    """Return a torch tensor's elements on the host; dtypes that NumPy lacks as float32, which holds them exactly."""
    torch = loaded("torch")
    here = tensor.detach().to(
        "cpu", copy=True
    )  # an array that shares a storage would forbid to resize it, as FSDP does
    if here.is_complex():
        here = torch.view_as_real(here).reshape(*here.shape[:-1], -1)
    if here.is_floating_point() and here.dtype not in (torch.float16, torch.float32, torch.float64):
        here = here.float()
    return here.resolve_conj().numpy() if hasattr(here, "resolve_conj") else here.numpy()


def _dtensor_boxes(tensor: Any, shape: tuple[int, ...]) -> list[Held]:
    """Return the box of a DTensor here; a placement that is more than rows of an axis is gathered whole first."""
    utils = loaded("torch.distributed.tensor._utils")
    plain = all(p.is_replicate() or type(p).__name__ == "Shard" for p in tensor.placements)
    if utils is None or not plain:
        full = tensor.full_tensor()
        return [_whole(shape, lambda: torch_numpy(full))]
    local = tensor.to_local()
    _, offset = utils.compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    return [Held(tuple(offset), tuple(local.shape), lambda: torch_numpy(local))]


def _jax_leaf(array: Any) -> Leaf:
    jax = loaded("jax")
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    shape, dtype = tuple(array.shape), np.dtype(array.dtype).name
    boxes = []
    for shard in array.addressable_shards:
        offset = tuple(part.indices(size)[0] for part, size in zip(shard.index, shape, strict=True))
        boxes.append(Held(offset, tuple(shard.data.shape), functools.partial(_fetched, shard.data)))
    return Leaf(shape, dtype, boxes)


def _fetched(data: Any) -> np.ndarray:
    return _plain(np.asarray(data))


# ---- trees


def flat(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, leaf) of nested mappings and sequences, and of every pytree if jax has been imported."""
    jax = loaded("jax")
    if jax is not None and not is_array(tree):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            yield tuple(_key(part) for part in path), leaf
        return
    yield from _walk((), tree)


def _walk(path: tuple[str, ...], tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if tree is None:
        return
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _walk((*path, str(key)), value)
    elif isinstance(tree, (list, tuple)):
        names = getattr(tree, "_fields", range(len(tree)))
        for key, value in zip(names, tree, strict=True):
            yield from _walk((*path, str(key)), value)
    else:
        yield path, tree


def _key(part: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)
