"""A save that dies at any of its writes: the previous checkpoint loads, nothing half-written is taken for whole.

Each point is a child process that sends itself SIGKILL, or a store that fails with an error of the system.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints_format import (
    Box,
    FormatError,
    LocalStore,
    NotCommittedError,
    Reader,
    SaveLayout,
    SaveMesh,
    Sharded,
    Tensor,
    Writer,
    commit,
)

LAYOUT = SaveLayout(
    tensors=(
        Tensor(
            name="params/w", dtype="float32", shape=(192, 96), tile=(8, 16), placement=Sharded(spec=(("fsdp",), ()))
        ),
        Tensor(name="params/b", dtype="bfloat16", shape=(96,)),
        Tensor(name="opt/count", dtype="int32", shape=(), role="opt"),
    ),
    meshes=(SaveMesh(axes=(("replica", 2), ("fsdp", 2))),),
    writers=4,
    pack_bytes=4000,
    share_bytes=512,
)
BUDGET = 4 << 10  # slabs of two tiles, so that a pack takes several writes


def _values(step: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step)
    return {
        t.name: np.frombuffer(draw.bytes(t.nbytes), np.uint8).view(_dtype(t)).reshape(t.shape) for t in LAYOUT.tensors
    }


def _dtype(tensor: Tensor) -> np.dtype:
    from checkpoints_format.dtypes import NUMPY

    return NUMPY[tensor.dtype]


def _part_of(array: np.ndarray) -> Callable[[Box], np.ndarray]:
    return lambda box: array[(*box.slices(), ...)]


def _save(store: LocalStore, step: int, save: str = "a0") -> None:
    sources = {name: _part_of(array) for name, array in _values(step).items()}
    for writer in range(LAYOUT.writers):
        Writer(store, LAYOUT, save=save, writer=writer, budget_bytes=BUDGET).write(sources)
    commit(store, LAYOUT, save=save, meta={"step": step})


class Counted(LocalStore):
    """Calls ``at(k, fd, chunk)`` before its k-th operation on the disk; chunk is None where it is not a write."""

    def __init__(self, path: Path, at: Callable[[int, int, memoryview | None], None]) -> None:
        super().__init__(path, create=True)
        self.operations, self.at = 0, at

    def _tick(self, fd: int = -1, chunk: memoryview | None = None) -> None:
        self.operations += 1
        self.at(self.operations, fd, chunk)

    def _create(self, name: str) -> int:
        self._tick()
        return super()._create(name)

    def _write(self, fd: int, chunk: memoryview) -> None:
        self._tick(fd, chunk)
        super()._write(fd, chunk)

    def _sync(self, fd: int) -> None:
        self._tick()  # a killed process loses nothing that was written; what a machine loses is tested below

    def _link(self, temporary: str, name: str) -> None:
        self._tick()
        super()._link(temporary, name)


def _count(folder: Path) -> int:
    with Counted(folder, lambda k, fd, chunk: None) as store:
        _save(store, 2)
        return store.operations


def _loads(folder: Path, step: int) -> None:
    with LocalStore(folder) as store:
        reader = Reader(store)
        assert reader.meta == {"step": step}
        for name, array in _values(step).items():
            assert reader.read(name).tobytes() == array.tobytes()
        reader.verify_all()


def _is_whole_or_refused(folder: Path, step: int) -> bool:
    try:
        _loads(folder, step)
    except NotCommittedError:
        return False
    return True


def _killed_at(folder: Path, point: int, *, torn: bool) -> None:
    """Save in a child that kills itself at its operation ``point``, after half of the write if ``torn``."""

    def at(k: int, fd: int, chunk: memoryview | None) -> None:
        if k == point:
            if torn and chunk is not None:
                os.write(fd, chunk[: len(chunk) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), Counted(folder, at) as store:
            _save(store, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.timeout(600)
def test_sigkill_at_every_write(tmp_path: Path) -> None:
    with LocalStore(tmp_path / "step-1", create=True) as store:
        _save(store, 1)
    points = _count(tmp_path / "count")
    assert points > 200
    committed = 0
    for point in range(1, points + 1):
        folder = tmp_path / f"step-2-{point}"
        folder.mkdir()
        _killed_at(folder, point, torn=bool(point % 2))
        if point % 10 == 0:
            _loads(tmp_path / "step-1", 1)
        whole = _is_whole_or_refused(folder, 2)
        committed += whole
        if not whole and point % 5 == 0:  # the next attempt saves into the same folder, past what was left there
            with LocalStore(folder) as store:
                _save(store, 3, save="a1")
            _loads(folder, 3)
    _loads(tmp_path / "step-1", 1)
    # Only a kill after the link of COMMIT leaves a whole checkpoint: the last fsync is that point.
    assert committed == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS])
def test_errors_of_the_system_at_every_write(code: int, tmp_path: Path) -> None:
    with LocalStore(tmp_path / "step-1", create=True) as store:
        _save(store, 1)
    points = _count(tmp_path / "count")
    for point in range(1, points + 1, 1 if code == errno.ENOSPC else 7):
        folder = tmp_path / f"step-2-{point}"

        def at(k: int, fd: int, chunk: memoryview | None, point: int = point) -> None:
            if k >= point:
                raise OSError(code, os.strerror(code))

        with Counted(folder, at) as store, pytest.raises(FormatError) as caught:
            _save(store, 2)
        text = str(caught.value)
        assert re.search(r"(pack|receipt|root)-a0\S*|COMMIT", text) and os.strerror(code) in text, text
        assert not _is_whole_or_refused(folder, 2) or point == points
        left = {path.name.split("-")[0] for path in folder.iterdir()}
        assert "tmp" not in left, "a failed save cleans up after itself where it can"
    _loads(tmp_path / "step-1", 1)


def test_nothing_is_named_before_it_is_durable(tmp_path: Path) -> None:
    """When COMMIT appears, every pack and the root were synced after their last write, and the folder after them."""
    log: list[tuple[str, str]] = []

    class Logged(LocalStore):
        def _create(self, name: str) -> int:
            fd = super()._create(name)
            log.append(("create", os.readlink(f"/proc/self/fd/{fd}")))
            return fd

        def _write(self, fd: int, chunk: memoryview) -> None:
            log.append(("write", os.readlink(f"/proc/self/fd/{fd}")))
            super()._write(fd, chunk)

        def _sync(self, fd: int) -> None:
            log.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))
            super()._sync(fd)

        def _link(self, temporary: str, name: str) -> None:
            log.append(("link", name))
            super()._link(temporary, name)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc")
    with Logged(tmp_path) as store:
        _save(store, 2)
    links = [i for i, (kind, _) in enumerate(log) if kind == "link"]
    assert len(links) == 1 and log[links[0]] == ("link", "COMMIT")
    before = log[: links[0]]
    last = {event: i for i, event in enumerate(before)}
    named = [p for p in map(str, tmp_path.iterdir()) if "pack-" in p or "root-" in p]
    assert len(named) > 4
    for path in named:
        assert last["write", path] < last["sync", path] < last["sync", str(tmp_path)]
    assert log[links[0] + 1] == ("sync", str(tmp_path)), "and COMMIT itself is made durable"


def test_two_processes_commit_at_once(tmp_path: Path) -> None:
    """Of two attempts that both think they own the run, one commits; whichever it is, it is whole."""
    for turn in range(5):
        folder = tmp_path / str(turn)
        with LocalStore(folder, create=True):
            pass
        children = []
        for attempt in (1, 2):
            child = os.fork()
            if child == 0:
                code = 1
                with contextlib.suppress(FormatError), LocalStore(folder) as store:
                    _save(store, attempt, save=f"a{attempt}")
                    code = 0
                os._exit(code)
            children.append(child)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes == [0, 1]
        with LocalStore(folder) as store:
            winner = Reader(store).meta["step"]
        _loads(folder, winner)
