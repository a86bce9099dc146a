"""Distinguish the URL of an object store from a path."""

from __future__ import annotations

from pathlib import Path

from portatrain.errors import UserError

SCHEMES = ("s3://", "gs://", "az://")


def is_remote(where: str | Path) -> bool:
    """Return True for a URL of an object store and False for a path. Raises UserError for another kind of URL."""

    scheme, _, rest = str(where).partition("://")
    if not rest or "/" in scheme:
        return False
    if f"{scheme}://" not in SCHEMES:
        raise UserError(
            str(where),
            expected=f"a folder, or a URL of an object store ({', '.join(SCHEMES)})",
            got=f"{scheme}://",
            do="Use one of these.",
        )
    return True
