"""A pack: the arrays of a corpus, made once, kept in memory or in a folder.

The folder holds ``pack.json`` and one raw little-endian file ``NAME.bin`` an array. It is written under
another name beside its place and renamed when every file is on the disk, so that a pack is there whole or
not at all; of several processes that pack at once the first wins and the others read what it wrote. A
process killed while packing leaves its unfinished ``.NAME.partial-*`` folder behind, which may be deleted.

A fingerprint is the SHA-256 of the names, types, shapes and SHA-256 sums of a split's arrays and of what
gives them meaning (``facts``).
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

FORMAT = "portatrain-pack-1"
VERIFY_BYTES = 64 << 20  # a pack up to this size is verified whole whenever it is opened

Meta = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Named arrays (read only), facts about them, and a fingerprint a split."""

    arrays: dict[str, np.ndarray]
    facts: Meta
    fingerprints: dict[str, str]


class Writer:
    """Takes arrays in pieces, to memory or to files of a folder, and sums them on the way."""

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
        """Write the one-dimensional array ``name`` at once."""
        self.array(name, array.dtype, lambda write: write(array))


def make(identity: Meta, splits: tuple[str, ...], produce: Callable[[Writer], Meta], pack_dir: Path | None) -> Pack:
    """The pack in ``pack_dir`` where there is one, else a new one, written there if a folder is given.

    Args:
        identity: what the arrays were made from, plain JSON values; an existing pack must have the same.
        splits: prefixes of array names, each with a fingerprint of its own.
        produce: writes the arrays, returns the facts.
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
            expected="a folder that can be written",
            got=str(error),
            do="Free some space or mend the permissions, or name another folder.",
        ) from error
    return read(pack_dir, identity, splits)


def read(pack_dir: Path, identity: Meta | None, splits: tuple[str, ...], *, whole: bool = False) -> Pack:
    """Open a pack, having checked sizes, fingerprints and, where small or ``whole``, every byte.

    Raises:
        UserError: no pack, a damaged one, or one made from something else than ``identity``.
    """
    meta = _meta(pack_dir)
    if identity is not None and meta["made_from"] != identity:
        theirs = meta["made_from"]
        keys = [k for k in {**theirs, **identity} if theirs.get(k) != identity.get(k)]
        raise UserError(
            f"pack {pack_dir}",
            expected=", ".join(f"{k}={identity.get(k)!r}" for k in keys),
            got=f"one made with {', '.join(f'{k}={theirs.get(k)!r}' for k in keys)}",
            do="Ask for the data that the pack was made from, or name another folder.",
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
        meta = json.loads(path.read_bytes())
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
        raise _damaged(pack_dir, "a pack.json that agrees with its own check sum", "another sum")
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
