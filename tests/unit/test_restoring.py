"""Reading ahead of a backend: the same bits in any order, merged, within its budget; errors reach the one who asks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import Box, LocalStore, Reader, SaveLayout, StoreError, Tensor, Writer, commit
from portatrain.checkpoint.restore import Restoring
from portatrain.errors import StorageError, UserError

SHAPES = {"params/a": (4, 32, 64), "params/b": (64,), "opt/m/a": (4, 32, 64), "opt/m/b": (64,), "opt/count": ()}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    values = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    values["opt/count"] = np.asarray(3, np.int32)
    layout = SaveLayout(
        tensors=tuple(
            Tensor(name=n, dtype=str(v.dtype), shape=v.shape, role=n.split("/")[0], batch=min(1, v.ndim))
            for n, v in values.items()
        )
    )
    with LocalStore(tmp_path / "c", create=True) as store:
        Writer(store, layout, save="a").write(values)
        commit(store, layout, save="a")
    return tmp_path / "c", values


class Counting(LocalStore):
    reads = 0

    def read_into(self, name: str, offset: int, views: Any) -> None:
        Counting.reads += 1
        super().read_into(name, offset, views)


def split(full: str) -> tuple[str, str]:
    role, _, name = full.rpartition("/")
    return (full, "") if full == "opt/count" else (role, name)


@pytest.mark.parametrize("budget", [0, 5_000, 40_000, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_layer_by_layer_in_any_order(saved: tuple[Path, dict], budget: int, seed: int) -> None:
    path, values = saved
    asked = [(n, i) for n, v in values.items() for i in (range(v.shape[0]) if v.ndim > 1 else [None])]
    random.Random(seed).shuffle(asked)
    boxes = {n: [Box.whole(v.shape)] for n, v in values.items()}
    with LocalStore(path) as store, Restoring(Reader(store), boxes, budget_bytes=budget) as restoring:
        for name, layer in asked:
            array = values[name]
            offset, shape = (0,) * array.ndim, array.shape
            if layer is not None:
                offset, shape = (layer, *offset[1:]), (1, *shape[1:])
            found = restoring.read(*split(name), offset, shape)
            assert np.array_equal(found, array[Box(offset, shape).slices()])


def test_many_small_boxes_are_few_requests(saved: tuple[Path, dict]) -> None:
    path, values = saved
    boxes = {n: [Box.whole(v.shape)] for n, v in values.items()}
    Counting.reads = 0
    with Counting(path) as store, Restoring(Reader(store), boxes) as restoring:
        for name in ("params/a", "opt/m/a"):
            for layer in range(4):
                restoring.read(*split(name), (layer, 0, 0), (1, 32, 64))
        for name in ("params/b", "opt/m/b", "opt/count"):
            restoring.read(*split(name), (0,) * values[name].ndim, values[name].shape)
    assert Counting.reads <= 7  # COMMIT, root, crc table, and what is merged of eleven boxes


def test_boxes_that_nobody_foresaw_and_boxes_asked_for_again(saved: tuple[Path, dict]) -> None:
    path, values = saved
    a = values["params/a"]
    with LocalStore(path) as store, Restoring(Reader(store), {"params/a": [Box((0, 0, 0), (2, 32, 64))]}) as restoring:
        for _ in range(3):
            assert np.array_equal(restoring.read("params", "a", (1, 2, 3), (3, 4, 5)), a[1:4, 2:6, 3:8])
            assert np.array_equal(restoring.read("params", "a", (0, 0, 0), (2, 32, 64)), a[:2])
        assert np.array_equal(restoring.read("params", "b", (0,), (64,)), values["params/b"])


def test_nothing_more_is_read_ahead_of_a_backend_that_holds_other_boxes(saved: tuple[Path, dict]) -> None:
    path, values = saved
    boxes = {n: [Box((0,) * v.ndim, tuple(max(1, s // 2) for s in v.shape))] for n, v in values.items()}
    with LocalStore(path) as store, Restoring(Reader(store), boxes, budget_bytes=1) as restoring:
        for name, value in values.items():
            for _ in range(2):
                found = restoring.read(*split(name), (0,) * value.ndim, value.shape)
                assert np.array_equal(found, value)
            restoring._thread.join(20)
            assert not restoring._thread.is_alive()


def test_damage_and_strangers_reach_the_one_who_asks(saved: tuple[Path, dict]) -> None:
    path, values = saved
    boxes = {n: [Box.whole(v.shape)] for n, v in values.items()}
    with (
        LocalStore(path) as store,
        Restoring(Reader(store), boxes) as restoring,
        pytest.raises(UserError, match="stranger"),
    ):
        restoring.read("params", "stranger", (), ())
    (pack,) = path.glob("pack-*")
    data = bytearray(pack.read_bytes())
    data[5000] ^= 1
    pack.write_bytes(data)
    with LocalStore(path) as store, Restoring(Reader(store), boxes) as restoring, pytest.raises(UserError, match="crc"):
        for name, value in values.items():
            restoring.read(*split(name), (0,) * value.ndim, value.shape)


def test_leaving_early_ends_the_thread(saved: tuple[Path, dict]) -> None:
    path, values = saved
    boxes = {n: [Box.whole(v.shape)] for n, v in values.items()}
    with LocalStore(path) as store:
        with Restoring(Reader(store), boxes, budget_bytes=10) as restoring:
            pass
        assert not restoring._thread.is_alive()


@pytest.mark.parametrize("ahead", [True, False])
def test_a_read_that_fails_is_the_storages_and_ends_no_run_for_good(
    saved: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Every byte was verified before: a job tries again (exit code 75)."""
    path, values = saved
    name = next(n for n, v in values.items() if v.ndim > 1)
    shape = values[name].shape
    boxes = {name: [Box.whole(shape)]} if ahead else {}
    with LocalStore(path) as store:
        reader = Reader(store)

        def fails(*_: Any) -> None:
            raise StoreError(name, expected="to read it", got="Input/output error", do="Look at the storage.")

        monkeypatch.setattr(LocalStore, "read_into", fails)
        with Restoring(reader, boxes) as restoring, pytest.raises(StorageError, match="Input/output") as found:
            restoring.read(*split(name), (0,) * len(shape), shape)
    assert found.value.code == 75
