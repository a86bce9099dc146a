"""Open a run's checkpoints in a folder or under a prefix of an object store (s3://, gs://, az://), one store a step."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from portatrain.system import json_files
from portatrain.system.urls import SCHEMES

if TYPE_CHECKING:
    from checkpoints_format import LocalStore, Store
    from portatrain.checkpoint.object_store import ObjectStore

COMMIT = "COMMIT"


class Location(Protocol):
    """The checkpoints `step-NNNNNNNN` of a run."""

    name: str
    """The folder or URL, for messages."""

    def steps(self) -> list[int]:
        """Return the steps that have files, ascending. A step may be incomplete: only its COMMIT makes it a
        checkpoint."""
        ...

    def open(self, step: int, *, create: bool = False) -> Store:
        """Return the store of one step's checkpoint."""
        ...

    def committed(self, step: int) -> bool:
        """Return whether the checkpoint of `step` has a COMMIT."""
        ...

    def sizes(self, step: int) -> dict[str, int]:
        """Return the bytes of the checkpoint's files, by name."""
        ...

    def commit(self, step: int) -> bytes:
        """Return the contents of the checkpoint's COMMIT."""
        ...

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its COMMIT first, so that one that is half removed is not taken for a checkpoint."""
        ...


def location_of(where: Path | str) -> Location:
    """Return the location for a folder or for the URL of an object store."""
    if isinstance(where, str) and where.startswith(SCHEMES):
        return ObjectLocation(where)
    return FolderLocation(Path(where))


def newest_committed(location: Location, without: Container[int] = ()) -> int | None:
    """Return the newest step with a COMMIT that is not in `without`, or None. Only the restore verifies its files."""
    steps = (step for step in reversed(location.steps()) if step not in without)
    return next((step for step in steps if location.committed(step)), None)


def refuse_link(path: Path) -> None:
    """Raise FormatError if `path`, the folder or a file of a checkpoint, is a symbolic link; SPEC allows none."""
    if path.is_symlink():
        from checkpoints_format import FormatError

        raise FormatError(
            f"checkpoint {path}",
            expected="a folder or file of its own",
            got="a symbolic link, which is not followed",
            do="Copy what it leads to, or give the path of that checkpoint itself.",
        )


BOUND = "RUN.json"
"""The object that binds a URL to the run whose checkpoints it holds."""


def bound_to(url: str, *, fresh: bool) -> dict[str, Any] | None:
    """Return the run to which a URL is bound, {"run": its id, ...}; None if it is free.

    `fresh`: the caller has saved nothing there. Checkpoints that are there without the object are then of another run:
    earlier releases did not write it.
    """
    from portatrain.system.object_store import Objects

    objects = Objects(url)
    found = objects.get(BOUND)
    if found is None:
        return {} if fresh and steps_of(objects.top()[1]) else None
    try:
        owner = json_files.loads(found[0])
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {}


def bind(url: str, run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Bind a URL to `run`, unless it is bound; return the run to which it is bound now."""
    from portatrain.system.object_store import Objects

    owner = bound_to(url, fresh=True)
    if owner is None and Objects(url).create(BOUND, json.dumps(run, indent=2).encode()) is not None:
        return run
    return owner if owner is not None else bound_to(url, fresh=True) or {}


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def steps_of(names: Iterable[str]) -> list[int]:
    """Return the steps in names such as step-00000010."""
    found = (json_files.digits(n[5:]) for n in names if n.startswith("step-"))
    return sorted(step for step in found if step is not None)


class FolderLocation:
    """A `Location` on a local or shared file system."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def steps(self) -> list[int]:
        return steps_of(p.name for p in self.path.iterdir()) if self.path.is_dir() else []

    def open(self, step: int, *, create: bool = False) -> LocalStore:
        from checkpoints_format import LocalStore  # with NumPy: not needed to read a command line

        folder = self.path / step_name(step)
        if create and folder.is_symlink():
            folder.unlink()  # a save writes into a folder of its own, and leaves alone what the link leads to
        refuse_link(folder)
        return LocalStore(folder, create=create)

    def committed(self, step: int) -> bool:
        folder = self.path / step_name(step)
        return (folder / COMMIT).exists() and not (folder.is_symlink() or (folder / COMMIT).is_symlink())

    def sizes(self, step: int) -> dict[str, int]:
        folder = self.path / step_name(step)
        if folder.is_symlink() or not folder.is_dir():
            return {}
        return {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file() and not p.is_symlink()}

    def commit(self, step: int) -> bytes:
        self.refuse_links(step)
        return (self.path / step_name(step) / COMMIT).read_bytes()

    def refuse_links(self, step: int) -> None:
        """Raise FormatError if the folder of `step`, or the COMMIT in it, is a symbolic link."""
        folder = self.path / step_name(step)
        for path in (folder, folder / COMMIT):
            refuse_link(path)

    def remove(self, step: int) -> None:
        folder = self.path / step_name(step)
        if folder.is_symlink():  # it leads to a checkpoint of another run, which is not ours to remove
            return
        with contextlib.suppress(FileNotFoundError):
            (folder / COMMIT).unlink()
        shutil.rmtree(folder, ignore_errors=True)


class ObjectLocation:
    """A `Location` below a URL of an object store."""

    def __init__(self, url: str, **options: Any) -> None:
        from portatrain.checkpoint.object_store import ObjectStore  # with NumPy: not needed to read a command line

        self.name, self._options, self._store = url.rstrip("/"), options, ObjectStore
        self._root = ObjectStore(self.name, **options)

    def steps(self) -> list[int]:
        return steps_of(self._root.folders())

    def open(self, step: int, *, create: bool = False) -> ObjectStore:
        return self._store(f"{self.name}/{step_name(step)}", **self._options)

    def committed(self, step: int) -> bool:
        return self.open(step).size(COMMIT) is not None

    def sizes(self, step: int) -> dict[str, int]:
        return self.open(step).sizes()

    def commit(self, step: int) -> bytes:
        return self.open(step).read(COMMIT)

    def remove(self, step: int) -> None:
        store = self.open(step)
        store.delete(COMMIT)
        for name in list(store.list()):
            store.delete(name)
