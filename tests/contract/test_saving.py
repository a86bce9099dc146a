"""Saving while training: retention and its sweep, busy saves, errors of the background, fences, small budgets."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.checkpoint import locations
from portatrain.checkpoint.saver import Checkpoints
from portatrain.errors import UserError
from portatrain.recipe.retention import Retention
from tests.support.held_arrays import Holding


@pytest.fixture
def backend() -> Any:
    return Holding()


def save(checkpoints: Checkpoints, backend: Any, step: int, **meta: Any) -> None:
    checkpoints.save(step, backend, backend.state(step), {"step": step, **meta})
    checkpoints.wait()


def loads(path: Path, backend: Any, step: int) -> None:
    with LocalStore(path / f"step-{step:08d}") as store:
        reader = Reader(store)
        reader.verify_all()
        for name, array in backend.state(step).items():
            assert np.array_equal(reader.read(name), array)


def test_the_last_every_nth_and_the_best_stay_and_load(backend: Any, tmp_path: Path) -> None:
    keep = Retention(last=1, every=4, best="min:loss")
    for step in range(1, 8):
        checkpoints = Checkpoints(tmp_path, keep=keep, save_name=f"a{step}")  # as after restarts: nothing in memory
        save(checkpoints, backend, step, metrics={"loss": abs(step - 3)})
    assert checkpoints.location.steps() == [3, 4, 7]
    for step in (3, 4, 7):
        loads(tmp_path, backend, step)


def test_a_sweep_removes_what_no_commit_names_and_nothing_else(backend: Any, tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, save_name="a1"), backend, 1)
    folder = tmp_path / "step-00000002"
    folder.mkdir()
    for name in (
        "pack-a1-00000-0000.safetensors",
        "receipt-a1-00000.json",
        "root-a1.json",
        "pack-a10-00000-0000.safetensors",
    ):
        (folder / name).write_bytes(b"left by a save that was killed")
    (folder / "notes.txt").write_text("a person's")
    (tmp_path / "step-00000001b").mkdir()
    save(Checkpoints(tmp_path, save_name="a2"), backend, 2)
    assert sorted(p.name for p in folder.iterdir()) == [
        "COMMIT",
        "notes.txt",
        "pack-a2-00000-0000.safetensors",
        "receipt-a2-00000.json",
        "root-a2.json",
    ]
    assert (tmp_path / "step-00000001b").exists()
    for step in (1, 2):
        loads(tmp_path, backend, step)
    (tmp_path / "step-00000000").mkdir()  # a first save that never was committed
    save(Checkpoints(tmp_path, save_name="a3"), backend, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001b", "step-00000002", "step-00000003"]


def test_a_step_whose_checkpoint_is_damaged_is_saved_anew(backend: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        save(Checkpoints(tmp_path, save_name=f"a{step}"), backend, step)
    pack = tmp_path / "step-00000002/pack-a2-00000-0000.safetensors"
    pack.write_bytes(pack.read_bytes()[:-1])
    checkpoints = Checkpoints(tmp_path, save_name="a3", keep=Retention(last=2))
    seen: list[str] = []
    found = checkpoints.newest(seen.append)
    assert found is not None and found[0] == 1 and len(seen) == 1
    save(checkpoints, backend, 2)
    loads(tmp_path, backend, 2)
    loads(tmp_path, backend, 1)
    assert not pack.exists()


class Slow(locations.FolderLocation):
    """A folder whose stores wait at their first write until told."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go, self.fail = threading.Event(), False

    def open(self, step: int, *, create: bool = False) -> LocalStore:
        store = super().open(step, create=create)
        create_file = store._create

        def waiting(name: str) -> int:
            assert self.go.wait(20)
            if self.fail:
                raise OSError(28, "No space left on device")
            return create_file(name)

        store._create = waiting  # type: ignore[method-assign]
        return store


def test_a_second_save_waits_or_is_skipped(backend: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.location = slow = Slow(tmp_path)
    assert checkpoints.save(1, backend, backend.state(1), {"step": 1})
    checkpoints.check()  # does not wait
    assert not checkpoints.save(2, backend, backend.state(2), {"step": 2}, skip_if_busy=True)
    threading.Timer(0.2, slow.go.set).start()
    assert checkpoints.save(3, backend, backend.state(3), {"step": 3})  # waits
    assert slow.go.is_set()
    checkpoints.wait()
    assert slow.steps() == [1, 3]
    loads(tmp_path, backend, 1)
    loads(tmp_path, backend, 3)


def test_an_error_of_the_background_is_told_at_the_next_step(backend: Any, tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, save_name="a1"), backend, 1)
    checkpoints = Checkpoints(tmp_path, save_name="a2")
    checkpoints.location = slow = Slow(tmp_path)
    slow.fail = True
    checkpoints.save(2, backend, backend.state(2), {"step": 2})
    checkpoints.check()
    slow.go.set()
    assert checkpoints._thread is not None
    checkpoints._thread.join(20)
    with pytest.raises(UserError, match="No space left"):
        checkpoints.check()
    checkpoints.check()  # once
    loads(tmp_path, backend, 1)
    found = Checkpoints(tmp_path).newest(pytest.fail)
    assert found is not None and found[0] == 1


def test_an_attempt_that_lost_the_run_cannot_commit(backend: Any, tmp_path: Path) -> None:
    def lost() -> None:
        raise UserError("run", expected="our claim", got="another's", do="Nothing.")

    checkpoints = Checkpoints(tmp_path, guard=lost)
    checkpoints.save(1, backend, backend.state(1), {"step": 1})
    with pytest.raises(UserError, match="our claim"):
        checkpoints.wait()
    assert not list(tmp_path.rglob("COMMIT"))


def test_a_state_beyond_the_budget_is_copied_before_training_goes_on(backend: Any, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, budget_bytes=30_000), backend.state(5)
    largest = 64 * 96 * 4
    assert checkpoints.beyond_bytes(backend, state) == 3 * (largest + 96 * 4) + 4 - 30_000 + largest
    assert Checkpoints(tmp_path).beyond_bytes(backend, state) == 0
    checkpoints.save(5, backend, state, {"step": 5})
    for array in state.values():
        array.fill(0)  # the next step
    checkpoints.wait()
    loads(tmp_path, backend, 5)
    assert max(backend.fetched_bytes) == largest and sum(backend.fetched_bytes) < 4 * largest  # each once


def test_a_write_that_fails_beyond_the_budget_stops_the_copies(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, budget_bytes=0)
    save(checkpoints, backend, 1)

    def full(self: LocalStore, fd: int, chunk: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalStore, "_write", full)
    checkpoints.save(2, backend, backend.state(2), {"step": 2})
    with pytest.raises(UserError, match="No space left"):
        checkpoints.wait()
    loads(tmp_path, backend, 1)


def test_a_receipt_counts_once_it_is_whole(tmp_path: Path) -> None:
    backend, checkpoints = Holding(), Checkpoints(tmp_path)
    checkpoints.save(1, backend, backend.state(1), {})
    checkpoints.wait()
    (receipt,) = tmp_path.glob("step-00000001/receipt-*")
    whole = receipt.read_bytes()
    with LocalStore(receipt.parent) as store:
        receipt.unlink()
        waiting = threading.Thread(target=checkpoints._await_receipts, args=(store,))
        waiting.start()
        for part in (b"", whole[:10], whole[:-2]):  # as the committing process may find it
            receipt.write_bytes(part)
            waiting.join(0.3)
            assert waiting.is_alive(), part
        receipt.write_bytes(whole)
        waiting.join(10)
        assert not waiting.is_alive()
