"""A shared cache of packed corpora on this machine, so that runs of one corpus pack it once.

An entry is a pack (`pack`) in a folder named by what decides its bytes: the spec, the content of every file of the
source, the tokenizer, and the code and releases that pack. A run gets a copy: its pack is its own, travels with it,
and damage on one side is not on the other.

Cached are sources of text and records in local files of at most LARGEST_BYTES, with a tokenizer: bytes are packed as
fast as they are copied. Others are packed by the run, or once into a packed store (`portatrain data pack`). The cache
is in the user's cache folder, holds at most BUDGET_BYTES, and drops what was not used for longest. It may be removed at
any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from portatrain.data import pack as packs
from portatrain.data.sources import documents_files
from portatrain.data.spec import DataSpec
from portatrain.data.store.origin import tokenizer_sum, versions
from portatrain.errors import UserError
from portatrain.system import environment
from portatrain.system.paths import cache_folder

LARGEST_BYTES = 1 << 30
"""Of the files of a source that is cached."""
BUDGET_BYTES = 10 << 30

Produce = Callable[[packs.Writer], packs.Meta]


def folder() -> Path | None:
    """Return the folder of the cache, or None if there is to be none."""
    given = environment.PACK_CACHE.get()
    if given == "off":
        return None
    return Path(given).absolute() if given else cache_folder() / "packs"


def make(
    spec: DataSpec, identity: packs.Meta, splits: tuple[str, ...], produce: Produce, pack_dir: Path
) -> tuple[packs.Pack, str | None]:
    """Return the packed corpus in `pack_dir`, which has none, and why the cache could not be used; None if it was used,
    or is not for this source.

    Raises:
        UserError: as `pack.make`.
    """
    where = folder()
    key = None if where is None else key_of(spec, identity)
    why = None
    if where is not None and key is not None:
        entry = where / key
        try:
            _filled(entry, identity, splits, _of_same_files(spec, identity, produce, key))
            _take(entry, pack_dir)
            _keep_within(where, entry)
        except _Unusable as error:
            why = f"the cache of packed corpora in {where} cannot be used, so this run packs by itself: {error}"
    return packs.make(identity, splits, produce, pack_dir), why


class _Unusable(Exception):
    """The cache cannot be written to or read."""


def key_of(spec: DataSpec, identity: packs.Meta) -> str | None:
    """Return the name of the entry for a source; None if it is not cached: it has no tokenizer, or its files are not
    all here, are large, or cannot be read. Opening the source says what is wrong with them."""
    files = documents_files(spec) if getattr(spec, "tokenizer", None) is not None else None
    if files is None:
        return None
    digest = hashlib.sha256()
    about = {"identity": identity, "tokenizer": tokenizer_sum(spec), "with": versions(spec), "code": _code()}
    digest.update(json.dumps(about, sort_keys=True).encode())
    left = LARGEST_BYTES
    try:
        for name, path in files:
            data = path.read_bytes() if isinstance(path, Path) and path.stat().st_size <= left else None
            if data is None:
                return None
            left -= len(data)
            digest.update(f"\0{name}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
            digest.update(data)
    except OSError:
        return None
    return digest.hexdigest()[:32]


@functools.cache
def _code() -> str:
    """Return a sum of the code that packs."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _filled(entry: Path, identity: packs.Meta, splits: tuple[str, ...], produce: Produce) -> None:
    """Make sure that there is a whole entry: pack it if it is missing, and anew if it is damaged. If several processes
    pack it at once, the first one wins.

    Raises:
        UserError: the source cannot be packed.
        _Unusable: the cache cannot be written to.
    """
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        if entry.exists() and not _is_whole(entry):
            _remove(entry)
        probe = entry.with_name(f".probe-{uuid.uuid4().hex[:12]}")
        probe.mkdir()  # so that what follows fails for another reason
        probe.rmdir()
    except OSError as error:
        raise _Unusable(str(error)) from error
    try:
        packs.make(identity, splits, produce, entry)
    except UserError as error:
        if error.what == f"pack {entry}":  # the folder, and not the source
            raise _Unusable(str(error.__cause__ or error.got)) from error
        raise


def _of_same_files(spec: DataSpec, identity: packs.Meta, produce: Produce, key: str) -> Produce:
    """Return `produce`; it raises _Unusable, and there is no entry, if the files of the source are no longer those of
    `key`: an entry would hold other documents than its name says, for every run after this one."""

    def made(writer: packs.Writer) -> packs.Meta:
        meta = produce(writer)
        if key_of(spec, identity) != key:
            raise _Unusable("a file of the source has changed while it was packed")
        return meta

    return made


def _is_whole(entry: Path) -> bool:
    try:
        packs.verify(entry)
    except UserError:
        return False
    return True


def _take(entry: Path, pack_dir: Path) -> None:
    """Give the run a copy of an entry. Raises _Unusable if that fails; the run then packs by itself."""
    partial = pack_dir.with_name(f".{pack_dir.name}.partial-{uuid.uuid4().hex[:12]}")
    try:
        partial.mkdir(parents=True)
        for path in sorted(entry.iterdir()):
            with path.open("rb") as there, (partial / path.name).open("xb") as here:
                shutil.copyfileobj(there, here, 1 << 20)
                here.flush()
                os.fsync(here.fileno())
        packs.settle(partial, pack_dir)
    except OSError as error:
        raise _Unusable(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.utime(entry)  # the time of its last use


def _keep_within(where: Path, entry: Path) -> None:
    """Remove the entries that were not used for longest, while all together are larger than BUDGET_BYTES, but never
    `entry`."""
    with contextlib.suppress(OSError):
        there = sorted(
            (p for p in where.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.stat().st_mtime
        )
        sizes = {p: sum(file.stat().st_size for file in p.iterdir()) for p in there}
        for path in there:
            if sum(sizes.values()) <= BUDGET_BYTES:
                break
            if path != entry:
                _remove(path)
                del sizes[path]


def _remove(entry: Path) -> None:
    """Remove an entry at once: who copies it at this moment has all of its files, or an OSError. OSError if another
    process was first."""
    aside = entry.with_name(f".{entry.name}.removed-{uuid.uuid4().hex[:12]}")
    os.rename(entry, aside)
    shutil.rmtree(aside, ignore_errors=True)
