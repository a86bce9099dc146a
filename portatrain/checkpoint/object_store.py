"""Checkpoints in an object store (s3://, gs://, az://), through obstore. The commit is a conditional put.

Credentials and regions come from the environment, as each cloud's own tools read them (AWS_*, GOOGLE_*, AZURE_*).
Requests that fail with a server's error or time out are tried again; what fails for good is one FormatError.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from checkpoints_format import FormatError, MissingFileError, StoreError
from checkpoints_format.store import FILE_NAME
from checkpoints_format.writer import COMMIT
from portatrain.checkpoint.locations import step_name, steps_of
from portatrain.errors import UserError

PART_BYTES = 16 << 20
"""Of an upload in parts; S3 allows 10,000 of them, which is more than any pack has."""
PARTS_AT_ONCE = 4
RETRY = {
    "max_retries": 10,
    "retry_timeout": timedelta(seconds=300),
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=15), "base": 2},
}
TIMEOUT_S = 60
"""Environment variable PORTATRAIN_STORE_TIMEOUT_S: how long one request may take before it is tried again."""


class ObjectStore:
    """See `checkpoints_format.Store`. url: s3://bucket/prefix and the like; options go to obstore as they are."""

    merge_gap_bytes = 1 << 20
    request_bytes = 16 << 20

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url.rstrip("/")
        self._store = _connect(self.url, options)

    def describe(self, name: str) -> str:
        return f"object {self.url}/{name}"

    def close(self) -> None:
        """Nothing is held open."""

    def put(self, name: str, chunks: Iterable[memoryview], nbytes: int, *, durable: bool = True) -> None:
        obstore = _obstore()
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
        obstore = _obstore()
        with self._explained(name, f"to write {len(data)} bytes"):
            try:
                done = in_one_step(self._store, self._checked(name), data, "create", RETRY)
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
            found = memoryview(_obstore().get_range(self._store, self._checked(name), start=offset, length=length))
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
                return int(_obstore().head(self._store, self._checked(name))["size"])
            except FileNotFoundError:
                return None

    def list(self) -> Iterator[str]:
        with self._explained("", "to list it"):
            names = [row["path"] for batch in _obstore().list(self._store) for row in batch]
        yield from sorted(n for n in names if "/" not in n)

    def delete(self, name: str) -> None:
        with self._explained(name, "to remove it"), contextlib.suppress(FileNotFoundError):
            _obstore().delete(self._store, self._checked(name))

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


def in_one_step(store: Any, name: str, data: bytes, mode: Any, retry: Mapping[str, Any]) -> Any:
    """A conditional put (`mode` as obstore has it): what the store says of the new object, or None where it did not
    take it, as another's is there. A store may take an object and its answer be lost: one with this very content is
    ours, so no two contents may be equal by chance.

    What a server refused with an error obstore sends again, but not a conditional put that got no answer at all: that
    is done here.
    """
    api = _obstore()
    errors = api.exceptions
    wait_s, longest_s = (retry["backoff"][k].total_seconds() for k in ("init_backoff", "max_backoff"))
    end_s = time.monotonic() + retry["retry_timeout"].total_seconds()
    while True:
        try:
            return api.put(store, name, data, mode=mode, use_multipart=False)
        except (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError):
            return _ours(store, name, data)
        except (errors.NotSupportedError, NotImplementedError):
            raise
        except errors.BaseError as error:
            if (found := _ours(store, name, data)) is not None:
                return found
            if "HTTP error" not in str(error) or time.monotonic() + wait_s > end_s:
                raise
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, longest_s)


def _ours(store: Any, name: str, data: bytes) -> Any:
    """What the store says of the object `name`, if its content is `data`; else None."""
    with contextlib.suppress(FileNotFoundError):
        found = _obstore().get(store, name)
        if bytes(found.bytes()) == data:
            return found.meta
    return None


@contextlib.contextmanager
def explained(what: str, expected: str) -> Iterator[None]:
    """Within it, what a store refuses is a FormatError that names the object."""
    obstore = _obstore()
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(what, expected=expected, got="no such object", do="Check the URL.") from error
    except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError) as error:
        raise StoreError(
            what, expected=expected, got="no permission", do="Check the credentials in the environment, and the bucket."
        ) from error
    except obstore.exceptions.BaseError as error:
        got = " ".join(str(error).partition("Debug source")[0].split())[:300]
        raise StoreError(
            what, expected=expected, got=got, do="Look at the store; checkpoints already committed are untouched."
        ) from error


def _parts(chunks: Iterable[memoryview]) -> Iterator[bytes]:
    """Copies, as a chunk is valid only until the next one: an upload sends several at once."""
    for chunk in chunks:
        yield bytes(chunk)


def _obstore() -> Any:
    try:
        import obstore
    except ImportError:
        raise UserError(
            "object stores",
            expected="obstore to be installed",
            got="no such package",
            do="pip install 'portatrain[remote]'",
        ) from None
    return obstore


def _connect(url: str, options: dict[str, Any]) -> Any:
    obstore = _obstore()
    timeout_s = float(os.environ.get("PORTATRAIN_STORE_TIMEOUT_S", TIMEOUT_S))
    given: dict[str, Any] = {
        "retry_config": RETRY,
        "client_options": {"timeout": timedelta(seconds=timeout_s), "connect_timeout": timedelta(seconds=10)},
        **options,
    }
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://") and url.startswith("s3://"):
        given["client_options"]["allow_http"] = True
    try:
        return obstore.store.from_url(url, **given)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise UserError(
            url,
            expected="s3://bucket/prefix, gs://bucket/prefix or az://account/container/prefix",
            got=" ".join(str(error).partition("Debug source")[0].split())[:200],
            do="Check the URL and the environment's credentials.",
        ) from error


class ObjectPlace:
    """See `portatrain.checkpoint.locations.Place`."""

    def __init__(self, url: str, **options: Any) -> None:
        self.name, self._options = url.rstrip("/"), options
        self._root = _connect(self.name, options)

    def steps(self) -> list[int]:
        with explained(self.name, "to list it"):
            found = _obstore().list_with_delimiter(self._root)
        return steps_of(p.rstrip("/").rpartition("/")[2] for p in found["common_prefixes"])

    def open(self, step: int, *, create: bool = False) -> ObjectStore:
        return ObjectStore(f"{self.name}/{step_name(step)}", **self._options)

    def committed(self, step: int) -> bool:
        return self.open(step).size(COMMIT) is not None

    def sizes(self, step: int) -> dict[str, int]:
        store = self.open(step)
        with explained(store.url, "to list it"):
            rows = [row for batch in _obstore().list(store._store) for row in batch]
        return {row["path"]: int(row["size"]) for row in rows}

    def commit(self, step: int) -> bytes:
        store = self.open(step)
        with explained(store.describe(COMMIT), "to read it"):
            return bytes(_obstore().get(store._store, COMMIT).bytes())

    def remove(self, step: int) -> None:
        store = self.open(step)
        store.delete(COMMIT)
        for name in list(store.list()):
            store.delete(name)
