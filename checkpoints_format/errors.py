"""What goes wrong with a checkpoint, said so that a person can mend it."""

from __future__ import annotations


class FormatError(Exception):
    """A checkpoint, or a request for one, that cannot be honoured.

    ``what`` names the tensor and the file at fault, ``expected`` and ``got`` say what was wanted and
    what came, ``do`` says what to do about it.
    """

    def __init__(self, what: str, *, expected: str, got: str, do: str) -> None:
        super().__init__(f"{what}: expected {expected}, got {got}. {do}")
        self.what, self.expected, self.got, self.do = what, expected, got, do

    def inside(self, file: str) -> FormatError:
        """The same error, said of something in ``file``."""
        return FormatError(f"{file}, {self.what}", expected=self.expected, got=self.got, do=self.do)


class NotCommittedError(FormatError):
    """There is no COMMIT: the save did not finish, or this is not a checkpoint."""


class AlreadyCommittedError(FormatError):
    """Another save has committed here first; its checkpoint stands and ours is void."""


class NewerFormatError(FormatError):
    """A version or a required feature that this library does not know: not damage, and not to be replaced."""


class MissingFileError(FormatError):
    """A file that the checkpoint names is not there."""


class StoreError(FormatError):
    """The storage did not do what was asked of it. That says nothing of the checkpoint, which may be whole."""


def shorten(value: object, limit: int = 120) -> str:
    """``repr`` for a message: at most ``limit`` characters, whatever a hostile file put there."""
    if isinstance(value, str | bytes) and len(value) > limit:
        value = value[:limit]
    text = repr(value) if not isinstance(value, list | dict) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
