"""Find the files of a source below folders and globs, and keep account of everything there that is not read.

Folders are read to any depth. A link to a folder is followed like a folder, except when it leads to a folder that
contains it, to the source itself or to one of the folders above the source: such a link is a loop, or leads out of the
corpus. A folder that cannot be read is an error, because its documents would be missing without a word.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from portatrain.errors import UserError, of_reading
from portatrain.system.paths import expand
from portatrain.system.text import counted
from portatrain.system.urls import is_remote

if TYPE_CHECKING:
    from portatrain.data.store_files import StoreFile

Place: TypeAlias = "Path | StoreFile"
Files = list[tuple[str, Place]]  # (name within the source, place), sorted by name
Key = tuple[int, int]  # device and inode of a folder

FILES = ("**", "")
"""The pattern for all files of a folder."""
NAMED = 3
"""The names in a sentence about what was passed over."""


class PassedOver:
    """What a source holds and does not read, by reason: how many things, and the first names in their order."""

    def __init__(self, found: Mapping[str, tuple[int, Sequence[str]]] | None = None) -> None:
        self._found = {reason: (int(count), list(names)) for reason, (count, names) in (found or {}).items()}

    def add(self, reason: str, name: object) -> None:
        """Count the thing `name`; `reason` names it in the plural, such as 'empty files'."""
        count, names = self._found.get(reason, (0, []))
        self._found[reason] = count + 1, sorted([*names, str(name)])[:NAMED]

    def merge(self, other: PassedOver) -> None:
        """Count what `other` has counted, too."""
        for reason, (more, others) in other._found.items():
            count, names = self._found.get(reason, (0, []))
            self._found[reason] = count + more, sorted([*names, *others])[:NAMED]

    def counted(self) -> dict[str, tuple[int, list[str]]]:
        """Return reason -> (count, first names), from which an equal object can be made."""
        return dict(self._found)

    def sentences(self, source: str) -> list[str]:
        """Return a sentence for each reason, with the count and some names."""
        out = []
        for reason, (count, names) in sorted(self._found.items()):
            rest = f" and {count - NAMED} more" if count > NAMED else ""
            out.append(f"{source}: {counted(count, reason)}: {', '.join(names)}{rest}")
        return out


def find(paths: str | tuple[str, ...], what: str, passed: PassedOver | None = None) -> Files:
    """Return the files under ``paths`` (files, folders, globs, on disk or in a store), sorted by name, each file once.

    Raises:
        UserError: a path leads to no file, or a folder or a link cannot be read.
    """
    passed = PassedOver() if passed is None else passed
    found: dict[Place, tuple[bool, str]] = {}
    for given in (paths,) if isinstance(paths, str) else paths:
        if is_remote(given):
            from portatrain.data.store_files import find_remote

            for name, object_ in find_remote(given, what):
                found[object_] = min(found.get(object_, (False, name)), (False, name))
            continue
        path = expand(given)
        patterns: tuple[str, ...]
        if path.is_dir():
            root, patterns = path, FILES
        elif path.exists() or path.is_symlink() or not glob.has_magic(str(path)):
            root, patterns = path.parent, ()
        else:
            root = next(p for p in path.parents if not glob.has_magic(str(p)))
            patterns = path.relative_to(root).parts
        try:
            if patterns:
                here = list(_Walk(root, passed).files(patterns)) if root.is_dir() else []
            else:
                here = [_single(path, what)] if path.exists() else []
        except OSError as error:  # a folder whose names can be read, and nothing else
            raise unreadable(Path(error.filename or path), error, "folder") from error
        if not here:
            raise UserError(
                what,
                expected="a file, a folder with files, or a glob that matches some",
                got=repr(given),
                do="Check the path; relative paths start at the working directory.",
            )
        for linked, p in here:
            name = os.fsencode(p.relative_to(root)).decode("utf-8", "backslashreplace")
            real = p.resolve()
            found[real] = min(found.get(real, (linked, name)), (linked, name))
    return sorted(((name, path) for path, (_, name) in found.items()), key=lambda one: (one[0], str(one[1]).split("/")))


def _single(path: Path, what: str) -> tuple[bool, Path]:
    """Return a path that names one file. Raises UserError for what is there and is no file."""
    if not path.is_file():
        raise UserError(
            what,
            expected="a file, a folder with files, or a glob that matches some",
            got=f"{str(path)!r}, a pipe, socket or device",
            do="Copy what it gives into a file, and name that.",
        )
    return False, path


class _Walk:
    """One walk below `root`. Files come with True if a link to a folder leads to them."""

    def __init__(self, root: Path, passed: PassedOver) -> None:
        self.root, self._passed = root, passed
        real = root.resolve()
        self._above = {_key(p) for p in (real, *real.parents)}
        self._told: set[Path] = set()

    def files(self, patterns: tuple[str, ...]) -> Iterator[tuple[bool, Path]]:
        """Yield the files that match `patterns`, the parts of a glob; ("**", "") matches all files of a folder, also
        hidden ones."""
        everything = patterns == FILES
        folders: list[Path] = []
        seen: set[Path] = set()
        for linked, path in self._matches(self.root, patterns, False, frozenset(), everything):
            if path in seen:
                continue
            seen.add(path)
            if path.is_dir():
                folders.append(path)
            elif path.is_file():
                yield linked, path
            else:
                self._pass("broken links" if path.is_symlink() and not path.exists() else SPECIAL, path)
        if not everything and patterns[-1] != "**":
            inside = {parent for path in seen if path.is_file() for parent in path.parents}
            for folder in folders:  # such as a folder with the name of a file, x.txt
                if folder not in inside:
                    self._pass("folders that a pattern matches, whose files it does not", folder)

    def _matches(
        self, folder: Path, patterns: tuple[str, ...], linked: bool, above: frozenset[Key], hidden: bool
    ) -> Iterator[tuple[bool, Path]]:
        head, *rest = patterns
        if head == "**" and not rest:
            rest = ["*"]
        if head == "**":
            if rest != [""]:
                yield from self._matches(folder, tuple(rest), linked, above, hidden)
            for path, is_link in self._entries(folder, above, loops=True):
                if path.name[0] == "." and not hidden:
                    continue
                if path.is_dir():
                    inside = above | {_key(folder)}
                    yield from self._matches(path, patterns, linked or is_link, inside, hidden)
                elif rest == [""]:
                    yield linked, path
            return
        for path, is_link in self._entries(folder, above, loops=bool(rest)):
            if not fnmatch.fnmatchcase(path.name, head) or (path.name[0] == "." and head[0] != "."):
                continue
            if not rest:
                yield linked, path
            elif path.is_dir():
                yield from self._matches(path, tuple(rest), linked or is_link, above | {_key(folder)}, hidden)

    def _entries(self, folder: Path, above: frozenset[Key], *, loops: bool) -> list[tuple[Path, bool]]:
        """Return (path, whether it is a link) of what is in a folder, without links that form a loop."""
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise unreadable(folder, error, "folder") from error
        out = []
        for path in (folder / name for name in names):
            is_link = path.is_symlink()
            if is_link and loops and path.is_dir() and _key(path) in self._above | above | {_key(folder)}:
                self._pass("links to a folder that contains them, or to one above the source", path)
            else:
                out.append((path, is_link))
        return out

    def _pass(self, reason: str, path: Path) -> None:
        if path not in self._told:
            self._told.add(path)
            self._passed.add(reason, os.fsencode(path).decode("utf-8", "backslashreplace"))


SPECIAL = "special files (pipes, sockets or devices)"


def _key(path: Path) -> Key:
    found = path.stat()
    return found.st_dev, found.st_ino


def unreadable(path: Place, error: OSError, kind: str = "file") -> UserError:
    """Return the error for a file or folder of a source that cannot be read."""
    return of_reading(error)(
        f"data {kind} {path}",
        expected=f"a {kind} that can be read",
        got=error.strerror or str(error),
        do="Correct its permissions or leave it out.",
    )
