"""Write the golden checkpoints of the current format version: python -m checkpoints_format.vectors.make DIR

Each checkpoint is small, and together they touch every rule of SPEC.md. ``kinds`` has every dtype, scalars and empty
tensors, with one writer. ``mesh`` has replicas, shares, ragged tiles, irregular boxes, several packs and a list of
writers. Their bytes never change: a test compares them, and every later version must still read them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .. import Box, Explicit, LocalStore, SaveLayout, SaveMesh, Sharded, Tensor, Writer, commit, flat_range_boxes
from ..dtypes import NUMPY
from ..strided_copy import part_of


def values(tensor: Tensor) -> np.ndarray:
    """Return values that anyone can reproduce: byte i is (37 i + length of the name) mod 251, for bool mod 2."""
    count = math.prod(tensor.shape) * tensor.item_bytes
    data = ((np.arange(count, dtype=np.int64) * 37 + len(tensor.name)) % 251).astype(np.uint8)
    if tensor.dtype == "bool":
        data %= 2
    return data.view(NUMPY[tensor.dtype]).reshape(tensor.shape)


def kinds() -> SaveLayout:
    """Return a layout with one writer, one tensor of every dtype, scalars and empty tensors."""
    tensors = [Tensor(name=f"params/{dtype}", dtype=dtype, shape=(3, 5), axes=("embed", "mlp")) for dtype in NUMPY]
    tensors += [
        Tensor(name="opt/count", dtype="int32", shape=(), role="opt"),
        Tensor(name="state/flag", dtype="bool", shape=(), role="state"),
        Tensor(name="state/none", dtype="bfloat16", shape=(4, 0, 2), role="state"),
        Tensor(name="params/norm", dtype="float32", shape=(2, 300), axes=("layers", "embed")),
    ]
    return SaveLayout(tensors=tuple(tensors))


def mesh() -> SaveLayout:
    """Return a layout of four writers on a 2 x 2 x 2 mesh, with small packs and shares, so that every rule applies."""
    meshes = (
        SaveMesh(axes=(("replica", 2), ("fsdp", 2), ("tensor", 2))),
        SaveMesh(axes=(("data", 3), ("fsdp", 2)), writers=(3, 1, 0, 2, 2, 0)),
    )
    ranges = [(0, 0, 50), (2, 50, 51), (1, 51, 130), (0, 130, 240)]
    flat = tuple((w, box) for w, start, stop in ranges for box in flat_range_boxes((4, 5, 12), start, stop))
    square = (("fsdp",), ("tensor",))
    tensors = (
        Tensor(name="params/wide", dtype="bfloat16", shape=(24, 40), tile=(5, 16), placement=Sharded(spec=square)),
        Tensor(
            name="params/deep",
            dtype="float32",
            shape=(2, 8, 12),
            axes=("layers", "embed", "mlp"),
            tile=(1, 4, 5),
            placement=Sharded(spec=((), ("tensor", "fsdp"), ())),
        ),
        Tensor(name="params/all", dtype="float16", shape=(70,), tile=(16,)),
        Tensor(
            name="opt/m/flat",
            dtype="float32",
            shape=(4, 5, 12),
            role="opt",
            tile=(2, 5, 7),
            placement=Explicit(boxes=flat),
        ),
        Tensor(
            name="opt/m/other",
            dtype="float64",
            shape=(6, 3),
            role="opt",
            tile=(2, 3),
            placement=Sharded(mesh=1, spec=(("fsdp",), ("data",))),
        ),
        Tensor(name="opt/count", dtype="int64", shape=(), role="opt", placement=Sharded(mesh=1, spec=())),
    )
    return SaveLayout(tensors=tensors, meshes=meshes, writers=4, pack_bytes=1200, share_bytes=256)


VECTORS = {"v1-kinds": kinds, "v1-mesh": mesh}


def make(folder: Path) -> None:
    """Write every vector below ``folder``, and ``expected.json``: SHA-256 of each tensor's bytes."""
    expected = {}
    for name, layout_of in VECTORS.items():
        layout = layout_of()
        arrays = {tensor.name: values(tensor) for tensor in layout.tensors}
        with LocalStore(folder / name, create=True) as store:
            for writer in range(layout.writers):
                sources = {key: _part_of(array) for key, array in arrays.items()}
                Writer(store, layout, save="golden-1", writer=writer).write(sources)
            commit(store, layout, save="golden-1", meta={"step": 12, "loss": 2.5, "rng": {"seed": 7}})
        expected[name] = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in arrays.items()}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def _part_of(array: np.ndarray) -> Callable[[Box], np.ndarray]:
    def part(box: Box) -> np.ndarray:
        return part_of(array, box.slices())

    return part


if __name__ == "__main__":
    make(Path(sys.argv[1]))
