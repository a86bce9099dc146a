"""Object stores: reading, writing and listing the objects below a URL, with conditional writes.

Atomic changes are conditional puts, which name the version that was read. Every error is a UserError that names the
object. Requests for a run's record are retried for seconds only, because the caller may hold a claim that expires.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_format import FormatError, MissingFileError, NoBucketError, StoreError
from portatrain.errors import StorageError, UserError
from portatrain.system import environment

SHORT_RETRY = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=15),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=3), "base": 2},
}
"""Retries for a run's record: short, because the caller may hold a claim that expires."""
RETRY = {
    "max_retries": 10,
    "retry_timeout": timedelta(seconds=300),
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=15), "base": 2},
}
"""Retries for checkpoints."""
NO_BUCKET = "NoSuchBucket|ContainerNotFound|bucket does not exist"
"""How S3, Azure and Google say so in a listing."""
PART_BYTES = 32 << 20
Version = dict[str, str]
_worked: set[tuple[str, str]] = set()
"""What this process has done below each URL: 'read', 'write'."""


class Listed(NamedTuple):
    """An object in a listing: its name below the URL, and a tag that changes with its content."""

    name: str
    tag: str


class Objects:
    """The objects below `url`."""

    def __init__(self, url: str, retry: Mapping[str, Any] = SHORT_RETRY) -> None:
        self.url = url.rstrip("/")
        self._store = connect(self.url, {"retry_config": retry})
        self._api = obstore_module()

    def get(self, name: str) -> tuple[bytes, Version] | None:
        """Return (content, version) of an object, or None if it does not exist."""
        with self._told(name, "to read it"):
            try:
                found = self._api.get(self._store, name)
                return bytes(found.bytes()), _version(found.meta)
            except FileNotFoundError:
                return None

    def exists(self, name: str) -> bool:
        """Return True if the object exists."""
        with self._told(name, "to look at it"):
            try:
                self._api.head(self._store, name)
            except FileNotFoundError:
                return False
            return True

    def create(self, name: str, data: bytes) -> Version | None:
        """Write a new object and return its version, or None if one with other content exists."""
        return self._conditional(name, data, "create")

    def replace(self, name: str, data: bytes, version: Version) -> Version | None:
        """Replace that version of an object and return the new version, or None if it has changed since."""
        return self._conditional(name, data, version)

    def _conditional(self, name: str, data: bytes, mode: Any) -> Version | None:
        with self._told(name, "to write it"):
            try:
                made = put_in_one_step(self._store, name, data, mode, SHORT_RETRY)
            except (self._api.exceptions.NotSupportedError, NotImplementedError):
                raise UserError(
                    f"object {self.url}/{name}",
                    expected="a store with conditional writes",
                    got="one without",
                    do="Use S3, Google Cloud Storage or Azure: a claim needs conditional writes.",
                ) from None
        return None if made is None else _version(made)

    def put(self, name: str, data: bytes | Path) -> None:
        """Write an object, replacing any old one. The content of a path is read while it is sent."""
        with self._told(name, "to write it"):
            self._api.put(self._store, name, data, max_concurrency=4)

    def fetch(self, name: str, path: Path) -> None:
        """Download an object to the file `path`, in parts, since the duration of a request is limited.

        If the object is replaced during the download, the download starts again.
        """
        with self._told(name, "to read it"), path.open("wb") as file:
            while True:
                meta = self._api.head(self._store, name)
                if meta["size"] <= PART_BYTES:  # one request, one version
                    file.write(self._api.get(self._store, name).bytes())
                    return
                for start in range(0, meta["size"], PART_BYTES):
                    length = min(PART_BYTES, meta["size"] - start)
                    file.write(self._api.get_range(self._store, name, start=start, length=length))
                if self._api.head(self._store, name)["e_tag"] == meta["e_tag"]:
                    return
                file.seek(0)
                file.truncate()

    def size(self, name: str) -> int:
        """Return the bytes of an object. Raises UserError if it does not exist."""
        with self._told(name, "to look at it"):
            return int(self._api.head(self._store, name)["size"])

    def range(self, name: str, start: int, length: int) -> bytes:
        """Return bytes [start, start + length) of an object."""
        with self._told(name, "to read it"):
            return bytes(self._api.get_range(self._store, name, start=start, length=length)) if length else b""

    def delete(self, name: str) -> None:
        """Remove an object; do nothing if it does not exist."""
        with self._told(name, "to remove it"), contextlib.suppress(FileNotFoundError):
            self._api.delete(self._store, name)

    def below(self, prefix: str) -> list[Listed]:
        """Return the objects below `prefix`, such as 'attempts'."""
        with self._told(prefix, "to list it"):
            rows = [row for batch in self._api.list(self._store, prefix=prefix) for row in batch]
        return [Listed(row["path"], _tag(row)) for row in rows]

    def top(self) -> tuple[list[Listed], list[str]]:
        """Return (objects, folder names) directly below the URL."""
        with self._told("", "to list it"):
            found = self._api.list_with_delimiter(self._store)
        names = [p.rstrip("/").rpartition("/")[2] for p in found["common_prefixes"]]
        return [Listed(row["path"], _tag(row)) for row in found["objects"]], names

    def age_s(self, name: str, *, writable: bool = True) -> float:
        """Return the seconds since an object was written, or 0 if it does not exist.

        It compares with the clock of the store, by writing a small object, or with this machine's clock if `writable`
        is false or the write fails.
        """
        from datetime import UTC, datetime

        with self._told(name, "to look at it"):
            try:
                then = self._api.head(self._store, name)["last_modified"]
            except FileNotFoundError:
                return 0.0
        if writable:
            probe = f"clock/{secrets.token_hex(8)}"
            with contextlib.suppress(UserError), self._told(probe, "to write it"):
                self._api.put(self._store, probe, b"")
                now = self._api.head(self._store, probe)["last_modified"]
                self._api.delete(self._store, probe)
                return (now - then).total_seconds()
        return (datetime.now(UTC) - then).total_seconds()

    @contextlib.contextmanager
    def _told(self, name: str, expected: str) -> Iterator[None]:
        # Credentials that have worked in this process may expire or be rotated: that is no mistake of the user.
        did = ("write" if expected in ("to write it", "to remove it") else "read", self.url)
        try:
            with explained(f"object {self.url}/{name}" if name else self.url, expected):
                yield
        except FormatError as error:
            never = error.got == "no permission" or isinstance(error, NoBucketError)
            refused = never and did not in _worked
            kind = UserError if refused or isinstance(error, MissingFileError) else StorageError
            raise kind.of(error) from error
        _worked.add(did)


def _version(meta: Any) -> Version:
    return {k: meta[k] for k in ("e_tag", "version") if meta.get(k) is not None}


def _tag(row: Any) -> str:
    return f"{row['e_tag']} {row['size']} {row['last_modified'].timestamp()}"


def put_in_one_step(store: Any, name: str, data: bytes, mode: Any, retry: Mapping[str, Any]) -> Any:
    """Put an object conditionally (`mode` as in obstore); return the store's answer, or None if another object exists.

    A store may write the object while its answer is lost. An object with exactly this content therefore counts as ours,
    so callers must never write the same content twice by chance.

    obstore retries requests that the server answered with an error. This function also retries a conditional put that
    got no answer.

    """
    api = obstore_module()
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
    """Return the store's metadata of the object `name` if its content is `data`; otherwise None."""
    with contextlib.suppress(FileNotFoundError):
        found = obstore_module().get(store, name)
        if bytes(found.bytes()) == data:
            return found.meta
    return None


@contextlib.contextmanager
def explained(what: str, expected: str) -> Iterator[None]:
    """Convert the store's errors, while entered, to a FormatError that names the object."""

    obstore = obstore_module()
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(what, expected=expected, got="no such object", do="Check the URL.") from error
    except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError) as error:
        raise StoreError(
            what, expected=expected, got="no permission", do="Check the credentials in the environment, and the bucket."
        ) from error
    except obstore.exceptions.BaseError as error:
        if re.search(NO_BUCKET, str(error)):
            do = "Check the name of the bucket, and the account."
            raise NoBucketError(what, expected=expected, got="no such bucket", do=do) from error
        got = " ".join(str(error).partition("Debug source")[0].split())[:300]
        raise StoreError(
            what, expected=expected, got=got, do="Look at the store; checkpoints already committed are untouched."
        ) from error


def obstore_module() -> Any:
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


def connect(url: str, options: dict[str, Any]) -> Any:
    obstore = obstore_module()
    timeout_s = environment.STORE_TIMEOUT_S.get()
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
