"""Turn errors of the checkpoint format into errors that a command prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from checkpoints_format import FormatError
from portatrain.errors import UserError


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raise any FormatError inside the context as a UserError."""
    try:
        yield
    except FormatError as error:
        raise UserError.of(error) from error
