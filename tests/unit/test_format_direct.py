"""Slabs and direct writes: the bytes are those of a file written as ever, whatever the sizes and the file system."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpoints_format import FormatError, LocalStore, Reader, SaveLayout, Tensor, Writer, commit
from checkpoints_format.direct import PAGE, Direct, aligned
from checkpoints_format.slabs import Slabs

# Runs of several entries, tiles at edges, a scalar: 22 MiB, so that slabs of 8 MiB take turns.
LAYOUT = SaveLayout(
    tensors=(
        Tensor(name="a", dtype="float32", shape=(1000, 2001)),
        Tensor(name="b", dtype="bfloat16", shape=(7, 999, 1024), batch=1),
        Tensor(name="c", dtype="int32", shape=()),
    )
)


def _arrays() -> dict[str, np.ndarray]:
    from checkpoints_format.dtypes import NUMPY

    draw = np.random.default_rng(0)
    return {t.name: np.frombuffer(draw.bytes(t.nbytes), NUMPY[t.dtype]).reshape(t.shape) for t in LAYOUT.tensors}


def _saved(store: LocalStore) -> bytes:
    with store:
        Writer(store, LAYOUT, save="s").write(_arrays())
        commit(store, LAYOUT, save="s")
        reader = Reader(store)
        assert all(reader.read(n).tobytes() == a.tobytes() for n, a in _arrays().items())
        reader.verify_all()
    return b"".join(path.read_bytes() for path in sorted(store.path.glob("pack-*")))


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


class Watched(LocalStore):
    """Notes how each write is made, and in which memory and place."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, create=True)
        self.direct: list[bool] = []

    def _write(self, fd: int, chunk: memoryview) -> None:
        self.direct.append(_is_direct(fd))
        if self.direct[-1]:
            begins = np.frombuffer(chunk, np.uint8).ctypes.data
            assert begins % PAGE == len(chunk) % PAGE == os.lseek(fd, 0, os.SEEK_CUR) % PAGE == 0
        super()._write(fd, chunk)


@pytest.fixture
def on_a_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder whose file system takes direct writes; a RAM disk takes the flag and copies all the same."""
    monkeypatch.setattr("checkpoints_format.direct.os.major", lambda device: 8)
    fd = os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)
        os.write(fd, aligned(PAGE).data)
    except OSError:
        pytest.skip("this file system has no direct writes")
    finally:
        os.close(fd)
    return tmp_path


def test_all_but_the_end_of_a_file_is_written_directly(on_a_disk: Path) -> None:
    store = Watched(on_a_disk / "direct")
    found = _saved(store)
    assert sum(store.direct) >= 2 and not all(store.direct)
    again = Watched(on_a_disk / "as ever")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("checkpoints_format.direct.os.major", lambda device: 0)
        assert _saved(again) == found
    assert not any(again.direct)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("written", [0, PAGE])
def test_a_file_system_that_takes_the_flag_and_no_write(on_a_disk: Path, code: int, written: int) -> None:
    class Refusing(Watched):
        def _write(self, fd: int, chunk: memoryview) -> None:
            if _is_direct(fd):
                self.direct.append(True)
                os.write(fd, chunk[:written])
                raise OSError(code, os.strerror(code))
            super()._write(fd, chunk)

    expected = _saved(LocalStore(on_a_disk / "expected", create=True))
    store = Refusing(on_a_disk / "refusing")
    assert _saved(store) == expected
    assert sum(store.direct) == len(list(store.path.glob("pack-*")))  # tried once a file


def test_a_full_disk_is_told_from_a_refusal(on_a_disk: Path) -> None:
    class Full(LocalStore):
        def _write(self, fd: int, chunk: memoryview) -> None:
            if _is_direct(fd):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super()._write(fd, chunk)

    with Full(on_a_disk / "full", create=True) as store, pytest.raises(FormatError, match=r"pack-s.*No space"):
        Writer(store, LAYOUT, save="s").write(_arrays())
    assert not list((on_a_disk / "full").glob("pack-*"))


def test_what_has_no_device_is_written_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints_format.direct.os.major", lambda device: 0)
    with (tmp_path / "f").open("wb") as file:
        direct, chunk = Direct(file.fileno()), aligned(2 << 20).data
        assert [len(part) for part in direct.parts(chunk, 0)] == [2 << 20] and not _is_direct(file.fileno())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("slab", [1, 100, PAGE, 3 * PAGE + 5])
def test_slabs_give_out_what_was_filled_in(slab: int, seed: int) -> None:
    """In order, at page lines, and never memory that is being filled while it is written."""
    draw, slabs, filled = random.Random(seed), Slabs(slab), bytearray()

    def chunks() -> Iterator[memoryview]:
        for _ in range(60):
            data = draw.randbytes(draw.choice((0, 1, draw.randint(0, slab), draw.randint(0, 5 * slab))))
            filled.extend(data)
            if len(data) <= slab and draw.random() < 0.6:
                yield from slabs.room(len(data))
                slabs.take(len(data))[:] = np.frombuffer(data, np.uint8)
            else:
                yield from slabs.copy(np.frombuffer(data, np.uint8))
        yield slabs.rest()

    out, coming = bytearray(), chunks()
    now = next(coming)
    while True:
        following = next(coming, None)  # filled while `now` is not written yet
        if following is None:
            out.extend(now)
            break
        assert slab < PAGE or (len(now) % PAGE == 0 and np.frombuffer(now, np.uint8).ctypes.data % PAGE == 0)
        out.extend(now)
        now = following
    assert out == filled
