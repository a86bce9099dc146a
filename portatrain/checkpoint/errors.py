"""Errors of the checkpoint format, as errors that a command prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from checkpoints_format import FormatError
from portatrain.errors import UserError


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Within it, what is wrong with a checkpoint is a UserError."""
    try:
        yield
    except FormatError as error:
        raise UserError.of(error) from error
