"""`UserError`: the error for a user's mistake, printed as one paragraph and never as a traceback."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Self

LONGEST = 1000
"""Characters of a user's own text in a message; the middle of a longer text is left out."""
FEW = 10
"""The most names that a message lists where a command lists all of them."""
STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOTCONN, errno.EFBIG)
"""Errors of the operating system that are the storage's, and may be gone when it is tried again."""


class UserError(Exception):
    """A mistake that the user can correct.

    The command line prints it as one paragraph, "WHAT: expected EXPECTED, got GOT. DO", and exits with ``code``.

    Args:
        what: the thing at fault, such as a field or a file.
        expected: the valid values.
        got: the actual value.
        do: one sentence that says how to correct it, with the valid choices if they are few.
    """

    code = 2
    """Exit code of a command that ends with this error."""

    def __init__(self, what: str, *, expected: str, got: str, do: str) -> None:
        super().__init__(f"{_short(what)}: expected {visible(str(expected))}, got {_short(got)}. {visible(str(do))}")
        self.what, self.expected, self.got, self.do = what, expected, got, do
        self.trace = ""
        """The traceback, if the mistake is in the user's own code; '' otherwise."""
        self.kept = ""
        """The file that has the traceback; '' if none does."""

    @classmethod
    def of(cls, error: Any) -> Self:
        """Return an error of this class that says what `error` (a UserError or a FormatError) says."""
        return cls(error.what, expected=error.expected, got=error.got, do=error.do)


class MachineError(UserError):
    """A failure of a machine, such as a device that computes wrong numbers. A job that ends with it tries again."""

    code = 1


class StorageError(UserError):
    """A failure of storage that may be temporary. A job that ends with it is started again."""

    code = 75  # EX_TEMPFAIL of sysexits.h


def of_reading(error: BaseException) -> type[UserError]:
    """Return the class of the error for a file that cannot be read: `StorageError` if it is the storage's fault, which
    may be gone when it is tried again, so that no passing fault ends a run for good; else `UserError`."""
    return StorageError if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS else UserError


def storage_error(error: OSError) -> StorageError | None:
    """The error for storage that failed while a run used it: full, over its quota, away; None for other errors."""
    if error.errno not in STORAGE_ERRNOS:
        return None
    name = f" ({error.filename})" if error.filename else ""
    return StorageError(
        "the storage of the run",
        expected="files that can be read and written",
        got=f"{error.strerror or error}{name}",
        do="Free space or fix the storage, then resume the run; its last committed checkpoint is unharmed.",
    )


_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return ``text`` with escapes for the characters that act on a terminal, or that no encoding has.

    Line ends and tabs stay. A text of a record, a log or a file name may hold anything.
    """
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def _short(text: str) -> str:
    """Return ``text`` without a final period and, if it is long, without its middle."""
    text = visible(text)
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def no_match(what: str, pattern: str, names: Iterable[str]) -> UserError:
    """Return the error for a name pattern that matches none of ``names``; it suggests a pattern of nearly this spelling
    that matches some."""
    import difflib

    known = sorted(names)
    words = sorted({word for name in known for word in name.split("/")})
    parts = []
    for part in pattern.split("/"):
        near = [] if part in words or set("*?[") & set(part) else difflib.get_close_matches(part, words, n=1)
        parts.append(near[0] if near else part)
    guess = "/".join(parts)
    near = [guess] if any(fnmatchcase(name, guess) for name in known) else difflib.get_close_matches(pattern, known)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return UserError(
        what,
        expected=f"a name or a pattern of {', '.join(known) or '(none)'}",
        got=f"{pattern!r}, which matches none",
        do=f"{hint}`*` stands for any text, `/` included: '*/wq'.",
    )


def choice(what: str, got: str, valid: Iterable[str], more: str = "", *, listed: str = "") -> UserError:
    """Return the error for a name that is not in ``valid``; it suggests the nearest valid names, and says ``more``.

    listed: a sentence that says which command lists the valid names, which may be too many for a message.
    """

    import difflib

    names = sorted(valid)
    near = difflib.get_close_matches(got, names, n=3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    if listed:
        expected = f"one of {', '.join(names)}" if len(names) <= FEW else "the name of one that exists"
        return UserError(what, expected=expected, got=f"no such {what.split()[0]}", do=f"{hint}{listed}")
    return UserError(
        what,
        expected=f"one of {', '.join(names) or '(none)'}",
        got=repr(got),
        do=f"{hint}Use one of those names.{more}",
    )
