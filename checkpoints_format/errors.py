"""The errors of the checkpoint format. Each message says how to correct the problem."""

from __future__ import annotations


class FormatError(Exception):
    """An invalid checkpoint, or an invalid request for one.

    Args:
        what: the tensor and the file at fault.
        expected: the valid values.
        got: the actual value.
        do: a sentence that says how to correct it.
    """

    def __init__(self, what: str, *, expected: str, got: str, do: str) -> None:
        super().__init__(f"{what}: expected {expected}, got {got}. {do}")
        self.what, self.expected, self.got, self.do = what, expected, got, do

    def inside(self, file: str) -> FormatError:
        """Return the same error, with ``file`` as the place of the fault."""
        return FormatError(f"{file}, {self.what}", expected=self.expected, got=self.got, do=self.do)


class NotCommittedError(FormatError):
    """There is no COMMIT: the save did not finish, or the folder is not a checkpoint."""


class AlreadyCommittedError(FormatError):
    """Another save has committed first. Its checkpoint is valid, and this save is void."""


class NewerFormatError(FormatError):
    """The checkpoint has a version or a required feature that this library does not know. It is not damaged."""


class MissingFileError(FormatError):
    """A file of the checkpoint does not exist."""


class StoreError(FormatError):
    """The storage failed. The checkpoint itself may be valid."""


class NoBucketError(StoreError):
    """There is no bucket of the name in the URL: a mistake, unless the bucket was there before."""


def shorten(value: object, limit: int = 120) -> str:
    """Return the ``repr`` of a value for a message, at most ``limit`` characters even for a hostile file."""

    if isinstance(value, str | bytes) and len(value) > limit:
        value = value[:limit]
    text = repr(value) if not isinstance(value, list | dict) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
