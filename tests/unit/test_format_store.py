"""Commit, receipts, and the local store: what is refused, and that nothing leads out of the folder."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from checkpoints_format import (
    AlreadyCommittedError,
    FormatError,
    LocalStore,
    MissingFileError,
    NotCommittedError,
    Reader,
    SaveLayout,
    Sharded,
    Store,
    Tensor,
    Writer,
    commit,
)

LAYOUT = SaveLayout(
    tensors=(Tensor(name="w", dtype="int32", shape=(4, 6), placement=Sharded(spec=(("writer",), ()))),), writers=2
)
ARRAY = np.arange(24, dtype=np.int32).reshape(4, 6)


def _write(store: Store, save: str, writers: tuple[int, ...] = (0, 1), layout: SaveLayout = LAYOUT) -> None:
    for writer in writers:
        Writer(store, layout, save=save, writer=writer).write({"w": ARRAY[2 * writer : 2 * writer + 2]})


def test_it_is_a_store(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        assert isinstance(store, Store)


def test_commit_waits_for_every_writer(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        _write(store, "a0", (0,))
        with pytest.raises(MissingFileError, match=r"receipt-a0-00001.json.*receipt of writer 1"):
            commit(store, LAYOUT, save="a0")
        with pytest.raises(NotCommittedError, match=r"COMMIT.*did not finish"):
            Reader(store)
        _write(store, "a0", (1,))
        commit(store, LAYOUT, save="a0")
        assert np.array_equal(Reader(store).read("w"), ARRAY)


def test_writers_must_agree_on_the_layout(tmp_path: Path) -> None:
    other = SaveLayout(tensors=LAYOUT.tensors, writers=2, pack_bytes=77)
    with LocalStore(tmp_path) as store:
        _write(store, "a0", (0,))
        _write(store, "a0", (1,), other)
        with pytest.raises(FormatError, match=r"receipt-a0-00001.json.*same layout"):
            commit(store, LAYOUT, save="a0")


def test_the_first_commit_stands(tmp_path: Path) -> None:
    """Two attempts side by side do not touch each other's files; the second to commit is told so."""
    with LocalStore(tmp_path) as store:
        _write(store, "a0")
        _write(store, "a1")
        commit(store, LAYOUT, save="a1", meta={"attempt": 1})
        before = (tmp_path / "COMMIT").read_bytes()
        with pytest.raises(AlreadyCommittedError):
            commit(store, LAYOUT, save="a0", meta={"attempt": 0})
        assert (tmp_path / "COMMIT").read_bytes() == before and Reader(store).meta == {"attempt": 1}
        with pytest.raises(FormatError, match=r"pack-a1-00000-0000.safetensors.*name of its own"):
            _write(store, "a1", (0,))


def test_put_if_absent_has_one_winner(tmp_path: Path) -> None:
    won: list[int] = []
    gate = threading.Barrier(8)

    def race(i: int) -> None:
        gate.wait()
        if store.put_if_absent("COMMIT", f"{i}".encode() * 100):
            won.append(i)

    with LocalStore(tmp_path) as store:
        threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and (tmp_path / "COMMIT").read_text() == f"{won[0]}" * 100
        assert list(store.list()) == ["COMMIT"], "no temporary file is left"


NAMES = ["../w", "/etc/passwd", "a/b", "", ".", "..", ".hidden", "a\0b", "a\nb", "x" * 201, "a\\b", "-rf"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_could_lead_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "w").write_text("outside")
    with LocalStore(tmp_path / "c", create=True) as store:
        for call in (
            lambda: store.size(name),
            lambda: store.put(name, [], 0),
            lambda: store.delete(name),
            lambda: store.put_if_absent(name, b""),
            lambda: store.read_into(name, 0, []),
        ):
            with pytest.raises(FormatError, match="file name"):
                call()
    assert (tmp_path / "w").read_text() == "outside"


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 100)
    with LocalStore(tmp_path / "c", create=True) as store:
        (tmp_path / "c" / "link").symlink_to(tmp_path / "secret")
        os.mkfifo(tmp_path / "c" / "pipe")
        (tmp_path / "c" / "folder").mkdir()
        with pytest.raises(FormatError, match=r"link.*symbolic link"):
            store.size("link")
        for name in ("pipe", "folder"):
            with pytest.raises(FormatError, match=f"{name}.*regular file"):
                store.read_into(name, 0, [memoryview(bytearray(1))])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with LocalStore(tmp_path) as store, pytest.raises(FormatError, match=r"Permission denied.*another folder"):
            _write(store, "a0", (0,))
    finally:
        tmp_path.chmod(0o700)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such file or folder.*Check the path"):
        LocalStore(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="Not a directory"):
        LocalStore(tmp_path / "file")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_disk_full_for_real(tmp_path: Path) -> None:
    class Full(LocalStore):
        def _create(self, name: str) -> int:
            super()._check(name)
            return os.open("/dev/full", os.O_WRONLY)

    with Full(tmp_path) as store, pytest.raises(FormatError, match=r"pack-a0-00000-0000.*No space left.*Free space"):
        _write(store, "a0", (0,))


@pytest.mark.parametrize("save", ["", "A", "../x", "a" * 41, "a_b", "-a", 3])
def test_bad_save_names(save: str, tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store, pytest.raises(FormatError, match="save name"):
        Writer(store, LAYOUT, save=save)


def test_bad_meta(tmp_path: Path) -> None:
    deep: list = []
    for _ in range(50):
        deep = [deep]
    with LocalStore(tmp_path) as store:
        _write(store, "a0")
        for meta in ({"loss": float("nan")}, {"x": float("inf")}, {"x": object()}, {"x": deep}):
            with pytest.raises(FormatError, match="meta"):
                commit(store, LAYOUT, save="a0", meta=meta)
        assert not (tmp_path / "COMMIT").exists() and not (tmp_path / "root-a0.json").exists()


def test_many_files_few_descriptors(tmp_path: Path) -> None:
    layout = SaveLayout(
        tensors=tuple(Tensor(name=f"t{i}", dtype="int32", shape=(4, 6)) for i in range(150)), pack_bytes=1
    )
    with LocalStore(tmp_path) as store:
        Writer(store, layout, save="s").write({t.name: ARRAY for t in layout.tensors})
        commit(store, layout, save="s")
        before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
        reader = Reader(store)
        assert all(np.array_equal(reader.read(t.name), ARRAY) for t in layout.tensors)
        if before:
            assert len(os.listdir("/proc/self/fd")) - before <= 70
    if before:
        assert len(os.listdir("/proc/self/fd")) < before, "close closes"
