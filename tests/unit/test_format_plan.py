"""Layouts and plans: who writes what, exact cover, balance, and errors that name the tensor."""

from __future__ import annotations

import itertools
import math
import random
import time
from typing import Any

import numpy as np
import pytest

from checkpoints_format import (
    Box,
    Explicit,
    FormatError,
    Planner,
    SaveLayout,
    SaveMesh,
    Sharded,
    Tensor,
    flat_range_boxes,
)
from checkpoints_format.boxes import prove_cover

MESH = SaveMesh(axes=(("replica", 2), ("fsdp", 4), ("tensor", 2)))


def _layout(tensors: list[Tensor], **over: Any) -> SaveLayout:
    return SaveLayout(**({"tensors": tuple(tensors), "meshes": (MESH,), "writers": 16} | over))


def _covered(layout: SaveLayout) -> None:
    """Every element of every tensor is written exactly once, counted by painting."""
    planner = Planner(layout)
    paint = [np.zeros(t.shape, np.uint8) for t in layout.tensors]
    for writer in range(layout.writers):
        for pack in planner.writer(writer).packs:
            for entry in pack.entries:
                grid = entry.run.grid
                for block in grid.blocks([(0, n) for n in grid.box.shape], entry.first, entry.stop, 1 << 40):
                    start = tuple(o + s for o, s in zip(grid.box.offset, block.start, strict=True))
                    paint[entry.run.tensor][(*Box(start, block.shape).slices(), ...)] += 1
    assert all((p == 1).all() for p in paint)


@pytest.mark.parametrize(
    "spec",
    [
        (("fsdp",), ("tensor",)),
        (("tensor", "fsdp"), ()),
        ((), ()),
        (("replica",), ("fsdp",)),
        ((), ("fsdp", "replica", "tensor")),
    ],
    ids=str,
)
@pytest.mark.parametrize("share_bytes", [1, 200, 1 << 20])
@pytest.mark.parametrize("writers", [16, 4, 1])
def test_each_element_is_written_once(spec: tuple, share_bytes: int, writers: int) -> None:
    tensors = [
        Tensor(name=f"t{i}", dtype="float32", shape=(16, 32), tile=(3, 5), placement=Sharded(spec=spec))
        for i in range(3)
    ]
    _covered(_layout(tensors, writers=writers, share_bytes=share_bytes, pack_bytes=500))


def test_replicas_share_evenly() -> None:
    """Sixteen replicas of 48 MiB: each writes its sixteenth, to within a tile a tensor."""
    tensors = [Tensor(name=f"t{i}", dtype="float32", shape=(4, 1024, 1024), batch=1) for i in range(3)]
    planner = Planner(_layout(tensors))
    loads = [planner.writer(w).nbytes for w in range(16)]
    assert sum(loads) == 3 * 16 * (1 << 20)
    assert max(loads) - min(loads) <= 3 * math.prod(planner.layout.tensors[0].tile or ()) * 4


def test_small_replicated_tensors_spread() -> None:
    planner = Planner(_layout([Tensor(name=f"t{i}", dtype="float32", shape=(100,)) for i in range(32)]))
    assert [len(planner.writer(w).entries) for w in range(16)] == [2] * 16


def test_list_of_writers_is_obeyed() -> None:
    order = tuple(random.Random(3).sample(range(16), 16))
    mesh = SaveMesh(axes=MESH.axes, writers=order)
    layout = _layout(
        [Tensor(name="w", dtype="int8", shape=(16, 32), placement=Sharded(spec=(("fsdp",), ("tensor",))))],
        meshes=(mesh,),
    )
    _covered(layout)
    for position, writer in enumerate(order):
        ((_, box),) = layout.boxes_of(writer)
        fsdp, tensor = position // 2 % 4, position % 2
        assert box == Box((fsdp * 4, tensor * 16), (4, 16))


def test_sources_name_all_writers_of_a_box() -> None:
    """The writers that a reader asks are those whose packs hold the tiles, for any wanted box."""
    draw = random.Random(0)
    tensor = Tensor(name="w", dtype="int8", shape=(16, 32), tile=(3, 5), placement=Sharded(spec=(("tensor",), ())))
    planner = Planner(_layout([tensor], share_bytes=16))
    for _ in range(100):
        offset = (draw.randrange(16), draw.randrange(32))
        want = Box(offset, (draw.randint(1, 16 - offset[0]), draw.randint(1, 32 - offset[1])))
        asked = {(box.offset, w) for box, writers in planner.sources(0, want) for w in writers}
        for writer in range(16):
            for (_, offset_of), entries in planner.writer(writer).entries.items():
                for _, entry in entries:
                    common = entry.run.box.intersect(want)
                    if common is None:
                        continue
                    crop = [(s.start, s.stop) for s in common.slices(offset_of)]
                    if any(True for _ in entry.run.grid.blocks(crop, entry.first, entry.stop, 1 << 40)):
                        assert (offset_of, writer) in asked


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 5), (1, 1, 6), (3, 1, 2), (2, 2, 2, 3)]
)
def test_flat_ranges(shape: tuple[int, ...]) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(numbers.size + 1), 2):
        boxes = list(flat_range_boxes(shape, start, stop))
        flat = [n for box in boxes for n in numbers[(*box.slices(), ...)].ravel()]
        assert flat == list(range(start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_cover_proof_on_flat_ranges_of_many_ranks() -> None:
    cuts = sorted({0, 4096 * 512, *np.random.default_rng(0).integers(0, 4096 * 512, 2000).tolist()})
    boxes = [box for a, b in itertools.pairwise(cuts) for box in flat_range_boxes((4096, 512), a, b)]
    began = time.perf_counter()
    prove_cover((4096, 512), boxes, "t")
    assert time.perf_counter() - began < 10
    with pytest.raises(FormatError, match="elements"):
        prove_cover((4096, 512), boxes[1:], "t")
    overlapping = [Box((0, 0), (4096, 256)), Box((0, 255), (4096, 256))]
    with pytest.raises(FormatError, match="overlap"):
        prove_cover((4096, 512), overlapping, "t")


def test_cover_proof_is_bounded() -> None:
    """Crossing combs would need a billion comparisons: refused in time, not endured."""
    n = 4000
    boxes = [Box((i, 0), (1, 1)) for i in range(n)] + [Box((0, 0), (n, 1))] * (n - 1)
    began = time.perf_counter()
    with pytest.raises(FormatError):
        prove_cover((n, n), boxes, "t")
    assert time.perf_counter() - began < 20


def test_growth() -> None:
    """A writer's plan of a large replicated layout costs its own share, not the world's."""
    tensors = [
        Tensor(
            name=f"t{i}",
            dtype="float32",
            shape=(126, 16384, 16384),
            axes=("layers", "embed", "mlp"),
            placement=Sharded(spec=((), ("fsdp",), ("tensor",))),
        )
        for i in range(30)
    ]
    times = []
    for world in (64, 16384):
        layout = SaveLayout(
            tensors=tuple(tensors), meshes=(SaveMesh(axes=(("fsdp", world // 8), ("tensor", 8))),), writers=world
        )
        planner = Planner(layout)
        began = time.perf_counter()
        planner.writer(world // 3)
        times.append(time.perf_counter() - began)
    assert times[1] < 5 * times[0] + 0.05


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "object"}, "'w'.*dtype among.*object"),
    "4 bits": ({"dtype": "int4"}, "'w'.*int4"),
    "name": ({"name": "../w"}, "name of parts"),
    "absolute name": ({"name": "/w"}, "name of parts"),
    "spec length": ({"placement": Sharded(spec=((),))}, "'w'.*spec of 2"),
    "unknown axis": ({"placement": Sharded(spec=(("expert",), ()))}, "'w'.*mesh axes among"),
    "axis twice": ({"placement": Sharded(spec=(("fsdp",), ("fsdp",)))}, "'w'.*at most once"),
    "does not divide": (
        {"shape": (18, 32), "axes": ("embed", "mlp"), "placement": Sharded(spec=(("fsdp",), ()))},
        "embed divisible by 4.*got 18.*nearest size that works is (16|20)",
    ),
    "no such mesh": ({"placement": Sharded(spec=((), ()), mesh=1)}, "'w'.*mesh from 0 to 0"),
    "negative size": ({"shape": (-1, 2)}, "'w'.*shape"),
    "too large": ({"shape": (1 << 40, 1 << 40)}, "'w'.*elements"),
    "tile": ({"tile": (0, 1)}, "'w'.*tile"),
    "hole": ({"placement": Explicit(boxes=((0, Box((0, 0), (16, 31))),))}, "'w'.*512 elements.*496"),
    "overlap": (
        {"placement": Explicit(boxes=((0, Box((0, 0), (16, 16))), (1, Box((0, 8), (16, 16)))))},
        "'w'.*overlap",
    ),
    "outside": ({"placement": Explicit(boxes=((0, Box((0, 1), (16, 32))),))}, "'w'.*inside"),
    "no such writer": ({"placement": Explicit(boxes=((16, Box((0, 0), (16, 32))),))}, "'w'.*writers from 0 to 15"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_layouts(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(FormatError, match=message):
        _layout([Tensor(**({"name": "w", "dtype": "float32", "shape": (16, 32)} | change))])


def test_bad_names_and_meshes() -> None:
    tensor = Tensor(name="w", dtype="int8", shape=())
    with pytest.raises(FormatError, match="each name once"):
        _layout([tensor, tensor])
    with pytest.raises(FormatError, match="multiple of 3 positions"):
        _layout([tensor], writers=3)
    with pytest.raises(FormatError, match="16 writers from 0 to 1"):
        _layout([tensor], writers=2, meshes=(SaveMesh(axes=MESH.axes, writers=(0, 1, 2)),))
    with pytest.raises(FormatError, match="nearest names are params/wq"):
        _layout([Tensor(name="params/wq", dtype="int8", shape=())]).tensor("params/qw")
