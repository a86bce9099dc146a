"""Packed corpora: the token arrays of a data source, written once and kept in memory or in a folder.

The folder has ``pack.json`` and one raw little-endian file ``NAME.bin`` per array. It is written under a temporary name
beside its final one and renamed when every file is on disk, so a reader sees all of it or nothing. If several processes
pack at once, the first one wins and the others read its result. A process that is killed while packing leaves an
unfinished ``.NAME.partial-*`` folder, which can be deleted.

The fingerprint of a split is the SHA-256 of the names, dtypes, sizes and SHA-256 sums of its arrays and of the facts
that define their meaning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.errors import StorageError, UserError, storage_error
from portatrain.system import json_files

FORMAT = "portatrain-pack-1"
VERIFY_BYTES = 64 << 20  # up to this size, every byte is verified at each opening

Meta = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A packed corpus: named read-only arrays, facts about them, and the fingerprint of each split."""

    arrays: dict[str, np.ndarray]
    facts: Meta
    fingerprints: dict[str, str]


class Writer:
    """Writes arrays piece by piece, to memory or to files in a folder, and computes their SHA-256 sums."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.arrays: dict[str, np.ndarray] = {}
        self.entries: dict[str, Meta] = {}

    def array(self, name: str, dtype: np.dtype, pieces: Callable[[Callable[[np.ndarray], None]], None]) -> None:
        """Write the one-dimensional array ``name``: ``pieces(write)`` calls ``write`` with each piece in order."""
        dtype = np.dtype(dtype).newbyteorder("<")
        digest, count, kept = hashlib.sha256(), 0, []
        file = (self._folder / f"{name}.bin").open("xb") if self._folder else None

        def write(piece: np.ndarray) -> None:
            nonlocal count
            piece = np.ascontiguousarray(piece, dtype)
            digest.update(piece.data)
            count += len(piece)
            if file is None:
                kept.append(piece)
            else:
                file.write(piece.data)

        try:
            pieces(write)
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        finally:
            if file is not None:
                file.close()
        if file is None:
            self.arrays[name] = np.concatenate(kept) if kept else np.empty(0, dtype)
        self.entries[name] = {"dtype": dtype.name, "size": count, "sha256": digest.hexdigest()}

    def whole(self, name: str, array: np.ndarray) -> None:
        """Write the one-dimensional array ``name`` as one piece."""
        self.array(name, array.dtype, lambda write: write(array))


def make(identity: Meta, splits: tuple[str, ...], produce: Callable[[Writer], Meta], pack_dir: Path | None) -> Pack:
    """Return the packed corpus in ``pack_dir``, after writing it if the folder is empty or absent.

    Args:
        identity: the facts that determine the arrays, as plain JSON values; an existing corpus must have equal ones.
        splits: prefixes of array names; each split has its own fingerprint.
        produce: a function that writes the arrays and returns the facts about them.
        pack_dir: the folder, or None to keep the arrays in memory.

    Raises:
        UserError: the folder cannot be written, or has a damaged corpus or one with another identity.
    """
    if pack_dir is not None and pack_dir.exists() and not (pack_dir.is_dir() and not any(pack_dir.iterdir())):
        return read(pack_dir, identity, splits)
    if pack_dir is None:
        writer = Writer(None)
        facts = produce(writer)
        return Pack(arrays=writer.arrays, facts=facts, fingerprints=_fingerprints(splits, facts, writer.entries))
    absent = [p for p in pack_dir.parents if not p.exists()]
    try:
        pack_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = pack_dir.with_name(f".{pack_dir.name}.partial-{uuid.uuid4().hex[:12]}")
        partial.mkdir()
        try:
            writer = Writer(partial)
            facts = produce(writer)
            meta = {
                "format": FORMAT,
                "made_from": identity,
                "made_by_python": sys.version.split()[0],
                "facts": facts,
                "arrays": writer.entries,
                "fingerprints": _fingerprints(splits, facts, writer.entries),
            }
            meta["check"] = _check(meta)
            with (partial / "pack.json").open("x") as file:
                json.dump(meta, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(partial)
            _rename(partial, pack_dir)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if not pack_dir.exists():
                _remove_empty(absent)
    except OSError as error:
        kind = UserError if storage_error(error) is None else StorageError
        raise kind(
            f"pack {pack_dir}",
            expected="a writable folder",
            got=str(error),
            do="Free some space, change the permissions, or name another folder.",
        ) from error
    return read(pack_dir, identity, splits)


def read(pack_dir: Path, identity: Meta | None, splits: tuple[str, ...], *, whole: bool = False) -> Pack:
    """Open the packed corpus in ``pack_dir`` and check its sizes and fingerprints.

    It also checks every byte if ``whole`` is true or the corpus is at most VERIFY_BYTES.

    Raises:
        UserError: there is no packed corpus, it is damaged, or its identity is not ``identity``.
    """
    meta = _meta(pack_dir)
    if identity is not None and meta["made_from"] != identity:
        theirs = meta["made_from"]
        keys = [k for k in {**theirs, **identity} if theirs.get(k) != identity.get(k)]
        raise UserError(
            f"pack {pack_dir}",
            expected=", ".join(f"{k}={identity.get(k)!r}" for k in keys),
            got=f"one made with {', '.join(f'{k}={theirs.get(k)!r}' for k in keys)}",
            do="Use the data spec of this pack, or name another folder.",
        )
    if _fingerprints(splits, meta["facts"], meta["arrays"]) != meta["fingerprints"]:
        raise _damaged(pack_dir, "fingerprints that follow from the sums of the arrays", "others")
    arrays = {}
    whole = whole or sum(e["size"] * np.dtype(e["dtype"]).itemsize for e in meta["arrays"].values()) <= VERIFY_BYTES
    for name, entry in meta["arrays"].items():
        path, dtype = pack_dir / f"{name}.bin", np.dtype(entry["dtype"]).newbyteorder("<")
        want = entry["size"] * dtype.itemsize
        got = path.stat().st_size if path.is_file() else None
        if got != want:
            raise _damaged(pack_dir, f"{path.name} of {want} bytes", "no such file" if got is None else f"{got} bytes")
        try:
            array = np.memmap(path, dtype, mode="r").view(np.ndarray) if want else np.empty(0, dtype)
        except OSError as error:
            raise _damaged(pack_dir, f"{path.name} to be readable", str(error)) from error
        if whole and hashlib.sha256(array.data).hexdigest() != entry["sha256"]:
            raise _damaged(pack_dir, f"{path.name} with SHA-256 {entry['sha256']}", "other bytes")
        arrays[name] = array
    return Pack(arrays=arrays, facts=meta["facts"], fingerprints=meta["fingerprints"])


def _meta(pack_dir: Path) -> Meta:
    path = pack_dir / "pack.json"
    try:
        meta = json_files.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"pack {pack_dir}",
            expected="an empty or absent folder, or a pack with its pack.json",
            got="a folder without one" if pack_dir.is_dir() else "something else",
            do="Name another folder; nothing was changed in this one.",
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(pack_dir, "a pack.json that can be read", str(error)) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        got = meta.get("format") if isinstance(meta, dict) else meta
        raise _damaged(pack_dir, f"format {FORMAT!r} in pack.json", repr(got))
    if not _well_formed(meta) or meta.get("check") != _check(meta):
        raise _damaged(pack_dir, "a pack.json that matches its own checksum", "another checksum")

    return meta


def _well_formed(meta: Meta) -> bool:
    if not all(isinstance(meta.get(k), dict) for k in ("arrays", "facts", "fingerprints", "made_from")):
        return False
    return all(
        name.replace("-", "").isalnum()
        and isinstance(entry, dict)
        and entry.get("dtype") in ("uint8", "uint16", "uint32", "int64")
        and isinstance(entry.get("size"), int)
        and entry["size"] >= 0
        and isinstance(entry.get("sha256"), str)
        for name, entry in meta["arrays"].items()
    )


def _check(meta: Meta) -> str:
    text = json.dumps({k: v for k, v in meta.items() if k != "check"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(pack_dir: Path, expected: str, got: str) -> UserError:
    return UserError(
        f"pack {pack_dir}",
        expected=expected,
        got=got,
        do="The pack is damaged or of another kind: restore it from a copy, or delete it and pack again.",
    )


def _fingerprints(splits: tuple[str, ...], facts: Meta, entries: dict[str, Meta]) -> dict[str, str]:
    def one(split: str) -> str:
        mine = {k: v for k, v in entries.items() if k.startswith(f"{split}-")}
        text = json.dumps([FORMAT, split, facts.get("meaning"), mine], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    return {split: one(split) for split in splits}


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:  # the innermost first
            folder.rmdir()


def _rename(partial: Path, pack_dir: Path) -> None:
    try:
        os.rename(partial, pack_dir)
    except OSError:
        if not (pack_dir / "pack.json").is_file():
            raise
        return  # another process was first
    _sync_folder(pack_dir.parent)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
