"""Packed corpora: the token arrays of a data source, written once and kept in memory or in a folder.

The folder has ``pack.json`` and one raw little-endian file ``NAME.bin`` per array. It is written under a temporary name
beside its final one and renamed when every file is on disk, so a reader sees all of it or nothing. If several processes
pack at once, the first one wins and the others read its result. A process that is killed while packing leaves an
unfinished ``.NAME.partial-*`` folder, which can be deleted.

Beside each array lie the CRC-32 sums of its blocks, `NAME.sums`. A corpus of at most VERIFY_BYTES is verified whole at
each opening. Of a larger one, the sums are: every read is then held to the sums of the blocks that it touches, so no
damaged token is trained on, and `Verification` reads the whole in the background.

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
import threading
import uuid
import zlib
from array import array as array_of
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.errors import StorageError, UserError, of_reading, storage_error
from portatrain.system import json_files

FORMAT = "portatrain-pack-1"
VERIFY_BYTES = 64 << 20  # up to this size, every byte is verified at each opening
BLOCK_BYTES = 64 << 10

Meta = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A packed corpus: named read-only arrays, facts about them, and the fingerprint of each split.

    blocks: what reads of an array must be held to, by its name; only of a corpus that was not verified whole.
    verification: the check of the rest in the background, for the same corpora.
    """

    arrays: dict[str, np.ndarray]
    facts: Meta
    fingerprints: dict[str, str]
    blocks: dict[str, Blocks] = field(default_factory=dict)
    verification: Verification | None = None


class Blocks:
    """The CRC-32 sums of an array's blocks. `check` reads a block when it is first touched."""

    def __init__(self, pack_dir: Path, name: str, array: np.ndarray, sums: np.ndarray) -> None:
        self._pack_dir, self._name, self._sums = pack_dir, name, sums
        self._bytes = array.view(np.uint8)
        self._item, self._good = array.itemsize, np.zeros(len(sums), bool)

    def check(self, first: int, stop: int) -> None:
        """Raise UserError if elements [first, stop) lie in a block that is not what was written."""
        low, high = first * self._item // BLOCK_BYTES, -(-stop * self._item // BLOCK_BYTES)
        for block in (low + np.flatnonzero(~self._good[low:high])).tolist():
            data = self._bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            if zlib.crc32(data.data) != self._sums[block]:
                at = f"bytes {block * BLOCK_BYTES} to {block * BLOCK_BYTES + len(data)}"
                raise _damaged(self._pack_dir, f"{self._name}.bin with the CRC-32 that was written", f"another in {at}")
            self._good[block] = True


class Verification:
    """The SHA-256 of every array of a corpus, computed on a thread, which `start` begins."""

    def __init__(self, pack_dir: Path, arrays: dict[str, np.ndarray], entries: Meta) -> None:
        self._pack_dir, self._arrays, self._entries = pack_dir, arrays, entries
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="portatrain-verify-data", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def check(self) -> None:
        """Raise UserError if the thread has found damage. Does not wait."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait until the whole corpus has been read; raise UserError if it is damaged."""
        self._thread.join()
        self.check()

    def _run(self) -> None:
        try:
            for name, array in self._arrays.items():
                digest, data = hashlib.sha256(), array.view(np.uint8)
                for at in range(0, len(data), 16 << 20):
                    digest.update(data[at : at + (16 << 20)].data)
                if digest.hexdigest() != self._entries[name]["sha256"]:
                    raise _damaged(self._pack_dir, f"{name}.bin with SHA-256 {self._entries[name]['sha256']}", "others")
        except BaseException as error:
            self._error = error


class Writer:
    """Writes arrays piece by piece, to memory or to files in a folder, and computes their SHA-256 sums."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.arrays: dict[str, np.ndarray] = {}
        self.entries: dict[str, Meta] = {}
        self.sums: dict[str, Meta] = {}

    def array(self, name: str, dtype: np.dtype, pieces: Callable[[Callable[[np.ndarray], None]], None]) -> None:
        """Write the one-dimensional array ``name``: ``pieces(write)`` calls ``write`` with each piece in order."""
        dtype = np.dtype(dtype).newbyteorder("<")
        digest, count, kept, sums = hashlib.sha256(), 0, [], _Sums()
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
                sums.add(piece)

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
        if self._folder is not None:
            data = sums.done().tobytes()
            with (self._folder / f"{name}.sums").open("xb") as beside:
                beside.write(data)
                beside.flush()
                os.fsync(beside.fileno())
            self.sums[name] = {"block": BLOCK_BYTES, "sha256": hashlib.sha256(data).hexdigest()}

    def whole(self, name: str, array: np.ndarray) -> None:
        """Write the one-dimensional array ``name`` as one piece."""
        self.array(name, array.dtype, lambda write: write(array))


class _Sums:
    """The CRC-32 of each block of what is added."""

    def __init__(self) -> None:
        self._done, self._crc, self._filled = array_of("I"), 0, 0

    def add(self, piece: np.ndarray) -> None:
        data = memoryview(piece.data).cast("B") if len(piece) else memoryview(b"")
        at = 0
        while at < len(data):
            part = data[at : at + BLOCK_BYTES - self._filled]
            self._crc, self._filled, at = zlib.crc32(part, self._crc), self._filled + len(part), at + len(part)
            if self._filled == BLOCK_BYTES:
                self._close()

    def _close(self) -> None:
        self._done.append(self._crc)
        self._crc = self._filled = 0

    def done(self) -> np.ndarray:
        """Return (blocks,) uint32."""
        if self._filled:
            self._close()
        return np.array(self._done, "<u4")


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
    if pack_dir is not None and is_there(pack_dir):
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
                "sums": writer.sums,
                "fingerprints": _fingerprints(splits, facts, writer.entries),
            }
            meta["check"] = _check(meta)
            with (partial / "pack.json").open("x") as file:
                json.dump(meta, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            settle(partial, pack_dir)
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


def is_there(pack_dir: Path) -> bool:
    """Return whether there is anything at ``pack_dir`` but an empty folder."""
    return pack_dir.exists() and not (pack_dir.is_dir() and not any(pack_dir.iterdir()))


def read(pack_dir: Path, identity: Meta | None, splits: tuple[str, ...], *, whole: bool = False) -> Pack:
    """Open the packed corpus in ``pack_dir`` and check its sizes and fingerprints.

    It also checks every byte if ``whole`` is true or the corpus is at most VERIFY_BYTES; otherwise the starts of the
    documents, and the sums to which reads are held.

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
    arrays: dict[str, np.ndarray] = {}
    blocks: dict[str, Blocks] = {}
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
            raise _unread(pack_dir, path.name, error) from error
        # The starts are read all over at every batch, and are small beside the tokens.
        at_once = whole or name.endswith("-starts")
        if at_once and hashlib.sha256(array.data).hexdigest() != entry["sha256"]:
            raise _damaged(pack_dir, f"{path.name} with SHA-256 {entry['sha256']}", "other bytes")
        if name in meta.get("sums", {}):
            sums = _read_sums(pack_dir, name, array, meta["sums"][name])
            if not at_once:
                blocks[name] = Blocks(pack_dir, name, array, sums)
        arrays[name] = array
    return Pack(
        arrays=arrays,
        facts=meta["facts"],
        fingerprints=meta["fingerprints"],
        blocks=blocks,
        verification=None if whole else Verification(pack_dir, arrays, meta["arrays"]),
    )


def verify(pack_dir: Path) -> Pack:
    """Open a packed corpus of any source and check every byte of it, whatever its size."""
    return read(pack_dir, None, tuple(_meta(pack_dir)["fingerprints"]), whole=True)


def _read_sums(pack_dir: Path, name: str, array: np.ndarray, about: Meta) -> np.ndarray:
    path = pack_dir / f"{name}.sums"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unread(pack_dir, path.name, error) from error
    if hashlib.sha256(data).hexdigest() != about["sha256"] or len(data) != 4 * -(-array.nbytes // BLOCK_BYTES):
        raise _damaged(pack_dir, f"{path.name} with SHA-256 {about['sha256']}", "other bytes")
    return np.frombuffer(data, "<u4")


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
    except OSError as error:
        raise _unread(pack_dir, path.name, error) from error
    except ValueError as error:
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
    sums = meta.get("sums", {})  # earlier releases wrote none
    if not isinstance(sums, dict) or not all(
        name in meta["arrays"] and isinstance(one, dict) and one.get("block") == BLOCK_BYTES and "sha256" in one
        for name, one in sums.items()
    ):
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


def _unread(pack_dir: Path, name: str, error: OSError) -> UserError:
    return of_reading(error)(
        f"pack {pack_dir}",
        expected=f"{name} to be readable",
        got=error.strerror or str(error),
        do="See that its storage answers, restore it from a copy, or delete it and pack again.",
    )


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


def settle(partial: Path, pack_dir: Path) -> None:
    """Give a whole pack its name, unless another process was first. OSError if that fails."""
    _sync_folder(partial)
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
