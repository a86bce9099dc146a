"""Pack the documents of a source into a store: in order, by several processes, and on from where a kill left it.

The documents of a split are taken in the order of the source and cut into groups: a group ends after GROUP_DOCUMENTS
documents or GROUP_BYTES of them. Within a group they are permuted. So the source is read from its first document to
its last, whatever its size, and neighbours of the source are not neighbours in a window. A split that is one group
has the order of `corpus.py`. Workers tokenise; this process alone reads and writes, in order, so their number changes
nothing.

After a group, and at most every SAVE_S seconds, the place in the source and in the shards is written down, once the
tokens up to there are on disk (`state.json`). Whatever is written later is written again.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.data.corpus import SPLITS, identity, open_source, require_window
from portatrain.data.documents import Documents, check_ids_of
from portatrain.data.finding import PassedOver
from portatrain.data.spec import PACKINGS, DataSpec
from portatrain.data.store.encoders import Encoders, Processes
from portatrain.data.store.layout import (
    FORMAT,
    MANIFEST,
    Manifest,
    Meta,
    SplitFacts,
    block_dtype,
    checked,
    shard_name,
    sound,
)
from portatrain.data.store.origin import other, require_begun, require_same, source_sum, tokenizer_sum, versions
from portatrain.data.store.places import UNFINISHED, Bucket, Folder, manifest
from portatrain.data.store.progress import Progress
from portatrain.data.store.stream_writer import StreamWriter
from portatrain.errors import StorageError, UserError, storage_error
from portatrain.model.rng import Permutation
from portatrain.system.paths import cache_folder
from portatrain.system.text import counted

GROUP_DOCUMENTS = 8192
GROUP_BYTES = 16 << 20
CHUNK_DOCUMENTS = 256
CHUNK_BYTES = 512 << 10
SAVE_S = 2.0
STATE = f"{UNFINISHED}/state.json"


@dataclass
class _Group:
    """Documents that are permuted together, from the number `first` of the split on. read: bytes. sizes: of the source,
    for each document. passed: what the source passed over while they were read."""

    number: int
    first: int
    read: int = 0
    sizes: list[int | None] = field(default_factory=list)
    masks: list[np.ndarray | None] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    passed: PassedOver = field(default_factory=PassedOver)


def pack(
    spec: DataSpec,
    at: Folder | Bucket,
    *,
    workers: int,
    shard_bytes: int,
    tell: Callable[[str], None] = lambda line: None,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    fence: Callable[[], None] = lambda: None,
) -> Manifest:
    """Return the manifest of the store at `at`, after packing `spec` there if it is not whole yet.

    Args:
        workers: processes that tokenise. Tokens as bytes, and sources of ids, need none.
        shard_bytes: the size of a shard, about.
        tell: called with a line about the progress now and then.
        guard, fence: of the claim on the store; see `runs.claim`.

    Raises:
        UserError: the source is malformed, or has changed since an unfinished store was begun; the store is of
            something else. StorageError: storage failed; the same call goes on.
    """
    if (packing := getattr(spec, "packing", PACKINGS[0])) != PACKINGS[0]:
        raise UserError(
            f"{type(spec).__name__} packing",
            expected=f"{PACKINGS[0]!r}, since runs read a packed store by windows",
            got=repr(packing),
            do="Set packing='windows', or let the run pack its own data.",
        )
    made_from = {**identity(spec), "tokenizer_sha256": tokenizer_sum(spec)}
    if (whole := manifest(at)) is not None:
        require_same(at.where, whole.made_from, made_from)
        _clean_up(at)
        return whole
    try:
        source = open_source(spec)
        try:
            return _Packing(spec, source, at, made_from, shard_bytes, fence).run(workers, tell, guard)
        finally:
            source.close()
    except OSError as error:
        kind = UserError if storage_error(error) is None else StorageError
        raise kind(
            f"packed store {at.where}",
            expected="a place that can be written",
            got=f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else ""),
            do="Free some space or correct the permissions, and rerun the command; it continues where it left off.",
        ) from error


def work_folder(at: Folder | Bucket) -> Path:
    """Return the folder in which shards of a store are written: the store's own, or one in the user's cache folder."""
    if isinstance(at, Folder):
        return at.path
    return cache_folder() / "packing" / hashlib.sha256(at.where.encode()).hexdigest()[:16]


class _Packing:
    def __init__(
        self,
        spec: DataSpec,
        source: Documents,
        at: Folder | Bucket,
        made_from: Meta,
        shard_bytes: int,
        fence: Callable[[], None],
    ) -> None:
        self._spec, self._source, self._at, self._fence = spec, source, at, fence
        self._held = source.held_out(getattr(spec, "validation", 0.0))
        self._ids = np.min_scalar_type(source.vocab - 1).name
        self._same: Meta = {
            "made_from": made_from,
            "made_with": versions(spec),
            "source": source_sum(source, self._held),
            "shard_blocks": max(1, shard_bytes // block_dtype(self._ids, source.masked).itemsize),
        }
        self._listed, self._read = source.passed, PassedOver()
        self._done: dict[str, SplitFacts] = {}
        self._state_writer: Meta | None = None
        self._split, self._next, self._group = SPLITS[0], 0, 0
        self._folder = work_folder(at)
        self._saved_s = time.monotonic()
        self._uploads = isinstance(at, Bucket)

    def run(
        self, workers: int, tell: Callable[[str], None], guard: Callable[[], AbstractContextManager[None]]
    ) -> Manifest:
        (self._folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        self._resume()
        later = self._source.defer()
        encoders = None
        if later is not None:
            tokenizer, bos = (getattr(self._spec, name, None) for name in ("tokenizer", "bos"))
            encoders = Processes(str(tokenizer), bos, workers)
        try:
            while self._split in SPLITS:
                mine = np.flatnonzero(self._held if self._split == "validation" else ~self._held)
                progress = Progress(self._split, len(mine), self._next, tell)
                self._done[self._split] = self._pack_split(mine, encoders, later, progress)
                self._next = self._group = 0
                self._split = "validation" if self._split == "train" else ""
                self._state_writer = None
                self._save()
        finally:
            if encoders is not None:
                encoders.close()
        made = self._manifest()
        with guard():
            self._at.commit(MANIFEST, made.as_bytes())
        _clean_up(self._at)
        return made

    def _pack_split(self, mine: np.ndarray, encoders: Encoders | None, later: Any, progress: Progress) -> SplitFacts:
        writer = StreamWriter(
            self._folder,
            self._split,
            block_dtype(self._ids, self._source.masked),
            self._same["shard_blocks"],
            self._upload if self._uploads else lambda name: None,
            self._state_writer,
        )
        waiting: deque[tuple[_Group, Future[list[np.ndarray]] | list[np.ndarray], bool]] = deque()
        try:
            for group, documents, last in self._chunks(mine, later):
                found = documents if encoders is None else encoders.encode(documents)
                waiting.append((group, found, last))
                while len(waiting) > (encoders.depth if encoders else 0):
                    self._settle(writer, progress, mine, *waiting.popleft())
            while waiting:
                self._settle(writer, progress, mine, *waiting.popleft())
            facts = writer.close(self._group)
        finally:
            writer.abandon()
        progress.end(facts.tokens)
        self._check_split(facts, len(mine))
        return facts

    def _chunks(self, mine: np.ndarray, later: Any) -> Iterator[tuple[_Group, list[Any], bool]]:
        """Yield (group, documents of it, whether they are its last ones), from the next document on."""
        number, group = self._next, _Group(self._group, self._next)
        chunk: list[Any] = []
        chunk_bytes = 0
        before = int(mine[number]) if number < len(mine) else 0
        for document in mine[number:].tolist():
            if self._source.in_order:  # documents between are of the other split
                self._source.passed = PassedOver()
                for other_split in range(before, document):
                    self._source.read_masked(other_split)
            before = document + 1
            self._source.passed = group.passed
            data, mask, size = self._source.read_masked(document)
            group.sizes.append(size)
            group.masks.append(mask)
            group.read += data.nbytes
            chunk.append((data.tobytes(), later.where) if later is not None else data)
            chunk_bytes += data.nbytes
            number += 1
            last = number == len(mine) or len(group.sizes) >= GROUP_DOCUMENTS or group.read >= GROUP_BYTES
            if last or len(chunk) >= CHUNK_DOCUMENTS or chunk_bytes >= CHUNK_BYTES:
                yield group, chunk, last
                chunk, chunk_bytes = [], 0
            if last:
                group = _Group(group.number + 1, number)

    def _settle(
        self,
        writer: StreamWriter,
        progress: Progress,
        mine: np.ndarray,
        group: _Group,
        found: Future[list[np.ndarray]] | list[np.ndarray],
        last: bool,
    ) -> None:
        """Add the tokens of a chunk to its group, and write the group when it is complete."""
        group.ids += found if isinstance(found, list) else found.result()
        if not last:
            progress.at(group.first + len(group.ids), writer.tokens, group.read)
            return
        size = len(group.ids)
        # As in corpus.py, the run's seed is not part of the key: one store serves all seeds.
        key = f"data/documents/{self._split}" + (f"/{group.number}" if group.number else "")
        order = Permutation(size, 0, key)(np.arange(size))
        full = []
        for at in order.tolist():
            document = int(mine[group.first + at])
            if len(group.ids[at]):
                check_ids_of(self._source, document, group.ids[at])
                full.append(at)
            else:
                name = self._source.files[int(self._source.file[document])][0]
                group.passed.add(self._source.nothing, name)
        writer.add([group.ids[at] for at in full], [group.masks[at] for at in full], self._source.bos)
        known = [one for one in (group.sizes[at] for at in full) if one is not None]
        writer.bytes_known = writer.bytes_known and len(known) == len(full)
        writer.bytes += sum(known)
        self._read.merge(group.passed)
        self._next, self._group = group.first + size, group.number + 1
        group.ids, group.masks = [], []
        progress.at(self._next, writer.tokens, group.read, whole=True)
        if time.monotonic() >= self._saved_s + SAVE_S:
            self._state_writer = writer.state()
            self._save()

    def _check_split(self, facts: SplitFacts, documents: int) -> None:
        wanted = bool(getattr(self._spec, "validation", 0)) or bool(getattr(self._spec, "validation_paths", ()))
        if not facts.documents and (self._split == "train" or wanted):
            raise UserError(
                f"{type(self._spec).__name__} data",
                expected=f"at least one document with content in the {self._split} split",
                got=f"{documents} of {counted(len(self._source), 'documents')}, all {self._source.nothing}"
                if documents
                else "none",
                do="Add documents, change validation (the fraction held out), or name validation_paths.",
            )
        if self._split == "train":
            require_window("train", facts.tokens, facts.documents, self._spec.seq_len)  # type: ignore[attr-defined]

    def _manifest(self) -> Manifest:
        passed = PassedOver(self._listed.counted())
        passed.merge(self._read)
        return Manifest(
            dtype=self._ids,
            vocab=self._source.vocab,
            bos=self._source.bos,
            masked=self._source.masked,
            shard_blocks=self._same["shard_blocks"],
            made_from=self._same["made_from"],
            made_with=self._same["made_with"],
            passed_over=tuple(passed.sentences(type(self._spec).__name__)),
            splits={split: facts for split, facts in self._done.items() if facts.documents},
        )

    def _save(self) -> None:
        """Write down how far it is."""
        self._fence()
        meta = {
            "format": FORMAT,
            **self._same,
            "split": self._split,
            "next": self._next,
            "group": self._group,
            "writer": self._state_writer,
            "passed": self._read.counted(),
            "done": {split: facts.as_json() for split, facts in self._done.items()},
        }
        Folder(self._folder).commit(STATE, checked(meta))
        self._saved_s = time.monotonic()

    def _resume(self) -> None:
        """Go on from the state that was written down, if there is one: here, or else in the object store."""
        for place in (Folder(self._folder), self._at) if self._uploads else (self._at,):
            data = place.get(STATE)
            if data is not None and self._take(data):
                return

    def _take(self, data: bytes) -> bool:
        """Go on from a state. Return False if the store does not have the shards of which it tells any more."""
        try:
            meta = sound(data)
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']!r}")
        except ValueError as error:
            raise other(self._at.where, "a state that this release wrote", str(error)) from error
        require_begun(self._at.where, meta, self._same)
        done = {split: SplitFacts.of(row) for split, row in meta["done"].items()}
        writer = meta["writer"]
        told = [(split, len(facts.sha256)) for split, facts in done.items()]
        told += [(meta["split"], len(writer["sha256"]))] if writer is not None else []
        missing = {shard_name(split, n) for split, count in told for n in range(count)} - self._at.names()
        if missing and not self._uploads:
            raise other(self._at.where, f"{min(missing)}, which was packed", "no such file")
        if missing:
            return False
        if self._uploads and writer is not None and writer["blocks"]:
            name = shard_name(meta["split"], len(writer["sha256"]))
            assert isinstance(self._at, Bucket)
            if not (self._folder / name).exists():
                if not self._at.objects.exists(name):
                    return False
                self._at.objects.fetch(name, self._folder / name)
        self._split, self._next, self._group = meta["split"], meta["next"], meta["group"]
        self._read, self._done, self._state_writer = PassedOver(meta["passed"]), done, writer
        return True

    def _upload(self, name: str) -> None:
        """Send a shard, and the state that was written down last, from which another machine could go on."""
        assert isinstance(self._at, Bucket)
        self._fence()
        self._at.objects.put(name, self._folder / name)
        state = Folder(self._folder).get(STATE)
        if state is not None:
            self._at.commit(STATE, state)
        kept = self._folder / "sent"
        # The state may still begin in this shard: the one before it is not needed any more.
        if kept.exists() and (before := kept.read_text()) != name:
            (self._folder / before).unlink(missing_ok=True)
        kept.write_text(name)


def _clean_up(at: Folder | Bucket) -> None:
    """Remove what is not part of a whole store; the claim is left to its owner."""
    at.remove(STATE)
    if isinstance(at, Bucket):
        shutil.rmtree(work_folder(at), ignore_errors=True)
