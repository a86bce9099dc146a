"""Tiles: the formula, the arithmetic of a grid against counting, and what a reader on another mesh reads."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from checkpoints_format import Box, SaveLayout, SaveMesh, Sharded, Tensor, tile_shape
from checkpoints_format.strided_copy import copy_tiles, tiles_first
from checkpoints_format.tiles import MAX_TILE_BYTES, Grid

# Frozen: a change of the formula changes every offset that a writer computes without a recorded tile.
GOLDEN = {
    ((4096, 14336), 2, 0): (128, 64),
    ((32, 4096, 32, 128), 4, 1): (1, 128, 1, 4),
    ((128256, 16384), 4, 0): (1336, 512),
    ((126, 16384, 53248), 4, 1): (1, 512, 128),
    ((61, 256, 7168, 2048), 1, 2): (1, 1, 32, 64),
    ((16384,), 4, 0): (512,),
    ((1024, 1024), 2, 0): (32, 32),
    ((50257, 768), 4, 0): (1733, 8),
    ((151643, 8192), 4, 0): (4739, 256),
    ((64, 64), 4, 0): (8, 8),
    ((), 8, 0): (),
    ((0, 5), 4, 0): (1, 5),
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_formula(case: tuple[tuple[int, ...], int, int]) -> None:
    assert tile_shape(*case) == GOLDEN[case]


def test_tiles_stay_small_and_inside() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        shape = tuple(draw.choice((1, 2, 7, 64, 97, 1000, 4096, 99991, 1 << 20)) for _ in range(draw.randint(0, 4)))
        batch, item = draw.randint(0, len(shape)), draw.choice((1, 2, 4, 8, 16))
        tile = tile_shape(shape, item, batch)
        assert math.prod(tile) * item <= MAX_TILE_BYTES
        assert all(1 <= t <= n for t, n in zip(tile, shape, strict=True)) and tile[:batch] == (1,) * batch


@pytest.mark.parametrize(
    "shape",
    [
        (4096, 4096),
        (8192, 28672),
        (4096, 14336),
        (5120, 13824),
        (16384, 53248),
        (3072, 3072),
        (1024, 4096),
        (128256, 4096),
        (1024, 1024),
    ],
    ids=str,
)
@pytest.mark.parametrize("item", [2, 4])
def test_over_read(shape: tuple[int, ...], item: int) -> None:
    """Any axis of these: 1.000 up to 8 ways, at most 1.25 up to 32. (Below 1 KiB a tile is not cut for the latter.)"""
    tile = tile_shape(shape, item)
    for d, n in enumerate(shape):
        for ways in (k for k in range(1, 33) if n % k == 0):
            part = n // ways
            read = sum((-(-(i + 1) * part // tile[d]) - i * part // tile[d]) * tile[d] for i in range(ways))
            ratio = read / n
            assert ratio == 1.0 if ways <= 8 else ratio <= 1.25, (d, ways)


def _count(grid: Grid) -> list[tuple[list[int], list[int]]]:
    """Start and extents of every tile, by walking."""
    tiles = []
    for index in itertools.product(*map(range, grid.counts)):
        start = [grid.start(d, i) for d, i in enumerate(index)]
        tiles.append((start, [grid.start(d, i + 1) - s for d, (i, s) in enumerate(zip(index, start, strict=True))]))
    return tiles


@pytest.mark.parametrize("seed", range(150))
def test_grid_against_counting(seed: int) -> None:
    draw = random.Random(seed)
    dims = draw.randint(0, 4)
    shape = tuple(draw.randint(1, 12) for _ in range(dims))
    tile = tuple(draw.randint(1, 6) for _ in range(dims))
    grid = Grid(Box(tuple(draw.randint(0, 9) for _ in range(dims)), shape), tile)
    tiles = _count(grid)
    sizes = [math.prod(extents) for _, extents in tiles]
    assert len(tiles) == grid.count and sum(sizes) == grid.box.size
    for d, (offset, t) in enumerate(zip(grid.box.offset, tile, strict=True)):
        lines = {offset + start[d] for start, _ in tiles} - {offset}
        assert all(line % t == 0 for line in lines), "cut lines are multiples in global coordinates"
    before = [0, *itertools.accumulate(sizes)]
    assert [grid.elements_before(k) for k in range(grid.count + 1)] == before
    for elements in range(grid.box.size + 1):
        assert grid.first_beyond(elements) == max(k for k, b in enumerate(before) if b <= elements)
    crop = [(0, n) for n in shape]
    if seed % 2:
        crop = [(low, draw.randint(low + 1, n)) for n in shape for low in [draw.randint(0, n - 1)]]
    first = draw.randint(0, grid.count)
    last = draw.randint(first, grid.count)
    meets = [
        k
        for k, (start, extents) in enumerate(tiles)
        if first <= k < last
        and all(s < end and s + e > begin for s, e, (begin, end) in zip(start, extents, crop, strict=True))
    ]
    found = []
    for block in grid.blocks(crop, first, last, draw.choice((1, 7, 50, 10_000))):
        numbers = range(block.first, block.first + block.count)
        found += numbers
        assert block.elements == before[numbers.stop] - before[numbers.start]
        for number, relative in zip(numbers, itertools.product(*map(range, block.tiles)), strict=True):
            start, extents = tiles[number]
            assert tuple(extents) == block.extents
            assert start == [b + r * e for b, r, e in zip(block.start, relative, block.extents, strict=True)]
    assert found == meets


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "c16"])
def test_moves_against_a_loop(dtype: str) -> None:
    array = np.arange(6 * 8 * 10).astype(dtype).reshape(6, 8, 10)
    region = array[1:5, 2:8, 0:10]
    tiles = tiles_first(region, (2, 3, 2))
    assert np.shares_memory(tiles, array)
    row = np.empty(region.size, dtype)
    copy_tiles(row.reshape(tiles.shape), tiles)
    loop = [
        region[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 5 * k : 5 * k + 5].ravel()
        for i in range(2)
        for j in range(3)
        for k in range(2)
    ]
    assert np.array_equal(row, np.concatenate(loop))
    back = np.zeros_like(array)
    copy_tiles(tiles_first(back[1:5, 2:8, 0:10], (2, 3, 2)), row.reshape(tiles.shape))
    assert np.array_equal(back[1:5, 2:8], region) and back.sum() == region.sum()


def test_grid_is_the_tensors_whatever_the_mesh() -> None:
    """Column cuts of row shards fall on the same lines as those of the whole."""
    tensor = Tensor(name="w", dtype="float32", shape=(4096, 2048), placement=Sharded(spec=(("fsdp",), ())))
    for ways in (1, 2, 8, 64):
        layout = SaveLayout(tensors=(tensor,), meshes=(SaveMesh(axes=(("fsdp", ways),)),), writers=ways)
        for held, box in layout.boxes_of(ways - 1):
            grid = Grid(box, held.tile or ())
            assert [grid.start(1, i) for i in range(grid.counts[1])] == list(range(0, 2048, 64))
