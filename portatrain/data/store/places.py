"""Where a packed store lies: a folder, or below a URL of an object store."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Protocol

from portatrain.data.store.layout import MANIFEST, Manifest, parse
from portatrain.errors import UserError, storage_error
from portatrain.system import json_files
from portatrain.system.object_store import RETRY, Objects
from portatrain.system.paths import expand
from portatrain.system.urls import is_remote

UNFINISHED = "unfinished"
"""The folder in a store that is not whole yet: the claim on it, and how far it is."""


class Place(Protocol):
    """The files of one store, by name. Errors are OSError or UserError; StorageError is one."""

    where: str

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return bytes [start, start + length) of a file, fewer if it ends before. May be called by several threads."""
        ...

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        ...

    def get(self, name: str) -> bytes | None:
        """Return a file, or None if there is none."""
        ...

    def commit(self, name: str, data: bytes) -> None:
        """Write a small file whole or not at all."""
        ...

    def forget(self, name: str) -> None:
        """Close what is held open of a file, so that the next read opens it anew."""
        ...

    def names(self) -> set[str]:
        """Return the names of the files, without those in folders."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...


class _Handle:
    """An open file. It is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.number)


class Folder:
    """A store in a folder. It keeps up to OPEN files open."""

    OPEN = 64

    def __init__(self, where: str | Path) -> None:
        self.path = Path(os.path.abspath(expand(where)))
        self.where = str(self.path)
        self._open: dict[str, _Handle] = {}
        self._lock = threading.Lock()

    def read(self, name: str, start: int, length: int) -> bytes:
        with self._lock:
            handle = self._open.pop(name, None)
        if handle is None:
            handle = _Handle(self.path / name)
        with self._lock:
            self._open[name] = handle
            while len(self._open) > self.OPEN:
                del self._open[next(iter(self._open))]
        parts, at = [], start
        while at < start + length:
            part = os.pread(handle.number, start + length - at, at)
            if not part:
                break
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def get(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def commit(self, name: str, data: bytes) -> None:
        json_files.write_text(self.path / name, data.decode())

    def forget(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)

    def names(self) -> set[str]:
        return {entry.name for entry in os.scandir(self.path) if entry.is_file()}

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


class Bucket:
    """A store below a URL."""

    def __init__(self, where: str) -> None:
        self.where = where.rstrip("/")
        self.objects = Objects(self.where, RETRY)

    def read(self, name: str, start: int, length: int) -> bytes:
        return self.objects.range(name, start, length)

    def size(self, name: str) -> int:
        return self.objects.size(name)

    def get(self, name: str) -> bytes | None:
        found = self.objects.get(name)
        return None if found is None else found[0]

    def commit(self, name: str, data: bytes) -> None:
        self.objects.put(name, data)

    def forget(self, name: str) -> None:
        pass

    def names(self) -> set[str]:
        return {one.name for one in self.objects.top()[0]}

    def remove(self, name: str) -> None:
        self.objects.delete(name)


def place(where: str) -> Folder | Bucket:
    """Return the place of a path or URL. Nothing is read."""
    return Bucket(where) if is_remote(where) else Folder(where)


def manifest(at: Place) -> Manifest | None:
    """Return what a store says of itself, or None if there is no whole store. Raises UserError if it is damaged."""
    try:
        data = at.get(MANIFEST)
    except OSError as error:
        raise storage_error(error) or UserError(
            f"packed store {at.where}",
            expected=f"a {MANIFEST} that can be read",
            got=error.strerror or str(error),
            do="Correct its permissions, or name another store.",
        ) from error
    return None if data is None else parse(at.where, data)


def required(at: Place) -> Manifest:
    """Return what a store says of itself. Raises UserError if there is none."""
    found = manifest(at)
    if found is None:
        begun = isinstance(at, Folder) and (at.path / UNFINISHED).is_dir()
        raise UserError(
            f"packed store {at.where}",
            expected=f"a folder or a URL with a {MANIFEST}",
            got="a store that is not whole yet" if begun else "none there",
            do=f"Go on with the same command: portatrain data pack ... {at.where}"
            if begun
            else "Check the path; `portatrain data pack RECIPE OUT` makes a store.",
        )
    return found
