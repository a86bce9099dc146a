"""Where a checkpoint's files live: a small protocol, and local disk.

A store has objects, written once and read by range. Nothing is decided by listing or renaming. The one
atomic operation is ``put_if_absent``; object stores have it as a conditional put.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from .direct import Direct
from .errors import FormatError, MissingFileError, StoreError, shorten

# One name, no folders: nothing in a checkpoint can point out of it.
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=-]{0,199}")
_OPEN_FILES = 64
_IOV_MAX = 1024


@runtime_checkable
class Store(Protocol):
    """A flat set of named objects under one prefix. Safe to use from several threads."""

    #: Gaps up to this many bytes between wanted ranges are read too, rather than asked around.
    merge_gap_bytes: int
    #: What one read asks for where more is wanted: enough to pay for the request.
    request_bytes: int

    def put(self, name: str, chunks: Iterable[memoryview], nbytes: int, *, durable: bool = True) -> None:
        """Write an object that must not exist yet; visible to all when this returns, and durable if asked.

        A chunk is only valid until the next one is asked for. The chunks add up to ``nbytes``.
        """

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a small object whole and durably, or not at all; False if the name is taken."""

    def read_into(self, name: str, offset: int, views: Sequence[memoryview]) -> None:
        """Fill the views, one after the other, from ``offset`` on; all or an error."""

    def size(self, name: str) -> int | None:
        """Bytes of an object, or None if there is none."""

    def list(self) -> Iterator[str]:
        """Names, for housekeeping and messages only; may lag behind."""

    def delete(self, name: str) -> None:
        """Remove an object; it is no error if there is none."""

    def describe(self, name: str) -> str:
        """What to call an object in a message, such as its path."""

    def close(self) -> None:
        """Give back what it holds; the store is of no use afterwards."""


def read_small(store: Store, name: str, limit: int) -> bytes:
    """All of an object of at most ``limit`` bytes.

    Raises:
        MissingFileError: there is none. FormatError: it is larger.
    """
    size = store.size(name)
    if size is None:
        raise MissingFileError(store.describe(name), expected="the file", got="none", do=_RESTORE)
    if size > limit:
        raise FormatError(store.describe(name), expected=f"at most {limit} bytes", got=f"{size}", do=_RESTORE)
    data = bytearray(size)
    if size:
        store.read_into(name, 0, [memoryview(data)])
    return bytes(data)


_RESTORE = "The checkpoint is damaged or incomplete: restore from another one."


class LocalStore:
    """A directory on a local or network file system.

    Files are opened relative to the directory's descriptor, never through a symbolic link, and only if
    they are regular files. Writes are followed by fsync of the file and of the directory.

    Args:
        path: the checkpoint's directory.
        create: make it (and its parents) if it is not there; otherwise it must exist.

    Raises:
        FormatError: the directory is missing or may not be opened.
    """

    merge_gap_bytes = 0
    request_bytes = 4 << 20  # much larger ones leave the cores' caches before they are checked and placed

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._busy: dict[int, int] = {}
        with _explained(f"checkpoint folder {self.path}", "a folder that can be opened"):
            if create:
                _make_durably(self.path)
            self._dir = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors; the store is of no use afterwards."""
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()
            if self._dir >= 0:
                os.close(self._dir)
                self._dir = -1

    def describe(self, name: str) -> str:
        """The path of a file."""
        return f"file {self.path / shorten(name, 200).strip(chr(39))}"

    def put(self, name: str, chunks: Iterable[memoryview], nbytes: int, *, durable: bool = True) -> None:
        """See ``Store.put``. A file that fails half-way is removed where that is possible."""
        with _explained(self.describe(name), f"to write {nbytes} bytes"):
            fd = self._create(name)
            try:
                written, direct = 0, Direct(fd)
                for chunk in chunks:
                    for part in direct.parts(chunk, written):
                        try:
                            self._write(fd, part)
                        except OSError as error:
                            if not direct.refused(error):
                                raise
                            os.lseek(fd, written, os.SEEK_SET)
                            self._write(fd, part)
                        written += len(part)
                if written != nbytes:
                    raise FormatError(
                        self.describe(name),
                        expected=f"{nbytes} bytes to write",
                        got=f"{written}",
                        do="This is a defect of the writer: report it.",
                    )
                if durable:
                    self._sync(fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._dir)
                raise
            finally:
                os.close(fd)
            if durable:
                self._sync(self._dir)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See ``Store.put_if_absent``: a finished temporary file is hard-linked to the name."""
        with _explained(self.describe(name), f"to write {len(data)} bytes"):
            self._check(name)
            temporary = f"tmp-{os.getpid()}-{secrets.token_hex(8)}"
            fd = self._create(temporary)
            try:
                try:
                    self._write(fd, memoryview(data))
                    self._sync(fd)
                finally:
                    os.close(fd)
                try:
                    self._link(temporary, name)
                except FileExistsError:
                    return False
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self._dir)
            self._sync(self._dir)
            return True

    def read_into(self, name: str, offset: int, views: Sequence[memoryview]) -> None:
        """See ``Store.read_into``; positional reads, no mapping."""
        with _explained(self.describe(name), "to read it"), self._reading(name) as fd:
            pending = [v.cast("B") for v in views if v.nbytes]
            while pending:
                got = os.preadv(fd, pending[:_IOV_MAX], offset)
                if got == 0:
                    raise FormatError(
                        self.describe(name), expected=f"bytes at {offset}", got="the end of the file", do=_RESTORE
                    )
                offset += got
                while pending and got >= len(pending[0]):
                    got -= len(pending.pop(0))
                if got:
                    pending[0] = pending[0][got:]

    def size(self, name: str) -> int | None:
        """See ``Store.size``."""
        with _explained(self.describe(name), "to look at it"):
            try:
                with self._reading(name) as fd:
                    return os.fstat(fd).st_size
            except FileNotFoundError:
                return None

    def list(self) -> Iterator[str]:
        """See ``Store.list``."""
        with _explained(f"checkpoint folder {self.path}", "to list it"):
            yield from sorted(os.listdir(self._dir))

    def delete(self, name: str) -> None:
        """See ``Store.delete``."""
        with _explained(self.describe(name), "to remove it"):
            self._check(name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._dir)

    # The operations that change the disk, one each, so that a test can stop the world at any of them.

    def _create(self, name: str) -> int:
        self._check(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, 0o666, dir_fd=self._dir)

    def _write(self, fd: int, chunk: memoryview) -> None:
        chunk = chunk.cast("B")
        while chunk:
            chunk = chunk[os.write(fd, chunk) :]

    def _sync(self, fd: int) -> None:
        os.fsync(fd)

    def _link(self, temporary: str, name: str) -> None:
        os.link(temporary, name, src_dir_fd=self._dir, dst_dir_fd=self._dir, follow_symlinks=False)

    def _check(self, name: str) -> None:
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise FormatError(
                f"file name {shorten(name)}",
                expected="letters, digits and _.=- in one part",
                got="something else",
                do=_RESTORE,
            )

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[int]:
        """A descriptor to read from; kept open for the next time, the least recently used closed."""
        with self._lock:
            fd = self._open.pop(name, None)
            if fd is None:
                self._check(name)
                # O_NONBLOCK: a pipe by that name must not make us wait.
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._dir)
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    os.close(fd)
                    raise FormatError(
                        self.describe(name), expected="a regular file", got="another kind of file", do=_RESTORE
                    )
            self._open[name] = fd
            self._busy[fd] = self._busy.get(fd, 0) + 1
            idle = [n for n, f in self._open.items() if f not in self._busy]
            for old in idle[: max(0, len(self._open) - _OPEN_FILES)]:
                os.close(self._open.pop(old))
        try:
            yield fd
        finally:
            with self._lock:
                self._busy[fd] -= 1
                if not self._busy[fd]:
                    del self._busy[fd]


def _make_durably(path: Path) -> None:
    """mkdir -p, with fsync of every folder that gains one: a new folder is lost otherwise."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fd = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


_ADVICE = {
    errno.ENOSPC: "Free space or choose another folder; checkpoints already committed are untouched.",
    errno.EDQUOT: "Free space within your quota or choose another folder; committed checkpoints are untouched.",
    errno.EACCES: "Ask for permission on that folder, or choose another.",
    errno.EPERM: "Ask for permission on that folder, or choose another.",
    errno.EROFS: "The file system is mounted read-only: choose another folder.",
    errno.EEXIST: "Another process writes under the same save name: give each attempt a name of its own.",
    errno.ELOOP: "It is a symbolic link, which a checkpoint may not contain: copy the file itself.",
    errno.ENOENT: "Check the path.",
}


@contextlib.contextmanager
def _explained(what: str, expected: str) -> Iterator[None]:
    """Turn what the operating system says into a FormatError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(
            what, expected=expected, got="no such file or folder", do=_ADVICE[errno.ENOENT]
        ) from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        do = _ADVICE.get(error.errno or 0, "Look at the storage; checkpoints already committed are untouched.")
        kind = FormatError if error.errno == errno.ELOOP else StoreError
        raise kind(what, expected=expected, got=reason, do=do) from error
