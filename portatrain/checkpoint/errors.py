"""Turn errors of the checkpoint format into errors that a command prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from checkpoints_format import FormatError, NoBucketError, StoreError
from portatrain.errors import StorageError, UserError


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raise any FormatError inside the context as a UserError, or as a StorageError if the storage failed.

    A bucket that does not exist is a mistake in the URL.
    """
    try:
        yield
    except FormatError as error:
        failed = isinstance(error, StoreError) and not isinstance(error, NoBucketError)
        raise (StorageError if failed else UserError).of(error) from error
