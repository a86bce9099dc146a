"""Saved by any number of processes on any mesh, read back as any box: the same bits."""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints_format import (
    Box,
    Explicit,
    FormatError,
    LocalStore,
    Reader,
    SaveLayout,
    SaveMesh,
    Sharded,
    Tensor,
    Want,
    Writer,
    commit,
    flat_range_boxes,
)
from checkpoints_format.dtypes import NUMPY

Arrays = dict[str, np.ndarray]


def _part_of(array: np.ndarray) -> Callable[[Box], np.ndarray]:
    return lambda box: array[(*box.slices(), ...)]


def _draw(seed: int) -> tuple[SaveLayout, Arrays, random.Random]:
    """A random layout, its values, and the generator that drew them."""
    draw = random.Random(seed)
    sizes = {"replica": draw.choice((1, 2, 3)), "fsdp": draw.choice((1, 2, 4)), "tensor": draw.choice((1, 2))}
    positions = math.prod(sizes.values())
    writers = draw.choice([w for w in range(1, positions + 1) if positions % w == 0])
    owners = tuple(draw.randrange(writers) for _ in range(positions)) if seed % 3 == 0 else None
    tensors, arrays = [], {}
    for i in range(draw.randint(1, 6)):
        shape = tuple(
            draw.choice((4, 8, 12, 16, 24, 0 if draw.random() < 0.1 else 8)) for _ in range(draw.randint(0, 3))
        )
        spec: list[list[str]] = [[] for _ in shape]
        for axis in draw.sample(list(sizes), 3):
            d = draw.randrange(len(shape)) if shape else 0
            if shape and shape[d] % math.prod(sizes[a] for a in [*spec[d], axis]) == 0 and draw.random() < 0.7:
                spec[d].append(axis)
        placement: Sharded | Explicit = Sharded(spec=tuple(map(tuple, spec)))
        count = math.prod(shape)
        if count and draw.random() < 0.25:
            cuts = sorted({0, count, *(draw.randint(0, count) for _ in range(writers))})
            placement = Explicit(
                boxes=tuple(
                    (draw.randrange(writers), box)
                    for a, b in itertools.pairwise(cuts)
                    for box in flat_range_boxes(shape, a, b)
                )
            )
        dtype = list(NUMPY)[(seed * 5 + i) % len(NUMPY)]
        tile = tuple(draw.randint(1, max(1, n)) for n in shape) if draw.random() < 0.7 else None
        tensor = Tensor(name=f"params/t{i}", dtype=dtype, shape=shape, placement=placement, tile=tile)
        raw = np.frombuffer(draw.randbytes(count * tensor.item_bytes), np.uint8)
        raw = raw & 1 if dtype == "bool" else raw
        tensors.append(tensor)
        arrays[tensor.name] = raw.view(NUMPY[dtype]).reshape(shape)
    layout = SaveLayout(
        tensors=tuple(tensors),
        writers=writers,
        meshes=(SaveMesh(axes=tuple(sizes.items()), writers=owners),),
        pack_bytes=draw.choice((1, 100, 1000, 5000, 1 << 30)),
        share_bytes=draw.choice((1, 64, 1000)),
    )
    return layout, arrays, draw


def _save(store: LocalStore, layout: SaveLayout, arrays: Arrays, *, lazily: bool, streams: int = 1) -> None:
    written = 0
    for writer in range(layout.writers):
        sources: dict = {name: _part_of(array) for name, array in arrays.items()}
        if not lazily:
            sources = {}
            for tensor, box in layout.boxes_of(writer):
                held = sources.setdefault(tensor.name, [])
                held.append((box, arrays[tensor.name][(*box.slices(), ...)]))
        written += Writer(store, layout, save="s", writer=writer, streams=streams).write(sources).value_bytes
    assert written == sum(array.nbytes for array in arrays.values())
    commit(store, layout, save="s", meta={"step": 3})


@pytest.mark.parametrize("seed", range(60))
def test_any_layout_any_box(seed: int, tmp_path: Path) -> None:
    layout, arrays, draw = _draw(seed)
    with LocalStore(tmp_path, create=True) as store:
        _save(store, layout, arrays, lazily=bool(seed % 2), streams=1 + seed % 3)
        reader = Reader(store, budget_bytes=draw.choice((1, 1000, 1 << 26)), in_flight=1 + seed % 3)
        assert reader.meta == {"step": 3}
        assert reader.verify_all() == sum(array.nbytes for array in arrays.values())
        wants, expected = [], []
        for name, array in arrays.items():
            wants.append(Want(name))
            expected.append(array)
            for _ in range(4):
                offset = tuple(draw.randint(0, n) for n in array.shape)
                box = Box(offset, tuple(draw.randint(0, n - o) for n, o in zip(array.shape, offset, strict=True)))
                # Into the middle of a larger array, with a stride.
                room = np.zeros((*(n + 2 for n in box.shape), 2), array.dtype)[..., 0]
                out = room[(*(slice(1, 1 + n) for n in box.shape), ...)]
                wants.append(Want(name, box, out if draw.random() < 0.5 else None))
                expected.append(array[(*box.slices(), ...)])
        for want, got, right in zip(wants, reader.read_many(wants), expected, strict=True):
            assert want.out is None or got is want.out
            assert got.dtype == right.dtype and got.tobytes() == right.tobytes(), want


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_any_memory_order(order: str, byteorder: str, tmp_path: Path) -> None:
    array = np.asarray(np.arange(12 * 20).reshape(12, 20), dtype=f"{byteorder}f4", order=order)  # type: ignore[call-overload]
    layout = SaveLayout(tensors=(Tensor(name="w", dtype="float32", shape=(12, 20), tile=(5, 8)),))
    with LocalStore(tmp_path) as store:
        Writer(store, layout, save="s").write({"w": array})
        commit(store, layout, save="s")
        assert np.array_equal(Reader(store).read("w"), array)


def test_reads_only_what_it_needs(tmp_path: Path) -> None:
    """A column of row shards: bytes wanted are bytes read, and only tables come on top."""
    layout = SaveLayout(
        tensors=(Tensor(name="w", dtype="float32", shape=(256, 512), placement=Sharded(spec=(("f",), ()))),),
        meshes=(SaveMesh(axes=(("f", 8),)),),
        writers=8,
    )
    array = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    asked: list[tuple[str, int]] = []

    class Counting(LocalStore):
        def read_into(self, name, offset, views):  # type: ignore[no-untyped-def]
            asked.append((name, sum(v.nbytes for v in views)))
            super().read_into(name, offset, views)

    with Counting(tmp_path) as store:
        _save(store, layout, {"w": array}, lazily=False)
        reader = Reader(store)
        asked.clear()
        wants = [Want("w", Box((0, 64), (256, 64)))]
        plan = reader.plan(wants)
        assert not asked, "planning touches no file"
        assert np.array_equal(reader.read_many(wants)[0], array[:, 64:128])
        assert plan.read_bytes == plan.wanted_bytes == 256 * 64 * 4
        assert sum(n for _, n in asked) == plan.read_bytes + plan.table_bytes
        assert len(asked) == plan.requests + plan.files and plan.files == 8


def test_gaps_are_merged_where_the_store_wants_it(tmp_path: Path) -> None:
    layout = SaveLayout(tensors=(Tensor(name="w", dtype="float32", shape=(256, 512)),))
    array = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)

    class Remote(LocalStore):
        merge_gap_bytes = 1 << 20

    with Remote(tmp_path) as store:
        _save(store, layout, {"w": array}, lazily=False)
        reader = Reader(store)
        wants = [Want("w", Box((0, 64), (256, 64)))]
        assert reader.plan(wants).requests == 1
        assert np.array_equal(reader.read_many(wants)[0], array[:, 64:128])


def test_a_request_costs_no_walk_over_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are told apart by the file that they read: a hash of a pack's values takes in the whole layout, and a
    large model has tens of thousands of requests."""
    layout = SaveLayout(tensors=tuple(Tensor(name=f"w{i}", dtype="float32", shape=(8, 8)) for i in range(50)))
    arrays = {f"w{i}": np.full((8, 8), i, np.float32) for i in range(50)}
    with LocalStore(tmp_path) as store:
        _save(store, layout, arrays, lazily=False)
        store.request_bytes = 256  # one for each tensor
        hashed: list[SaveLayout] = []
        monkeypatch.setattr(SaveLayout, "__hash__", lambda self: hashed.append(self) or id(self))
        reader = Reader(store)
        found = reader.read_many([Want(name) for name in arrays])
        assert reader.plan([Want(name) for name in arrays]).requests == 50
    assert all(np.array_equal(a, b) for a, b in zip(found, arrays.values(), strict=True))
    assert len(hashed) < 50


def test_lazy_sources_stay_within_the_budget(tmp_path: Path) -> None:
    """Fetched pieces are at most half of the budget each, and no two are alive beside what is being written."""
    budget = 1 << 20
    layout = SaveLayout(
        tensors=(Tensor(name="w", dtype="float32", shape=(8, 256, 512), axes=("layers", "embed", "mlp")),)
    )
    array = np.random.default_rng(0).standard_normal((8, 256, 512)).astype(np.float32)
    fetched: list[int] = []

    def fetch(box: Box) -> np.ndarray:
        fetched.append(box.size * 4)
        return array[box.slices()].copy()

    with LocalStore(tmp_path) as store:
        Writer(store, layout, save="s", budget_bytes=budget).write({"w": fetch})
        commit(store, layout, save="s")
        assert max(fetched) <= budget // 2 and sum(fetched) == array.nbytes
        assert np.array_equal(Reader(store).read("w"), array)
        with pytest.raises(FormatError, match=r"host memory budget.*at least"):
            Writer(store, layout, save="t", budget_bytes=100)


def test_no_thread_is_left(tmp_path: Path) -> None:
    layout, arrays, _ = _draw(4)
    before = set(threading.enumerate())
    with LocalStore(tmp_path, create=True) as store:
        _save(store, layout, arrays, lazily=False, streams=2)
        Reader(store).read_many([Want(name) for name in arrays])
    assert set(threading.enumerate()) == before


W = {"w": np.zeros((4, 4), np.float32)}
BAD_SOURCES = {
    "none": ({}, "tensor 'w'.*no source"),
    "shape": ({"w": np.zeros((4, 5), np.float32)}, r"tensor 'w'.*float32 \[4, 4\].*got float32 \[4, 5\]"),
    "dtype": ({"w": np.zeros((4, 4), np.float64)}, "tensor 'w'.*float32.*got float64"),
    "objects": ({"w": np.zeros((4, 4), object)}, "tensor 'w'.*dtype among"),
    "box": ({"w": [(Box((0, 0), (2, 4)), np.zeros((2, 4), np.float32))]}, "tensor 'w'.*an array for"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources(case: str, tmp_path: Path) -> None:
    sources, message = BAD_SOURCES[case]
    layout = SaveLayout(tensors=(Tensor(name="w", dtype="float32", shape=(4, 4)),))
    with LocalStore(tmp_path) as store, pytest.raises(FormatError, match=message):
        Writer(store, layout, save="s").write(sources)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [], "nothing is left of a save that failed"


def test_bad_wants(tmp_path: Path) -> None:
    layout = SaveLayout(tensors=(Tensor(name="w", dtype="float32", shape=(4, 4)),))
    with LocalStore(tmp_path) as store:
        _save(store, layout, W, lazily=False)
        reader = Reader(store)
        for want, message in [
            (Want("v"), "tensor 'v'.*no such name"),
            (Want("w", Box((0, 1), (4, 4))), r"tensor 'w'.*a box inside \[4, 4\]"),
            (Want("w", Box((0,), (4,))), r"tensor 'w'.*a box inside"),
            (Want("w", out=np.zeros((4, 5), np.float32)), "tensor 'w'.*to fill"),
            (Want("w", out=np.zeros((4, 4), np.float64)), "tensor 'w'.*to fill"),
        ]:
            with pytest.raises(FormatError, match=message):
                reader.read_many([want])
