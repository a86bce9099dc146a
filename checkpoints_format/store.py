"""`Store`, a protocol for the storage of a checkpoint's files, and `LocalStore`, a directory.

A store has objects that are written once and read by range. The format never depends on listing or renaming. Its only
atomic operation is ``put_if_absent``, which object stores offer as a conditional put.
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

    #: Maximum gap, in bytes, between wanted ranges that is read too, instead of making another request.
    merge_gap_bytes: int
    #: Bytes per request for large reads, enough to outweigh the cost of a request.
    request_bytes: int

    def put(self, name: str, chunks: Iterable[memoryview], nbytes: int, *, durable: bool = True) -> None:
        """Write an object that does not exist yet.

        When it returns, the object is visible to all and, if ``durable``, on stable storage. The chunks add up to
        ``nbytes``; each is valid only until the next one is requested.
        """

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a small object atomically and durably; return False if the name exists already."""

    def read_into(self, name: str, offset: int, views: Sequence[memoryview]) -> None:
        """Fill all views, one after the other, with the bytes from ``offset`` on. Raises if the object is too short."""

    def size(self, name: str) -> int | None:
        """Return the bytes of an object, or None if it does not exist."""

    def list(self) -> Iterator[str]:
        """Yield the names of the objects, for cleanup and messages only: recent changes may be missing."""

    def delete(self, name: str) -> None:
        """Remove an object; do nothing if it does not exist."""

    def describe(self, name: str) -> str:
        """Return the description of an object for messages, such as its path."""

    def close(self) -> None:
        """Release all resources. The store cannot be used afterwards."""


def read_small(store: Store, name: str, limit: int) -> bytes:
    """Return the contents of an object of at most ``limit`` bytes.

    Raises:
        MissingFileError: the object does not exist.
        FormatError: the object is larger.
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
        create: create it and its parents if it does not exist; otherwise it must exist.

    Raises:
        FormatError: the directory is missing or may not be opened.
    """

    merge_gap_bytes = 0
    request_bytes = 4 << 20  # larger requests leave the CPU caches before they are checked and copied

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
        """Close all descriptors. The store cannot be used afterwards."""
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()
            if self._dir >= 0:
                os.close(self._dir)
                self._dir = -1

    def describe(self, name: str) -> str:
        """Return the path of a file, for messages."""
        return f"file {self.path / shorten(name, 200).strip(chr(39))}"

    def put(self, name: str, chunks: Iterable[memoryview], nbytes: int, *, durable: bool = True) -> None:
        """See ``Store.put``. If writing fails half-way, the file is removed if possible."""
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
        """See ``Store.read_into``. It uses positional reads and no memory mapping."""
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

    # Each operation that changes the disk has its own method, so that a test can interrupt at any of them.

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
        """Open a file for reading. Descriptors stay open for later reads; the least recently used ones are closed."""
        with self._lock:
            fd = self._open.pop(name, None)
            if fd is None:
                self._check(name)
                # O_NONBLOCK: opening a pipe of that name must not block.
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
    """Create a folder and its parents, with fsync of every parent: a new folder could be lost otherwise."""
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
    """Convert errors of the operating system to a FormatError that names the file."""

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
