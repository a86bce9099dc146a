"""Paths that a user gives: `~` stands for a home directory, and the name of a run must be valid UTF-8."""

from __future__ import annotations

import os
from pathlib import Path

from portatrain.errors import UserError
from portatrain.system.urls import is_remote


def expand(given: str | os.PathLike[str]) -> Path:
    """Return `given` with its `~` or `~user` replaced.

    Raises:
        UserError: no such user, or a user without a home directory.
    """
    text = os.fspath(given)
    found = os.path.expanduser(text)
    if text.startswith("~") and found == text:
        user = text[1:].partition("/")[0]
        raise UserError(
            text,
            expected="a path below a home directory",
            got=f"no user {user!r}" if user else "no home directory of this user",
            do="Write the whole path." if user else "Set HOME, or write the whole path.",
        )
    return Path(found)


def cache_folder() -> Path:
    """Return the folder of what can be made again: $XDG_CACHE_HOME/portatrain, else ~/.cache/portatrain."""
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "portatrain"


def config_folder() -> Path:
    """Return the folder of a user's own settings: $XDG_CONFIG_HOME/portatrain, else ~/.config/portatrain."""
    return expand(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "portatrain"


def recorded(text: str) -> str:
    """Return `text`, a path that goes into the record of a run.

    Raises:
        UserError: it has bytes that are not UTF-8, which no JSON file, job script or page can hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the path {text!a}", expected="a name in UTF-8", got="bytes of another encoding", do="Rename it."
        ) from None
    return text


def place(text: str) -> str:
    """Return the path or URL of a run, or of a folder with runs, with its `~` replaced; for an option's `type=`."""
    return recorded(text if is_remote(text) else str(expand(text)))
