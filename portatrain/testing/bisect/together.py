"""Put together what the processes of a mesh recorded of a microbatch: each has the rows of its part of the batch.

How an array lies is seen beside the oracle's, which is whole: if the sizes are equal it is whole in every process, else
the rows lie one after another. Gradients of what is whole are sums over the rows, so they are added up; those of
parameters are sums already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from portatrain.backends.watched import Call, Watched
from portatrain.model.layout import BATCH_MESH_AXES, Mesh
from portatrain.testing.bisect.operations import difference

Parts = Sequence[Any]
LOSSES = ("cross_entropy", "loss")
"""Operations whose first result is a sum over the rows."""


def together(mesh: Mesh, found: Sequence[Watched], oracle: Sequence[Call]) -> Watched:
    """Return a microbatch as one process would have recorded it. found: of each process, by rank; oracle: the calls of
    the whole microbatch."""
    blocks = mesh.over(BATCH_MESH_AXES)
    first = {mesh.index(BATCH_MESH_AXES, mesh.coordinates(r)): r for r in reversed(range(len(found)))}
    rows = [first[block] for block in range(blocks)]
    calls = []
    for k in range(len(found[0].calls)):
        each = [one.calls[k] for one in found if k < len(one.calls)]
        true = oracle[k] if k < len(oracle) else None
        same = true is not None and all(call.name == true.name for call in each) and len(each) == len(found)
        calls.append(_call(each, rows, true) if same and true is not None else each[0])
    return Watched(
        calls=calls,
        loss=sum(found[r].loss for r in rows),
        weight=sum(found[r].weight for r in rows),
        grads=found[0].grads,
    )


def _call(each: Sequence[Call], rows: Sequence[int], true: Call) -> Call:
    one = each[0]
    grown = all(_is_grown(call.template, true.template, len(rows)) for call in each)
    made = Call(
        name=one.name,
        path=one.path,
        place=one.place,
        layer=one.layer,
        template=true.template if grown else one.template,
    )
    for j, whole in enumerate(true.args):
        own = true.tags[j] is not None
        arrays = [_unrounded(c.args[j], whole) if own else c.args[j] for c in each]
        made.args.append(_array(arrays, rows, whole))
        made.arg_grads.append(_gradient([c.arg_grads[j] for c in each], rows, whole, added=not own))
    for r, whole in enumerate(true.results):
        arrays = [c.results[r] for c in each]
        grads = [c.result_grads[r] for c in each]
        total = one.name in LOSSES and r == 0
        made.results.append(np.sum([arrays[i] for i in rows], axis=0) if total else _array(arrays, rows, whole))
        made.result_grads.append(_gradient(grads, rows, whole, added=not total))
    return made


def _array(arrays: Sequence[np.ndarray], rows: Sequence[int], whole: np.ndarray) -> np.ndarray:
    axis = _cut([arrays[i].shape for i in rows], whole.shape)
    if axis is not None:
        return np.concatenate([arrays[i] for i in rows], axis)
    if any(a.shape != whole.shape for a in arrays):
        return arrays[0]
    # Of copies that should be equal, the one that is farthest off.
    return max(arrays, key=lambda a: float(difference(a, whole).max(initial=0.0)))


def _gradient(grads: Parts, rows: Sequence[int], whole: np.ndarray, *, added: bool) -> Any:
    there = [grads[i] for i in rows if grads[i] is not None]
    if not there:
        return None
    given = [np.zeros_like(there[0]) if grads[i] is None else grads[i] for i in rows]
    axis = _cut([g.shape for g in given], whole.shape)
    if axis is not None:
        return np.concatenate(given, axis)
    return np.sum(given, axis=0) if added else given[0]


def _cut(shapes: Sequence[tuple[int, ...]], whole: tuple[int, ...]) -> int | None:
    """Return the axis along which arrays of these shapes are parts of one of shape `whole`; None if they are none."""
    if any(len(s) != len(whole) for s in shapes) or len(shapes) < 2:
        return None
    other = [at for at, n in enumerate(whole) if any(s[at] != n for s in shapes)]
    fits = len(other) == 1 and sum(s[other[0]] for s in shapes) == whole[other[0]]
    return other[0] if fits else None


def _is_grown(mine: Any, whole: Any, blocks: int) -> bool:
    """Return whether arguments differ from those of the whole batch by nothing but numbers of rows."""
    if isinstance(mine, Mapping) and isinstance(whole, Mapping):
        return mine.keys() == whole.keys() and all(_is_grown(mine[k], whole[k], blocks) for k in mine)
    if isinstance(mine, tuple) and isinstance(whole, tuple):
        return len(mine) == len(whole) and all(_is_grown(a, b, blocks) for a, b in zip(mine, whole, strict=True))
    return bool(mine == whole) or (type(mine) is int and type(whole) is int and mine * blocks == whole)


def _unrounded(array: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return a parameter as it was before FSDP2 rounded it to the dtype of the computation; any other as it is."""
    if array.shape != whole.shape or whole.dtype.kind != "f":
        return array
    rounded = whole.astype(ml_dtypes.bfloat16).astype(array.dtype)
    return whole.astype(array.dtype) if np.array_equal(array, rounded) else array
