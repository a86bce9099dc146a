"""`Checkpoints.newest` by several processes: each reads its part, and all take the same step."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import (
    FormatError,
    LocalStore,
    Reader,
    SaveLayout,
    SaveMesh,
    Sharded,
    StoreError,
    Tensor,
    Writer,
    commit,
)
from portatrain.checkpoint.locations import FolderLocation, step_name
from portatrain.checkpoint.saver import Checkpoints, check_newest
from portatrain.errors import UserError
from portatrain.recipe.retention import Retention
from portatrain.runs.find_checkpoints import opened
from portatrain.runs.history import kept_checkpoints
from portatrain.runs.run_dir import RunDir
from tests.support.folders import listing
from tests.support.held_arrays import Holding
from tests.support.small_recipe import make

PROCESSES = 3


class Agreed:
    """`Backend.agree` of threads."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.barrier = threading.Barrier(PROCESSES, timeout=30)
        self.lock = threading.Lock()

    def __call__(self, value: int) -> int:
        with self.lock:
            self.values.append(value)
        self.barrier.wait()
        highest = max(self.values)
        if self.barrier.wait() == 0:
            self.values.clear()
        self.barrier.wait()
        return highest


def save(folder: Path, step: int) -> None:
    values = np.random.default_rng(step).standard_normal((3, 64), dtype=np.float32)
    layout = SaveLayout(
        tensors=(Tensor(name="w", dtype="float32", shape=(3, 64), placement=Sharded(spec=(("fsdp",), ()))),),
        meshes=(SaveMesh(axes=(("fsdp", PROCESSES),)),),
        writers=PROCESSES,
    )
    with LocalStore(folder / step_name(step), create=True) as store:
        for writer in range(PROCESSES):
            Writer(store, layout, save="a", writer=writer).write({"w": values[writer : writer + 1]})
        commit(store, layout, save="a")


def damage(folder: Path, step: int, writer: int) -> None:
    path = folder / step_name(step) / f"pack-a-{writer:05d}-0000.safetensors"
    data = bytearray(path.read_bytes())
    data[-300] ^= 1
    path.write_bytes(data)


def look(folder: Path) -> tuple[list[int | str | None], list[list[str]]]:
    """(the step or error of each process, what each reports)."""
    agree, reports = Agreed(), [[] for _ in range(PROCESSES)]

    def one(process: int) -> int | str | None:
        try:
            found = Checkpoints(folder, process=process, processes=PROCESSES).newest(reports[process].append, agree)
        except UserError as error:
            agree.barrier.abort()
            return str(error)
        except threading.BrokenBarrierError:
            return "ended"
        if found is None:
            return None
        found[1].store.close()
        return found[0]

    with ThreadPoolExecutor(PROCESSES, thread_name_prefix="process") as pool:
        return list(pool.map(one, range(PROCESSES))), reports


@pytest.mark.parametrize("writer", range(PROCESSES))
def test_damage_that_any_process_reads_passes_a_checkpoint_over(writer: int, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    assert look(tmp_path)[0] == [2] * PROCESSES
    damage(tmp_path, 2, writer)
    steps, reports = look(tmp_path)
    assert steps == [1] * PROCESSES
    (said,) = reports[0]
    assert "step 2" in said
    assert f"pack-a-{writer:05d}-0000" in said
    assert "w" in said
    assert reports[1:] == [[]] * (PROCESSES - 1)


def test_a_file_that_one_process_cannot_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is passed over, and nothing is replaced afterwards."""
    for step in (1, 2):
        save(tmp_path, step)
    inner = LocalStore.read_into

    def fails(self: LocalStore, name: str, offset: int, views: list[memoryview]) -> None:
        if name.startswith("pack-a-00001") and step_name(2) in str(self.path):
            raise StoreError(name, expected="to read it", got="Stale file handle", do="Look at the storage.")
        inner(self, name, offset, views)

    monkeypatch.setattr(LocalStore, "read_into", fails)
    found, reports = look(tmp_path)
    assert "Stale file handle" in str(found[1])
    assert not any(isinstance(step, int) for step in found)
    assert reports == [[]] * PROCESSES
    assert (tmp_path / step_name(2) / "COMMIT").exists()


def test_damage_that_process_0_does_not_see_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    inner = Reader.verify_all

    def fails(self: Reader, part: int = 0, of: int = 1) -> int:
        if threading.current_thread().name.endswith("_2"):  # that host's memory, say
            raise FormatError("pack", expected="crc 1", got="another", do="Restore.")
        return inner(self, part, of)

    monkeypatch.setattr(Reader, "verify_all", fails)
    found, reports = look(tmp_path)
    assert "reads damage in files that process 0 can read" in str(found[0])
    assert not any(isinstance(step, int) for step in found)
    assert reports == [[]] * PROCESSES


def test_a_save_that_did_not_finish_is_passed_over_in_silence(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / step_name(2) / "COMMIT").unlink()
    assert look(tmp_path) == ([1] * PROCESSES, [[]] * PROCESSES)


def test_a_process_that_does_not_see_the_checkpoint_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    inner = FolderLocation.open

    def fails(self: FolderLocation, step: int, *, create: bool = False) -> LocalStore:
        if threading.current_thread().name.endswith("_2"):
            raise FormatError("COMMIT", expected="the file", got="none", do="Look.")
        return inner(self, step, create=create)

    monkeypatch.setattr(FolderLocation, "open", fails)
    found, _ = look(tmp_path)
    assert "COMMIT" in str(found[2])
    assert not any(isinstance(step, int) for step in found)


def test_nothing_left_that_verifies(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damage(tmp_path, 1, 2)
    (first, *others), _ = look(tmp_path)
    assert "expected one that verifies" in str(first)
    assert others == ["ended"] * (PROCESSES - 1)


def test_nothing_there(tmp_path: Path) -> None:
    assert look(tmp_path)[0] == [None] * PROCESSES


def test_every_file_is_read_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    read: list[str] = []
    inner = LocalStore.read_into

    def counted(self: LocalStore, name: str, offset: int, buffers: list[memoryview]) -> None:
        if name.startswith("pack-") and not offset:
            read.append(name)
        inner(self, name, offset, buffers)

    monkeypatch.setattr(LocalStore, "read_into", counted)
    look(tmp_path)
    assert sorted(read) == [f"pack-a-{writer:05d}-0000.safetensors" for writer in range(PROCESSES)]


def test_one_bad_read_condemns_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cable or a cache may hand out wrong bytes once: what looks damaged is read again before the verdict."""
    for step in (1, 2):
        save(tmp_path, step)
    inner, failed = Reader.verify_all, []

    def fails_once(self: Reader, part: int = 0, of: int = 1) -> int:
        if not failed:
            failed.append(part)
            raise FormatError("pack", expected="crc 1", got="another", do="Restore.")
        return inner(self, part, of)

    monkeypatch.setattr(Reader, "verify_all", fails_once)
    reports: list[str] = []
    found = Checkpoints(tmp_path).newest(reports.append)
    assert failed and found is not None and found[0] == 2
    assert reports == []


def test_a_link_to_another_runs_checkpoint_removes_nothing(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs" / step_name(3), tmp_path / "ours"
    theirs.mkdir(parents=True)
    ours.mkdir()
    for name in ("COMMIT", "pack-0"):
        (theirs / name).write_bytes(b"x")
    (ours / step_name(3)).symlink_to(theirs)
    FolderLocation(ours).remove(3)
    assert sorted(p.name for p in theirs.iterdir()) == ["COMMIT", "pack-0"]


LINKED = {
    "the folder": lambda ours, theirs: (shutil.rmtree(ours), ours.symlink_to(theirs)),
    "COMMIT": lambda ours, theirs: ((ours / "COMMIT").unlink(), (ours / "COMMIT").symlink_to(theirs / "COMMIT")),
    "a file": lambda ours, theirs: [
        (path.unlink(), path.symlink_to(theirs / path.name)) for path in ours.iterdir() if path.name != "COMMIT"
    ],
}


@pytest.mark.parametrize("what", LINKED)
def test_no_link_is_followed(what: str, tmp_path: Path) -> None:
    """Reading, listing, choosing, sweeping and saving: another run's checkpoint stays as it is, and is not ours."""
    backend: Any = Holding()
    for run in ("ours", "theirs"):
        checkpoints = Checkpoints(tmp_path / run / "checkpoints")
        for step in (1, 2):
            checkpoints.save(step, backend, backend.state(step), {"step": step})
            checkpoints.wait()
    ours, theirs = (tmp_path / run / "checkpoints" / step_name(2) for run in ("ours", "theirs"))
    before = listing(theirs)
    LINKED[what](ours, theirs)
    location, reports = FolderLocation(ours.parent), list[str]()
    if what != "a file":
        assert not location.committed(2)
        with pytest.raises(FormatError, match="symbolic link"):
            location.commit(2)
    found = Checkpoints(ours.parent).newest(reports.append)
    assert found is not None and found[0] == 1 and "symbolic link" in reports[0]
    check_newest(ours.parent, backend.program, make(), {})  # passes the step over, too
    assert [row["committed"] for row in kept_checkpoints(RunDir(tmp_path / "ours"))] == [True, what == "a file"]
    with pytest.raises(UserError, match="symbolic link"), opened(ours.parent, 2) as reader:
        reader.verify_all()
    again = Checkpoints(ours.parent, keep=Retention(last=1), save_name="a2")  # passes the step over, and saves it anew
    again.newest(reports.append)
    for step in (2, 3):
        again.save(step, backend, backend.state(step), {"step": step})
        again.wait()
    assert location.steps() == [3] and location.committed(3)
    assert listing(theirs) == before
