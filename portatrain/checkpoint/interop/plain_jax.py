"""Save and restore a plain flax/optax train state, or any tree of arrays: parameters, slots shaped like them, a
count."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from checkpoints_format import Box
from portatrain.backends.state import COUNT
from portatrain.checkpoint.interop.plain_shared import About, Part, check_shapes, count_of, open_newest, read, write
from portatrain.checkpoint.interop.plain_table import OPTAX_SLOTS, Table
from portatrain.errors import UserError


def save(
    where: Path | str,
    step: int,
    params: Any,
    opt_state: Any,
    table: Table,
    *,
    name: str = "a1",
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Save `params` and the `opt_state` of an optax optimizer (or None) as the checkpoint `step` of `where`.

    All processes call it together. Raises UserError for a leaf that the table does not name.
    """
    tensors: dict[str, About] = {}
    mine: dict[str, list[Part]] = {}
    every: list[dict[str, list[Box]]] = [{} for _ in range(jax.process_count())]
    for full, axes, leaf in _leaves(params, opt_state, table):
        if full == COUNT:
            leaf = np.asarray(leaf, np.int32)
        array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        tensors[full] = About(full, array.dtype.name, tuple(array.shape), axes)
        if not isinstance(array, jax.Array):
            every[0].setdefault(full, [Box.whole(array.shape)])
            if jax.process_index() == 0:
                mine.setdefault(full, [Part(Box.whole(array.shape), functools.partial(np.array, array))])
            continue
        places: Any = array.sharding.devices_indices_map(array.shape)
        for device, index in places.items():
            every[device.process_index].setdefault(full, []).append(_box(index, array.shape))
        for shard in array.addressable_shards:
            parts = mine.setdefault(full, [])
            box = _box(shard.index, array.shape)
            if all(p.box != box for p in parts):
                parts.append(Part(box, functools.partial(np.array, shard.data)))

    def barrier() -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("portatrain-save")

    write(where, step, tensors, mine, every, process=jax.process_index(), barrier=barrier, save=name, meta=meta)


def restore(
    where: Path | str, params: Any, opt_state: Any, table: Table, *, step: int | None = None
) -> tuple[int, Any, Any]:
    """Return (step, params, opt_state) from the checkpoint `step` of `where` (by default the newest).

    `params` and `opt_state` are those of a fresh state, or trees of jax.ShapeDtypeStruct with shardings. The results
    have their structure, dtypes and shardings. Raises UserError if names or shapes differ.
    """
    found, reader = open_newest(where, step)
    leaves = list(_leaves(params, opt_state, table))
    check_shapes(
        reader,
        {full: About(full, np.dtype(a.dtype).name, tuple(a.shape), axes) for full, axes, a in leaves if full != COUNT},
    )

    def filled(full: str, leaf: Any) -> Any:
        if full == COUNT:
            value = np.asarray(count_of(reader), leaf.dtype)
            return jax.device_put(value, leaf.sharding) if getattr(leaf, "sharding", None) is not None else value
        shape = tuple(leaf.shape)
        if getattr(leaf, "sharding", None) is None:
            return jax.numpy.asarray(read(reader, full, Box.whole(shape)))
        made = jax.make_array_from_callback(shape, leaf.sharding, lambda at: read(reader, full, _box(at, shape)))
        return made.copy()  # on a CPU it may share NumPy's memory, and JAX cannot donate a shared buffer

    structure = jax.tree_util.tree_structure((params, opt_state))
    return (found, *jax.tree_util.tree_unflatten(structure, [filled(full, leaf) for full, _, leaf in leaves]))


def _leaves(params: Any, opt_state: Any, table: Table) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield (full name, axes, leaf) of everything that is saved, in the order of the trees."""
    for path, leaf in jax.tree_util.tree_flatten_with_path((params, opt_state))[0]:
        yield (*_place(path, table), leaf)


def _place(path: Any, table: Table) -> tuple[str, tuple[str, ...]]:
    """Return (full name, axes) of a leaf. Every count is the number of steps, which optax keeps in several leaves."""
    parts = [_part(key) for key in path]
    if parts[0] == "0":
        entry = table.by_jax("/".join(parts[1:]))
        return f"params/{entry.name}", entry.axes
    for at, part in enumerate(parts):
        if part in OPTAX_SLOTS and at + 1 < len(parts):
            entry = table.by_jax("/".join(parts[at + 1 :]))
            return f"opt/{OPTAX_SLOTS[part]}/{entry.name}", entry.axes
    if parts[-1] == "count":
        return COUNT, ()
    raise UserError(
        f"optimizer state {'/'.join(parts[1:])}",
        expected=f"trees named {', '.join(OPTAX_SLOTS)}, or a count",
        got=parts[-1],
        do="Add its name to portatrain.checkpoint.interop.plain_table.OPTAX_SLOTS.",
    )


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _box(index: Any, shape: tuple[int, ...]) -> Box:
    bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
    return Box(tuple(b[0] for b in bounds), tuple(b[1] - b[0] for b in bounds))
