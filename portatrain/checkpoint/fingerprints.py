"""Compute exact fingerprints of a run's tensors, which do not depend on mesh, process or framework.

The fingerprint of a tensor is the sum, modulo 2^64, of the bits of its elements as whole numbers, each times a hash of
the element's logical index. The hash of an index (i, j, ...) is h(0, i) x h(1, j) x ..., where h(d, i) is output number
i + (d + 1) 2^48 of splitmix64 from seed 0, counted from 0, with its lowest bit set. So a box of a tensor has a sum of
its own, the sums of boxes add up, and one changed bit always changes the sum, because an odd number has an inverse
modulo 2^64.

A save sums what its writers write (`Sums`), while it writes. On arrival every process sums what its devices hold
(`compare`). Elements of 8 bytes or more count as words of 4 bytes, along one more axis.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints_format import Box, Explicit, SaveLayout, Sharded, Tensor
from checkpoints_format.rule import ShardRule
from portatrain.backends.base import Backend
from portatrain.backends.state import full_name
from portatrain.checkpoint.format_layout import format_layout
from portatrain.checkpoint.shared_reads import owners_of

FIELD, ALGORITHM = "fingerprints", "splitmix64-product-1"
"""The field of a checkpoint's meta, and the name of this sum in it."""

CHUNK, MERGED, KEPT = 1 << 17, 1 << 12, 1 << 16
"""The number of elements that are summed at once, of weights that trailing axes share, and of weights kept for reuse.
"""

Read = Callable[[Box], np.ndarray]


# ---- the sum of a box


def box_sum(array: np.ndarray, offset: Sequence[int] = ()) -> int:
    """Return the sum over a box of a tensor that begins at `offset`, modulo 2^64."""
    if not array.ndim:
        array, offset = array.reshape(1), (0,)
    return _sum(array, tuple(offset), 0) % 2**64


def _sum(array: np.ndarray, offset: tuple[int, ...], dim: int) -> int:
    """Return the sum over a box of which the first axis is axis `dim` of the tensor, over `CHUNK` elements at once."""
    inner, total = math.prod(array.shape[1:]), 0
    if inner > CHUNK:
        for i in range(array.shape[0]):
            total += int(_weights(dim, offset[0] + i, 1)[0]) * _sum(array[i], offset[1:], dim + 1)
        return total
    rows = max(1, CHUNK // max(1, inner))
    for at in range(0, array.shape[0], rows):
        total += _chunk_sum(array[at : at + rows], (offset[0] + at, *offset[1:]), dim)
    return total


def _chunk_sum(array: np.ndarray, offset: tuple[int, ...], dim: int) -> int:
    if not array.size:
        return 0
    words = np.ascontiguousarray(array)
    if words.dtype.itemsize > 4:
        words, offset = words.view(np.uint32).reshape(*words.shape, -1), (*offset, 0)
    shape, sums = words.shape, words.view(f"u{min(4, words.dtype.itemsize)}").astype(np.uint64).reshape(-1)
    last = len(shape)
    while last:
        first = last - 1
        while first and math.prod(shape[first - 1 : last]) <= MERGED:
            first -= 1
        factors = [_weights(dim + d, offset[d], shape[d]) for d in range(first, last)]
        weights = functools.reduce(lambda a, b: np.multiply.outer(a, b).reshape(-1), factors)
        sums = np.einsum("rc,c->r", sums.reshape(-1, weights.size), weights)
        last = first
    return int(sums[0])


def _weights(dim: int, start: int, count: int) -> np.ndarray:
    """Return h(dim, start) to h(dim, start + count - 1)."""
    return _kept_weights(dim, start, count) if count <= KEPT else _made_weights(dim, start, count)


def _made_weights(dim: int, start: int, count: int) -> np.ndarray:
    x = np.arange(start, start + count, dtype=np.uint64) + np.uint64((dim + 1) << 48)
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


_kept_weights = functools.lru_cache(maxsize=64)(_made_weights)


# ---- a save


class Sums:
    """The sums of what one process writes. Each element is asked for once, so each counts once among replicas."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}
        self._lock = threading.Lock()

    def counting(self, sources: Mapping[str, Read]) -> dict[str, Read]:
        """Return sources for a `Writer` that give the same values, and add each box to its tensor's sum."""

        def source(name: str, values: Read) -> Read:
            def read(box: Box) -> np.ndarray:
                array = values(box)
                part = box_sum(array, box.offset)
                with self._lock:
                    self._found[name] = (self._found.get(name, 0) + part) % 2**64
                return array

            return read

        return {name: source(name, values) for name, values in sources.items()}

    def note(self) -> dict[str, Any]:
        """Return the sums as JSON for this writer's receipt."""
        return {FIELD: {name: _text(value) for name, value in self._found.items()}}


def joined(layout: SaveLayout, notes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fingerprints of all tensors, as JSON for the meta, from the notes of all writers."""
    found = {t.name: 0 for t in layout.tensors}
    for note in notes:
        for name, text in note.get(FIELD, {}).items():
            found[name] += int(text, 16)
    return {"algorithm": ALGORITHM, "tensors": {name: _text(value) for name, value in found.items()}}


def saved_in(meta: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the fingerprints in a checkpoint's meta, by tensor; None if it has none that this version knows."""
    found = meta.get(FIELD)
    if not isinstance(found, Mapping) or found.get("algorithm") != ALGORITHM:
        return None
    tensors = found.get("tensors")
    return {str(k): str(v) for k, v in tensors.items()} if isinstance(tensors, Mapping) else {}


def unknown_algorithm(meta: Mapping[str, Any]) -> str | None:
    """Return the algorithm of a checkpoint's fingerprints if this version does not know it, else None."""
    found = meta.get(FIELD)
    name = found.get("algorithm") if isinstance(found, Mapping) else None
    return None if found is None or name == ALGORITHM else str(name)


def changed(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the tensors of which the fingerprints differ, or of which one side has none."""
    return [*(n for n in now if saved.get(n) != now[n]), *(n for n in saved if n not in now)]


def _text(value: int) -> str:
    return f"{value % 2**64:016x}"


# ---- a state on devices


@dataclass
class _Part:
    """A box of a tensor that one process answers for, and what this process holds of it."""

    tensor: int
    box: Box
    owner: int
    held: int = 0
    total: int = 0


def compare(backend: Backend, state: Any, saved: Mapping[str, str]) -> list[str]:
    """Return the names of the tensors of which a bit differs from `saved`, on any device; the same on all processes.

    All processes call it together. It compares the sum of the parts with the fingerprint, and each further copy of a
    part with the copy that was summed. A backend may hold copies of another form (`unequal_copies`).
    """
    layout = format_layout(backend.program, backend.irregular_shards(state), backend.processes, owners_of(backend))
    numbers = {t.name: i for i, t in enumerate(layout.tensors)}
    parts = _Parts(layout)
    unequal = np.zeros(len(numbers), np.uint64)
    copies: dict[tuple[int, Box], list[Callable[[], np.ndarray]]] = {}
    for held in backend.local_boxes(state):
        at = numbers[full_name(held.role, held.name)], Box(held.offset, held.shape)
        copies.setdefault(at, []).append(held.fetch)

    def sums(item: tuple[tuple[int, Box], list[Callable[[], np.ndarray]]]) -> tuple[bool, list[tuple[int, Box, int]]]:
        """Return if all copies of a box on this process's devices are equal, and the sums of the parts in it."""
        (tensor, box), fetches = item
        array = fetches[0]()
        cut = list(parts.meeting(tensor, box))
        found = [(n, p, box_sum(array[p.slices(box.offset)] if box.shape else array, p.offset)) for n, p in cut]
        first = array.tobytes() if len(fetches) > 1 else b""
        return all(fetch().tobytes() == first for fetch in fetches[1:]), found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="fingerprint") as pool:
        for (tensor, _), (equal, found) in zip(copies, pool.map(sums, copies.items()), strict=True):
            unequal[tensor] += np.uint64(not equal)
            for number, box, value in found:
                parts.all[number].held += box.size
                parts.all[number].total += value
    for role, name in getattr(backend, "unequal_copies", lambda state: ())(state):
        unequal[numbers[full_name(role, name)]] += np.uint64(1)
    mine = [p.total % 2**64 if p.owner == backend.process else 0 for p in parts.all]
    totals = added_up(backend, np.array(mine, np.uint64))
    now = dict.fromkeys(numbers, 0)
    for part, total in zip(parts.all, totals.tolist(), strict=True):
        now[layout.tensors[part.tensor].name] += total
        if part.held == part.box.size and part.total % 2**64 != total:
            unequal[part.tensor] += np.uint64(1)
    bad = added_up(backend, unequal)
    differ = set(changed(saved, {name: _text(total) for name, total in now.items()}))
    known = [name for i, name in enumerate(numbers) if name in differ or bad[i]]
    return known + sorted(differ - numbers.keys())


class _Parts:
    """The boxes that together make up every tensor of a layout, each once: the placement's boxes without replicas."""

    def __init__(self, layout: SaveLayout) -> None:
        self.all: list[_Part] = []
        self._rules: dict[int, ShardRule] = {}
        self._listed: dict[tuple[int, Box], int] = {}
        self._first: list[int] = []
        for number, tensor in enumerate(layout.tensors):
            self._first.append(len(self.all))
            self.all += [_Part(number, box, owner) for box, owner in self._of(number, tensor, layout)]
        self._first.append(len(self.all))

    def _of(self, number: int, tensor: Tensor, layout: SaveLayout) -> list[tuple[Box, int]]:
        if tensor.nbytes == 0:
            return []
        if isinstance(tensor.placement, Explicit):
            boxes = tensor.placement.boxes
            self._listed |= {(number, box): len(self.all) + i for i, (_, box) in enumerate(boxes)}
            return [(box, writer) for writer, box in boxes]
        assert isinstance(tensor.placement, Sharded)
        mesh = layout.meshes[tensor.placement.mesh]
        rule = self._rules[number] = ShardRule(tensor.shape, tensor.placement.spec, mesh)
        found = []
        for part in np.ndindex(*rule.parts):
            position = rule.position_of(part, number % rule.replicas)
            found.append((rule.box(part), mesh.writer_of(position, layout.writers)))
        return found

    def meeting(self, tensor: int, box: Box) -> Iterable[tuple[int, Box]]:
        """Yield (number in `all`, common elements) of the parts of a tensor that have elements in common with `box`."""
        if not box.size:
            return
        rule, first = self._rules.get(tensor), self._first[tensor]
        if (tensor, box) in self._listed:
            numbers: Iterable[int] = (self._listed[tensor, box],)
        elif rule is None:
            numbers = range(first, self._first[tensor + 1])
        else:
            met = rule.parts_meeting(box)
            numbers = (first + int(np.ravel_multi_index(p, rule.parts)) if p else first for p in met)
        for number in numbers:
            if (common := self.all[number].box.intersect(box)) is not None:
                yield number, common


def can_compare(backend: Backend) -> bool:
    """Return whether the processes of this backend can add up their sums."""
    return backend.processes == 1 or hasattr(backend, "add_up")


def added_up(backend: Backend, words: np.ndarray) -> np.ndarray:
    """Return the sums of `words` over all processes, modulo 2^64."""
    add_up: Any = getattr(backend, "add_up", None)
    return words if backend.processes == 1 else add_up(words)
