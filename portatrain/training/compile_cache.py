"""Choose the folder of compiled programs: `environment.COMPILE_CACHE`, else `portatrain/compiled` in the user's cache.

Each framework adds a folder for its version and machine, so a program is never reused where it does not fit. A folder
that cannot be written to never ends a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from portatrain.errors import UserError
from portatrain.runs.events import Kind
from portatrain.system import environment
from portatrain.system.paths import cache_folder, expand

if TYPE_CHECKING:
    from portatrain.backends.base import Backend

OFF = "off"


class CompileCache:
    """The cache of one attempt. It is placed when it is made, before anything is compiled; `tell` records where."""

    def __init__(self, backend: Backend) -> None:
        self._kind: Kind | None = None
        self._fields: dict[str, str] = {}
        use, given = getattr(backend, "use_compile_cache", None), environment.COMPILE_CACHE.get()
        if use is None or given == OFF:
            return
        try:
            found = use(expand(given) if given else cache_folder() / "compiled")
        except (OSError, UserError) as error:  # a disk that is full or read-only, a user without a home directory
            self._kind, self._fields = Kind.NO_COMPILE_CACHE, {"what": str(error)}
            return
        if found is not None:
            self._kind, self._fields = Kind.COMPILE_CACHE, {"folder": str(found)}

    def tell(self, event: Callable[..., None]) -> None:
        """Record where compiled programs are kept, or why they are not."""
        if self._kind is not None:
            event(self._kind, **self._fields)
