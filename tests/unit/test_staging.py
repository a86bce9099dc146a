"""Copies between the thread that trains and the one that writes: within the budget, each once, and no way to hang."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints_format import Box, LocalStore, Reader, SaveLayout, SaveMesh, Sharded, Tensor, Writer, commit
from portatrain.checkpoint.host_copies import Staging, given_budget_bytes
from portatrain.errors import UserError
from portatrain.system.environment import SAVE_MEMORY_GIB

LAYERS, ROWS, COLUMNS = 6, 40, 64
LAYOUT = SaveLayout(
    tensors=(
        Tensor(name="a/w", dtype="float32", shape=(LAYERS, ROWS, COLUMNS), batch=1),
        Tensor(name="b", dtype="int32", shape=()),
        Tensor(name="c/w", dtype="float32", shape=(ROWS, COLUMNS), placement=Sharded(spec=(("fsdp",), ()))),
        Tensor(name="d/w", dtype="float64", shape=(LAYERS, ROWS), batch=1),
    ),
    meshes=(SaveMesh(axes=(("fsdp", 4),)),),
)
SIZES = {t.name: t.item_bytes for t in LAYOUT.tensors}
ONE_LAYER = ROWS * COLUMNS * 4


class Held:
    """A state in pieces: a layer each of `a/w`, a row shard each of `c/w`. Counts what is alive of its copies."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.whole = {t.name: rng.integers(0, 2**15, t.shape).astype(t.dtype) for t in LAYOUT.tensors}
        self.alive = self.most = self.copies = 0

    def boxes(self) -> list[tuple[str, Box, Callable[[], np.ndarray]]]:
        found = [("b", Box((), ())), ("d/w", Box.whole((LAYERS, ROWS)))]
        found += [("a/w", Box((i, 0, 0), (1, ROWS, COLUMNS))) for i in reversed(range(LAYERS))]
        found += [("c/w", Box((i * ROWS // 4, 0), (ROWS // 4, COLUMNS))) for i in range(4)]
        return [(name, box, lambda n=name, b=box: self._copy(n, b)) for name, box in found]

    def _copy(self, name: str, box: Box) -> np.ndarray:
        copy = np.array(self.whole[name][box.slices()])
        self.copies += 1
        self.alive += copy.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(copy, self._gone, copy.nbytes)
        return copy

    def _gone(self, nbytes: int) -> None:
        self.alive -= nbytes


@pytest.mark.parametrize("budget", [0, ONE_LAYER, 3 * ONE_LAYER, 1 << 30])
def test_what_is_written_is_what_was_held_when_filling_ended(tmp_path: Path, budget: int) -> None:
    held = Held(seed=budget)
    expected = {n: a.copy() for n, a in held.whole.items()}
    staging = Staging(held.boxes(), SIZES, budget_bytes=budget)
    whole_bytes = sum(a.nbytes for a in expected.values())
    assert staging.nbytes == whole_bytes
    assert staging.beyond_bytes == (min(whole_bytes, whole_bytes - budget + ONE_LAYER) if budget < 1 << 20 else 0)
    with LocalStore(tmp_path / "c", create=True) as store:
        writer = Writer(store, LAYOUT, save="s", budget_bytes=1 << 15)  # which asks for a layer at a time
        writing = threading.Thread(target=writer.write, args=(staging.sources(),))
        if budget < 1 << 20:
            writing.start()
        staging.fill()
        for array in held.whole.values():  # training goes on
            array.fill(-1)
        if budget >= 1 << 20:
            writing.start()
        writing.join(60)
        assert not writing.is_alive()
        staging.close()
        commit(store, LAYOUT, save="s")
        reader = Reader(store)
        for name, array in expected.items():
            assert np.array_equal(reader.read(name), array), name
    assert held.copies == 2 + LAYERS + 4
    if budget < 1 << 20:  # beside the copies, what the writer has in its hands
        assert held.most <= max(budget, ONE_LAYER) + 2 * ONE_LAYER < whole_bytes
    assert held.alive == 0


def test_a_writer_that_wakes_late_does_not_let_more_in(tmp_path: Path) -> None:
    """It waits for one copy; on a busy machine many could be made before it came to say that it has it."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for i in range(12):
            test_what_is_written_is_what_was_held_when_filling_ended(tmp_path / str(i), ONE_LAYER)
    finally:
        sys.setswitchinterval(interval_s)


def test_an_order_that_was_not_foreseen_ends_all_the_same() -> None:
    held = Held()
    staging = Staging(held.boxes(), SIZES, budget_bytes=ONE_LAYER)
    filling = threading.Thread(target=staging.fill)
    filling.start()
    source = staging.sources()["a/w"]
    for layer in (5, 0, 4):
        want = Box((layer, 3, 0), (1, 9, COLUMNS))
        assert np.array_equal(source(want), held.whole["a/w"][want.slices()])
    wide = Box((1, 0, 0), (3, ROWS, COLUMNS))
    assert np.array_equal(source(wide), held.whole["a/w"][wide.slices()])
    assert staging.sources()["d/w"](Box((2, 5), (1, 5))).shape == (1, 5)
    staging.close()
    filling.join(60)
    assert not filling.is_alive()


def test_a_copy_that_fails_reaches_both_threads() -> None:
    held = Held()

    def fails() -> np.ndarray:
        raise MemoryError("no room on the host")

    boxes = [(n, b, fails if n == "c/w" else f) for n, b, f in held.boxes()]
    staging = Staging(boxes, SIZES, budget_bytes=0)
    raised: list[BaseException] = []

    def write() -> None:
        try:
            for name, source in staging.sources().items():
                source(Box.whole(held.whole[name].shape))
        except MemoryError as error:
            raised.append(error)

    writing = threading.Thread(target=write)
    writing.start()
    with pytest.raises(MemoryError):
        staging.fill()
    writing.join(60)
    assert not writing.is_alive() and len(raised) == 1


def test_a_writer_that_ends_lets_training_go_on() -> None:
    held = Held()
    staging = Staging(held.boxes(), SIZES, budget_bytes=0)
    threading.Timer(0.2, staging.close).start()
    staging.fill()
    assert held.copies < 2 + LAYERS + 4 and held.alive == 0


@pytest.mark.parametrize(("given", "wanted"), [("1.5", 3 << 29), ("0", 0)])
def test_the_budget_of_the_environment(monkeypatch: pytest.MonkeyPatch, given: str, wanted: int) -> None:
    monkeypatch.delenv(SAVE_MEMORY_GIB.name, raising=False)
    assert given_budget_bytes() is None
    monkeypatch.setenv(SAVE_MEMORY_GIB.name, given)
    assert given_budget_bytes() == wanted


@pytest.mark.parametrize("given", ["much", "-1", "nan", "inf"])
def test_a_budget_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(SAVE_MEMORY_GIB.name, given)
    with pytest.raises(UserError, match=SAVE_MEMORY_GIB.name):
        given_budget_bytes()
