"""Find the backends, launchers, trackers and chips of other packages by their entry points.

Each kind of plug-in has a `Registry`: a group of entry points, and a table of the plug-ins that come with portatrain.
The table is in the code and not in the package's metadata, because a run's own copy of the code has no metadata.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from portatrain.errors import UserError, choice


def _metadata() -> Any:
    """Return `importlib.metadata`. It is imported on first use, because it makes every command start later."""
    return importlib.import_module("importlib.metadata")


def entry_points(group: str | None = None) -> list[Any]:
    """Return the entry points that other packages register, for one kind of plug-in or for every kind.

    The metadata of all installed packages is read once. It is read again after a folder of `sys.path` has changed.
    """
    points = _read(tuple((folder, _changed_ns(folder)) for folder in sys.path))
    return [point for point in points if group is None or point.group == group]


@lru_cache(maxsize=1)
def _read(folders: tuple[tuple[str, int], ...]) -> list[Any]:
    points = _metadata().entry_points()  # of packages that are on the path twice, the first
    return [point for group in points.groups if group.startswith("portatrain.") for point in points.select(group=group)]


def _changed_ns(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The plug-ins of one kind, by name. Another package cannot replace a plug-in that comes with portatrain."""

    kind: str
    """The word for such a plug-in in messages, such as 'backend' or '--track'."""
    group: str
    """The group of entry points, such as 'portatrain.backends'."""
    ours: Mapping[str, str]
    """name -> 'package.module:object'."""

    def names(self) -> list[str]:
        """Return every name: portatrain's in the order of the table, then the others."""
        theirs = {point.name for point in entry_points(self.group)}
        return [*self.ours, *sorted(theirs - set(self.ours))]

    def __contains__(self, name: str) -> bool:
        """Return whether there is a plug-in called `name`; packages are asked only if it is not one of portatrain's."""
        return name in self.ours or name in self.names()

    def load(self, name: str) -> Any:
        """Return the object called `name`.

        Raises:
            UserError: there is no plug-in of that name, or its import fails.
        """
        if name in self.ours:
            return _metadata().EntryPoint(name, self.ours[name], self.group).load()
        found = {point.value: point for point in entry_points(self.group) if point.name == name}
        if not found:
            raise choice(self.kind, name, self.names())
        if len(found) > 1:
            raise UserError(
                f"{self.kind} {name}",
                expected=f"one package that registers it under {self.group}",
                got=f"{len(found)}: {', '.join(sorted(found))}",
                do="Remove one of them.",
            )
        ((value, point),) = found.items()
        try:
            return point.load()
        except Exception as error:  # a plug-in may fail in any way while it is imported
            raise UserError(
                f"{self.kind} {name}",
                expected=f"{value} to be importable",
                got=f"{type(error).__name__}: {error}",
                do=f"Fix or remove the package that registers it under {self.group}.",
            ) from error


def lacks(found: object, protocol: type) -> list[str]:
    """Return the members of `protocol` that `found`, a class or an object, does not have.

    A class variable counts as a member if the protocol annotates it as one. A class must override the methods that the
    protocol marks as abstract; if it inherits from the protocol, it has defaults for the others.
    """
    wanted = [name for name in vars(protocol) if not name.startswith("_")]
    variables = (name for name, hint in protocol.__annotations__.items() if str(hint).startswith("ClassVar"))
    wanted += [name for name in variables if name not in wanted]

    def there(name: str) -> bool:
        return hasattr(found, name) and not getattr(getattr(found, name), "__isabstractmethod__", False)

    return [name for name in wanted if not there(name)]
