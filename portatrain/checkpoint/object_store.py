"""Store checkpoints in an object store (s3://, gs://, az://), through obstore. The commit is a conditional put.

Credentials and regions come from the environment, as each cloud's own tools read them (AWS_*, GOOGLE_*, AZURE_*).
Requests that time out or fail with a server's error are tried again; a lasting failure is one FormatError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from checkpoints_format import FormatError
from checkpoints_format.store import FILE_NAME
from portatrain.system.object_store import RETRY, connect, explained, obstore_module, put_in_one_step

PART_BYTES = 16 << 20
"""The size of one part of an upload. S3 allows 10,000 parts, which is more than any pack has."""

PARTS_AT_ONCE = 4


class ObjectStore:
    """See `checkpoints_format.Store`. url: s3://bucket/prefix and the like; obstore gets the options unchanged."""

    merge_gap_bytes = 1 << 20
    request_bytes = 16 << 20

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url.rstrip("/")
        self._store = connect(self.url, options)

    def describe(self, name: str) -> str:
        return f"object {self.url}/{name}"

    def close(self) -> None:
        """Do nothing: the store holds nothing open."""

    def put(self, name: str, chunks: Iterable[memoryview], nbytes: int, *, durable: bool = True) -> None:
        obstore = obstore_module()
        with self._explained(name, f"to write {nbytes} bytes"):
            obstore.put(
                self._store, self._checked(name), _parts(chunks), chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE
            )
            found = obstore.head(self._store, name)["size"]
        if found != nbytes:
            raise FormatError(
                self.describe(name), expected=f"{nbytes} bytes written", got=f"{found}", do="Look at the store."
            )

    def put_if_absent(self, name: str, data: bytes) -> bool:
        obstore = obstore_module()
        with self._explained(name, f"to write {len(data)} bytes"):
            try:
                done = put_in_one_step(self._store, self._checked(name), data, "create", RETRY)
            except (obstore.exceptions.NotSupportedError, NotImplementedError) as error:
                raise FormatError(
                    self.describe(name),
                    expected="a store with conditional writes",
                    got=str(error),
                    do="Use a store that has them: a commit must be one step.",
                ) from error
        return done is not None

    def read_into(self, name: str, offset: int, views: Sequence[memoryview]) -> None:
        pending = [v.cast("B") for v in views if v.nbytes]
        length = sum(len(v) for v in pending)
        if not length:
            return
        with self._explained(name, "to read it"):
            found = memoryview(
                obstore_module().get_range(self._store, self._checked(name), start=offset, length=length)
            )
        if len(found) != length:
            raise FormatError(
                self.describe(name),
                expected=f"{length} bytes at {offset}",
                got=f"{len(found)}",
                do="The checkpoint is damaged or incomplete: restore from another one.",
            )
        at = 0
        for view in pending:
            view[:] = found[at : at + len(view)]
            at += len(view)

    def size(self, name: str) -> int | None:
        with self._explained(name, "to look at it"):
            try:
                return int(obstore_module().head(self._store, self._checked(name))["size"])
            except FileNotFoundError:
                return None

    def list(self) -> Iterator[str]:
        yield from sorted(n for n in self.sizes() if "/" not in n)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every object below the URL, by name."""
        with self._explained("", "to list it"):
            return {row["path"]: int(row["size"]) for batch in obstore_module().list(self._store) for row in batch}

    def folders(self) -> Iterable[str]:
        """Return the names of the prefixes right below the URL."""
        with self._explained("", "to list it"):
            found = obstore_module().list_with_delimiter(self._store)
        return [p.rstrip("/").rpartition("/")[2] for p in found["common_prefixes"]]

    def read(self, name: str) -> bytes:
        """Return the whole content of an object."""
        with self._explained(name, "to read it"):
            return bytes(obstore_module().get(self._store, self._checked(name)).bytes())

    def delete(self, name: str) -> None:
        with self._explained(name, "to remove it"), contextlib.suppress(FileNotFoundError):
            obstore_module().delete(self._store, self._checked(name))

    def _checked(self, name: str) -> str:
        if not FILE_NAME.fullmatch(name):
            raise FormatError(
                f"object name {name!r}",
                expected="letters, digits and _.=- in one part",
                got="something else",
                do="The checkpoint is damaged or incomplete: restore from another one.",
            )
        return name

    @contextlib.contextmanager
    def _explained(self, name: str, expected: str) -> Iterator[None]:
        with explained(self.describe(name) if name else self.url, expected):
            yield


def _parts(chunks: Iterable[memoryview]) -> Iterator[bytes]:
    """Yield copies of chunks. A chunk is valid only until the next one, and an upload sends several at once."""
    for chunk in chunks:
        yield bytes(chunk)
