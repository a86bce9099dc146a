"""Write the stream of one split into shards, so that a killed writer goes on where it was."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.data.store.layout import LENGTHS, TOKENS, Meta, SplitFacts, seal, shard_name, sums
from portatrain.errors import UserError

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids, which of them begin documents, and which are targets."""


class StreamWriter:
    """Appends documents to the shards of a split in `folder`.

    `state` writes down where it is; a writer that is given this as `state` goes on there, also if more was written. Its
    shard must then be in the folder. `finished(name)` is called when a shard is whole and on disk.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        kind: np.dtype,
        shard_blocks: int,
        finished: Callable[[str], None],
        state: Meta | None,
    ) -> None:
        self._folder, self.split, self._finished = folder, split, finished
        self._ids, self._kind, self._shard_blocks = kind["tokens"].base.newbyteorder("="), kind, shard_blocks
        self.documents, self.bytes, self.longest = 0, 0, 0
        self.bytes_known = True
        self.lengths = np.zeros(LENGTHS, np.int64)
        self._sha256: list[str] = []
        self._blocks = 0  # whole blocks in the current shard
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._parts: list[Part] = []
        self._pending = 0
        if state is not None:
            self._restore(state)

    @property
    def tokens(self) -> int:
        """The tokens so far."""
        return (len(self._sha256) * self._shard_blocks + self._blocks) * TOKENS + self._pending

    def add(self, documents: list[np.ndarray], masks: list[np.ndarray | None], bos: int) -> None:
        """Append documents, each of at least one id, and before each of them `bos`. masks: which ids are targets; None:
        all of a document."""
        if not documents:
            return
        size = np.array([len(d) for d in documents], np.int64)
        first = np.cumsum(size + 1) - (size + 1)
        mark = np.array([bos], self._ids)
        ids = np.concatenate([a for d in documents for a in (mark, d)], dtype=self._ids, casting="unsafe")
        starts = np.zeros(len(ids), bool)
        starts[first] = True
        self.documents += len(documents)
        self.longest = max(self.longest, int(size.max()))
        self.lengths += np.bincount(np.frexp(size.astype(np.float64))[1] - 1, minlength=LENGTHS)
        targets = ~starts
        for at, mask in zip(first.tolist(), masks, strict=True):
            if mask is not None:
                targets[at + 1 : at + 1 + len(mask)] = mask
        self._parts.append((ids, starts, targets))
        self._pending += len(ids)
        if self._pending >= TOKENS:
            ids, starts, targets = self._joined()
            whole = len(ids) // TOKENS * TOKENS
            self._write(seal(ids[:whole], starts[:whole], targets[:whole], self._kind))
            self._parts = [(ids[whole:].copy(), starts[whole:].copy(), targets[whole:].copy())]
            self._pending = len(ids) - whole

    def _joined(self) -> Part:
        ids, starts, targets = zip(*self._parts, strict=True) if self._parts else ((), (), ())
        none = np.empty(0, bool)
        return (
            np.concatenate([np.empty(0, self._ids), *ids], dtype=self._ids),
            np.concatenate([none, *starts]),
            np.concatenate([none, *targets]),
        )

    def _write(self, blocks: np.ndarray) -> None:
        while len(blocks):
            part, blocks = np.split(blocks, [self._shard_blocks - self._blocks])
            if self._file is None:
                self._file = self._path().open("wb")
            self._file.write(part.view(np.uint8).data)
            self._digest.update(part.view(np.uint8).data)
            self._blocks += len(part)
            if self._blocks == self._shard_blocks:
                self._close_shard()

    def _path(self) -> Path:
        return self._folder / shard_name(self.split, len(self._sha256))

    def _close_shard(self) -> None:
        name = self._path().name
        self._sync()
        self._file.close()
        self._sha256.append(self._digest.hexdigest())
        self._file, self._digest, self._blocks = None, hashlib.sha256(), 0
        self._finished(name)

    def _sync(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self, groups: int) -> SplitFacts:
        """Write the rest, and return the facts about the split."""
        ids, starts, targets = self._joined()
        total = self.tokens
        if len(ids):
            fill = (0, TOKENS - len(ids))
            self._write(seal(np.pad(ids, fill), np.pad(starts, fill), np.pad(targets, fill), self._kind))
            self._parts, self._pending = [], 0
        if self._file is not None:
            self._close_shard()
        return SplitFacts(
            tokens=total,
            documents=self.documents,
            bytes=self.bytes if self.bytes_known else None,
            longest=self.longest,
            groups=groups,
            lengths=tuple(self.lengths.tolist()),
            sha256=tuple(self._sha256),
        )

    def abandon(self) -> None:
        """Close what is open; the shard stays as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state(self) -> Meta:
        """Return where the writer is, as JSON, after everything up to here is on disk."""
        self._sync()
        ids, starts, targets = self._joined()
        return {
            "sha256": list(self._sha256),
            "blocks": self._blocks,
            "rest": base64.b64encode(ids.astype(ids.dtype.newbyteorder("<")).tobytes()).decode(),
            "rest_starts": np.flatnonzero(starts).tolist(),
            "rest_others": np.flatnonzero(~targets).tolist(),
            "documents": self.documents,
            "bytes": self.bytes,
            "bytes_known": self.bytes_known,
            "longest": self.longest,
            "lengths": self.lengths.tolist(),
        }

    def _restore(self, state: Meta) -> None:
        self._sha256, self._blocks = list(state["sha256"]), state["blocks"]
        self.documents, self.bytes, self.longest = state["documents"], state["bytes"], state["longest"]
        self.bytes_known, self.lengths = state["bytes_known"], np.array(state["lengths"], np.int64)
        ids = np.frombuffer(base64.b64decode(state["rest"]), self._ids.newbyteorder("<")).astype(self._ids)
        starts = np.zeros(len(ids), bool)
        starts[state["rest_starts"]] = True
        targets = np.ones(len(ids), bool)
        targets[state["rest_others"]] = False
        self._parts, self._pending = [(ids, starts, targets)], len(ids)
        if not self._blocks:
            return
        path, size = self._path(), self._kind.itemsize
        try:
            file = path.open("r+b")
        except FileNotFoundError as error:
            raise self._lost(path, "no such file") from error
        self._file = file
        for at in range(0, self._blocks, 256):
            data = file.read(size * min(256, self._blocks - at))
            blocks = np.frombuffer(data[: len(data) // size * size], self._kind)
            if len(blocks) < min(256, self._blocks - at) or (blocks["crc"] != sums(blocks)).any():
                self.abandon()
                raise self._lost(path, "less, or other bytes")
            self._digest.update(data)
        file.truncate(size * self._blocks)
        file.seek(size * self._blocks)

    def _lost(self, path: Path, got: str) -> UserError:
        return UserError(
            f"unfinished shard {path}",
            expected=f"{self._blocks} blocks of {self._kind.itemsize} bytes, which were on disk",
            got=got,
            do="Delete the unfinished store and pack it again.",
        )
