"""Where a run's checkpoints are: a folder, or a prefix of an object store (s3://, gs://, az://). One store a step."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from portatrain.errors import UserError

if TYPE_CHECKING:
    from checkpoints_format import LocalStore, Store

COMMIT = "COMMIT"
SCHEMES = ("s3://", "gs://", "az://")


class Place(Protocol):
    """The checkpoints `step-NNNNNNNN` of a run."""

    name: str
    """For messages."""

    def steps(self) -> list[int]:
        """Steps that something is there of, ascending; whether a checkpoint is whole, only its COMMIT says."""
        ...

    def open(self, step: int, *, create: bool = False) -> Store:
        """The store of one step's checkpoint."""
        ...

    def committed(self, step: int) -> bool:
        """Whether it has a COMMIT."""
        ...

    def sizes(self, step: int) -> dict[str, int]:
        """Bytes of its files, by name."""
        ...

    def commit(self, step: int) -> bytes:
        """What its COMMIT holds."""
        ...

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its COMMIT first: what is half removed is not a checkpoint."""
        ...


def is_remote(where: str | Path) -> bool:
    """Whether it is a URL of an object store; UserError for one of another kind."""
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


def place_of(where: Path | str) -> Place:
    """A folder, or what a URL of an object store names."""
    if isinstance(where, str) and where.startswith(SCHEMES):
        from portatrain.checkpoint.object_store import ObjectPlace

        return ObjectPlace(where)
    return Folder(Path(where))


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def steps_of(names: Iterable[str]) -> list[int]:
    """The steps of names such as step-00000010."""
    return sorted(int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit())


class Folder:
    """A `Place` on a local or shared file system."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def steps(self) -> list[int]:
        return steps_of(p.name for p in self.path.iterdir()) if self.path.is_dir() else []

    def open(self, step: int, *, create: bool = False) -> LocalStore:
        from checkpoints_format import LocalStore  # with NumPy: not needed to read a command line

        return LocalStore(self.path / step_name(step), create=create)

    def committed(self, step: int) -> bool:
        return (self.path / step_name(step) / COMMIT).exists()

    def sizes(self, step: int) -> dict[str, int]:
        return {p.name: p.stat().st_size for p in (self.path / step_name(step)).iterdir() if p.is_file()}

    def commit(self, step: int) -> bytes:
        return (self.path / step_name(step) / COMMIT).read_bytes()

    def remove(self, step: int) -> None:
        folder = self.path / step_name(step)
        with contextlib.suppress(FileNotFoundError):
            (folder / COMMIT).unlink()
        shutil.rmtree(folder, ignore_errors=True)
