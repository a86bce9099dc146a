"""Files of a source in an object store: found by a URL, a folder's URL or a glob, and read by ranges."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import io
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath

from portatrain.errors import UserError
from portatrain.system.object_store import Objects

BUFFER_BYTES = 4 << 20
"""The bytes of a request for a file that is read from its beginning on."""


class StoreFile:
    """An object of a store, with the members of a `Path` that sources use."""

    def __init__(self, objects: Objects, key: str) -> None:
        self._objects, self._key = objects, key

    def __str__(self) -> str:
        return f"{self._objects.url}/{self._key}"

    def __lt__(self, other: object) -> bool:
        return str(self) < str(other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreFile) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def suffix(self) -> str:
        return PurePosixPath(self._key).suffix

    @property
    def name(self) -> str:
        return PurePosixPath(self._key).name

    @cached_property
    def size(self) -> int:
        return self._objects.size(self._key)

    def beside(self, suffix: str) -> StoreFile:
        """Return the object of the same name with another suffix."""
        return StoreFile(self._objects, str(PurePosixPath(self._key).with_suffix(suffix)))

    def exists(self) -> bool:
        return self._objects.exists(self._key)

    def open(self, mode: str = "rb", buffering: int = BUFFER_BYTES) -> io.BufferedReader:
        """Return the object as a file that is read by ranges, of ``buffering`` bytes at least."""
        return io.BufferedReader(_Ranges(self._objects, self._key, self.size), buffering)

    def read_bytes(self) -> bytes:
        return self._objects.range(self._key, 0, self.size)

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        """Yield the path of a copy on disk, which is deleted at the end."""
        with tempfile.TemporaryDirectory(prefix="portatrain-") as folder:
            path = Path(folder) / "copy"
            self._objects.fetch(self._key, path)
            yield path


class _Ranges(io.RawIOBase):
    """An object as a file that can be read and sought; every read is a request."""

    def __init__(self, objects: Objects, key: str, size: int) -> None:
        self._objects, self._key, self._size, self._at = objects, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = self._objects.range(self._key, self._at, length)
        self._at += length
        return length


def find_remote(url: str, what: str) -> list[tuple[str, StoreFile]]:
    """Return the objects at ``url``, (name, file): an object, all objects below a folder, or those of a glob.

    Raises UserError if there is none.
    """
    scheme, _, rest = url.partition("://")
    parts = rest.rstrip("/").split("/")
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if not fixed or (fixed == len(parts) == 1 and not parts[0]):
        raise UserError(
            what, expected="a URL with a bucket", got=repr(url), do="Write it out, as in s3://bucket/folder."
        )
    if fixed == len(parts) > 1:
        above = Objects(f"{scheme}://{'/'.join(parts[:-1])}")
        if above.exists(parts[-1]):
            return [(parts[-1], StoreFile(above, parts[-1]))]
    root = Objects(f"{scheme}://{'/'.join(parts[:fixed])}")
    patterns = tuple(parts[fixed:])
    keys = sorted(one.name for one in root.below("") if one.name)
    found = [key for key in keys if not patterns or matches(tuple(key.split("/")), patterns)]
    if not found:
        raise UserError(
            what,
            expected="an object, a folder with objects, or a glob that matches some",
            got=f"{url!r}, where there is none",
            do="Check the URL.",
        )
    return [(key, StoreFile(root, key)) for key in found]


def matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Return whether the parts of a name match those of a glob, by the rules for files on disk."""
    if not patterns or not parts:
        return not patterns and not parts
    head, *rest = patterns
    if head == "**":
        for deep in range(len(parts)):
            if deep and parts[deep - 1][0:1] == ".":
                return False
            if matches(parts[deep:], tuple(rest) or ("*",)):
                return True
        return False
    hidden = parts[0][0:1] == "." and head[0] != "."
    return not hidden and fnmatch.fnmatchcase(parts[0], head) and matches(parts[1:], tuple(rest))
