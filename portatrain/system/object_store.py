"""Names with bytes below a URL of an object store: what the record of a run there is made of.

Changes that must be one step are conditional puts, by the version that a read gave. Every error is a UserError that
names the object; requests are tried again for seconds, not for minutes, as whoever asks may hold a claim that runs out.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_format import FormatError, MissingFileError, StoreError
from portatrain.errors import StorageError, UserError
from portatrain.system import environment

SHORT_RETRY = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=15),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=3), "base": 2},
}
"""For the record of a run: whoever asks may hold a claim that runs out."""
RETRY = {
    "max_retries": 10,
    "retry_timeout": timedelta(seconds=300),
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=15), "base": 2},
}

"""For checkpoints."""
PART_BYTES = 32 << 20
Version = dict[str, str]


class Listed(NamedTuple):
    """An object: its name below the URL, and a text that changes with its content."""

    name: str
    tag: str


class Objects:
    """The objects below `url`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._store = connect(self.url, {"retry_config": SHORT_RETRY})
        self._api = obstore_module()

    def get(self, name: str) -> tuple[bytes, Version] | None:
        """(content, version); None where there is no such object."""
        with self._told(name, "to read it"):
            try:
                found = self._api.get(self._store, name)
                return bytes(found.bytes()), _version(found.meta)
            except FileNotFoundError:
                return None

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        with self._told(name, "to look at it"):
            try:
                self._api.head(self._store, name)
            except FileNotFoundError:
                return False
            return True

    def create(self, name: str, data: bytes) -> Version | None:
        """Write an object that is not there yet; its version, or None where there is one of other content."""
        return self._conditional(name, data, "create")

    def replace(self, name: str, data: bytes, version: Version) -> Version | None:
        """Write over that version; the new one, or None where it has been changed or removed since."""
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
                    do="Use a store that has them (S3, Google Cloud Storage, Azure): a claim must be one step.",
                ) from None
        return None if made is None else _version(made)

    def put(self, name: str, data: bytes | Path) -> None:
        """Write, whatever was there; a path is read as it is sent."""
        with self._told(name, "to write it"):
            self._api.put(self._store, name, data, max_concurrency=4)

    def fetch(self, name: str, path: Path) -> None:
        """Write an object to the file `path`, in parts: a request's time is limited. One that is replaced meanwhile is
        not what was asked for, and is asked for again."""
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

    def delete(self, name: str) -> None:
        """Remove it; nothing where it is not there."""
        with self._told(name, "to remove it"), contextlib.suppress(FileNotFoundError):
            self._api.delete(self._store, name)

    def below(self, prefix: str) -> list[Listed]:
        """The objects below `prefix`, such as 'attempts'."""
        with self._told(prefix, "to list it"):
            rows = [row for batch in self._api.list(self._store, prefix=prefix) for row in batch]
        return [Listed(row["path"], _tag(row)) for row in rows]

    def top(self) -> tuple[list[Listed], list[str]]:
        """(objects, folders) right below the URL."""
        with self._told("", "to list it"):
            found = self._api.list_with_delimiter(self._store)
        names = [p.rstrip("/").rpartition("/")[2] for p in found["common_prefixes"]]
        return [Listed(row["path"], _tag(row)) for row in found["objects"]], names

    def age_s(self, name: str, *, writable: bool = True) -> float:
        """Seconds since an object was written, by the store's own clock; `writable`: else by this machine's."""
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
        try:
            with explained(f"object {self.url}/{name}" if name else self.url, expected):
                yield
        except FormatError as error:
            mistake = isinstance(error, MissingFileError) or error.got == "no permission"
            kind = UserError if mistake else StorageError
            raise kind.of(error) from error


def _version(meta: Any) -> Version:
    return {k: meta[k] for k in ("e_tag", "version") if meta.get(k) is not None}


def _tag(row: Any) -> str:
    return f"{row['e_tag']} {row['size']} {row['last_modified'].timestamp()}"


def put_in_one_step(store: Any, name: str, data: bytes, mode: Any, retry: Mapping[str, Any]) -> Any:
    """A conditional put (`mode` as obstore has it): what the store says of the new object, or None where it did not
    take it, as another's is there. A store may take an object and its answer be lost: one with this very content is
    ours, so no two contents may be equal by chance.

    What a server refused with an error obstore sends again, but not a conditional put that got no answer at all: that
    is done here.
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
    """What the store says of the object `name`, if its content is `data`; else None."""
    with contextlib.suppress(FileNotFoundError):
        found = obstore_module().get(store, name)
        if bytes(found.bytes()) == data:
            return found.meta
    return None


@contextlib.contextmanager
def explained(what: str, expected: str) -> Iterator[None]:
    """Within it, what a store refuses is a FormatError that names the object."""
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
