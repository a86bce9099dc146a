"""A run's save, sweep included, that dies at any of its operations: the step before always loads, and the next goes on.

Each point is a forked child that sends itself SIGKILL before one operation on the disk.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore
from portatrain.checkpoint.saver import Checkpoints
from portatrain.errors import UserError
from portatrain.recipe.retention import Retention
from tests.support.held_arrays import Holding

EVENTS = ("open", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.rename", "shutil.rmtree")
STEPS = (1, 2, 3)


def save_all(folder: Path) -> None:
    """Three saves with one kept, so that the second and the third sweep; the third at a step that was begun before."""
    backend: Any = Holding()
    for step in STEPS:
        checkpoints = Checkpoints(folder, keep=Retention(last=1), save_name=f"a{step}")
        checkpoints.save(step, backend, backend.state(step), {"step": step})
        checkpoints.wait()


def counting(folder: Path, act: Callable[[int], None]) -> None:
    """Call act(n) before the nth operation that touches `folder`; opening for reading counts too."""
    seen = 0

    def one() -> None:
        nonlocal seen
        seen += 1
        act(seen)

    def hook(event: str, args: tuple) -> None:
        if event in EVENTS:
            one()

    sys.addaudithook(hook)
    for name in ("_write", "_sync"):
        inner = getattr(LocalStore, name)

        def wrapped(self: LocalStore, *args: Any, inner: Any = inner) -> Any:
            one()
            return inner(self, *args)

        setattr(LocalStore, name, wrapped)


def child(run: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def operations(tmp_path: Path) -> int:
    """How many there are, counted by a child that is not killed."""
    reading, writing = os.pipe()

    def run() -> None:
        last = [0]
        counting(tmp_path / "count", lambda n: last.__setitem__(0, n))
        save_all(tmp_path / "count")
        os.write(writing, str(last[0]).encode())

    assert child(run) == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return int(pipe.read())


def newest(folder: Path) -> tuple[int, dict[str, np.ndarray]] | None:
    found = Checkpoints(folder).newest(pytest.fail)  # nothing half-written is ever taken for damaged, or for whole
    if found is None:
        return None
    with found[1].store:
        return found[0], {n: found[1].read(n) for n in found[1].names}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_before_any_operation(tmp_path: Path) -> None:
    total = operations(tmp_path)
    assert total > 60
    backend: Any = Holding()
    reached = set()
    for point in range(1, total + 1):
        folder = tmp_path / str(point)

        def run(folder: Path = folder, point: int = point) -> None:
            counting(folder, lambda at: os.kill(os.getpid(), signal.SIGKILL) if at == point else None)
            save_all(folder)

        status = child(run)
        found = newest(folder)
        if status == 0:  # how often one looks for the other's file differs: it was through before this point
            assert point > total // 2 and found is not None and found[0] == STEPS[-1]
        else:
            assert os.WTERMSIG(status) == signal.SIGKILL, point
        if found is not None:
            step, values = found
            assert all(np.array_equal(values[n], a) for n, a in backend.state(step).items())
        reached.add(found[0] if found else 0)
        # Whatever lies there, the next attempt saves, and nothing but its checkpoint is left.
        again = Checkpoints(folder, keep=Retention(last=1), save_name="b")
        if (there := again.newest(pytest.fail)) is not None:
            there[1].store.close()
        again.save(4, backend, backend.state(4), {"step": 4})
        again.wait()
        assert again.location.steps() == [4]
        assert newest(folder) is not None
    assert reached == {0, 1, 2, 3}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("operation", ["_create", "_write", "_sync", "_link"])
def test_an_error_of_the_disk_is_told_and_the_step_before_stands(
    operation: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Any = Holding()
    checkpoints = Checkpoints(tmp_path, save_name="a1")
    checkpoints.save(1, backend, backend.state(1), {"step": 1})
    checkpoints.wait()

    def refuse(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, operation, refuse)
        checkpoints.save(2, backend, backend.state(2), {"step": 2})
        with pytest.raises(UserError, match=os.strerror(number)):
            checkpoints.wait()
    found = newest(tmp_path)
    assert found is not None and found[0] == 1
    checkpoints.save(3, backend, backend.state(3), {"step": 3})  # with room again, it goes on
    checkpoints.wait()
    assert newest(tmp_path)[0] == 3  # type: ignore[index]


def test_a_store_that_stalls_does_not_stall_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    go, inner = threading.Event(), LocalStore._write

    def stalled(self: LocalStore, fd: int, chunk: memoryview) -> None:
        assert go.wait(30)
        inner(self, fd, chunk)

    backend: Any = Holding()
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(LocalStore, "_write", stalled)
    checkpoints.save(1, backend, backend.state(1), {"step": 1})
    for _ in range(100):  # steps
        checkpoints.check()
    assert newest(tmp_path) is None
    go.set()
    checkpoints.wait()
    assert newest(tmp_path)[0] == 1  # type: ignore[index]
