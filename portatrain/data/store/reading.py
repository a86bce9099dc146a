"""Read windows from a packed store: from its manifest alone, position and place of every token follow.

Each read asks for the blocks of its windows and holds them to their CRC-32. Several reads are in flight. From an object
store, pieces of PIECE_BLOCKS blocks are fetched and kept in a cache on the local disk. A piece that is damaged or away
is named on standard error and asked for again; then StorageError ends the attempt, and a later one goes on.
"""

from __future__ import annotations

import functools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path

import numpy as np

from portatrain.data.spec import PackedTokens
from portatrain.data.store.cache import Cache
from portatrain.data.store.layout import TOKENS, Manifest, are_targets, opened, shard_name, sums
from portatrain.data.store.places import Bucket, Place, place, required
from portatrain.errors import StorageError, UserError, choice
from portatrain.system import environment
from portatrain.system.paths import cache_folder
from portatrain.system.text import counted

PIECE_BLOCKS = 8
READS_AT_ONCE = 16
PIECES_AHEAD = 2 * READS_AT_ONCE
"""Pieces that are fetched, or have been, before the batch that they are for is read; at most 9 MiB of them."""
AGAIN_AFTER_S = (0.5, 2.0, 5.0)
SAY_AFTER_S = 10.0
LARGEST_ARRAY = 1 << 30
"""Tokens of a split that `tokens` still loads."""


class PackedStream:
    """A split of a packed store, with the members of `corpus.Stream` that windows and hooks use.

    scattered: whether its windows should be permuted although it is not trained on, since neighbours in the stream are
    neighbours in the source. skip: the names of shards that are not read; their tokens are blank.
    """

    def __init__(
        self, at: Place, manifest: Manifest, split: str, pool: Pool, cache: Cache | None, skip: Sequence[str] = ()
    ) -> None:
        shards = {shard_name(split, n): n for n in range(len(manifest.splits[split].sha256))}
        self._skipped = frozenset(number for name, number in shards.items() if name in skip)
        self._at, self._manifest, self._split, self._pool, self._cache = at, manifest, split, pool, cache
        self._facts, self._kind = manifest.splits[split], manifest.block()
        self.vocab, self.bos, self.bytes = manifest.vocab, manifest.bos, self._facts.bytes
        self.size, self.documents = self._facts.tokens, self._facts.documents
        self.fingerprint = manifest.split_fingerprint(split)
        self.passed_over = manifest.passed_over
        self.verification = None
        self.scattered = split != "train" and self._facts.groups > 1
        self._per_piece = PIECE_BLOCKS if isinstance(at, Bucket) else 0
        self._mark = manifest.fingerprint[:16]
        self._ahead: dict[tuple[int, int, int], Future[np.ndarray]] = {}

    def rows(self, begin: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens [b, b + size) for each of ``begin``, (B,), as (B, size) int32, zeros after the end; and (B,
        size) bool twice: True where a document begins, and False where a token is no target.

        Tokens of a shard that is skipped are 0 and no targets. They are apart from what is before and after them, as
        documents are.
        """
        tokens = np.zeros((len(begin), size), np.int32)
        opens = np.zeros((len(begin), size), bool)
        are_counted = np.ones((len(begin), size), bool)
        wanted: dict[tuple[int, int, int], Future[np.ndarray]] = {}
        pieces = []
        for b in begin.tolist():
            mine = self._pieces(b, min(b + size, self.size))
            pieces.append(mine)
            for piece in mine:
                if piece not in wanted and piece[0] not in self._skipped:
                    begun = self._ahead.pop(piece, None)
                    wanted[piece] = self._begun(piece) if begun is None else begun
        found = {piece: self._wait(piece, future) for piece, future in wanted.items()}
        for row, (b, mine) in enumerate(zip(begin.tolist(), pieces, strict=True)):
            for shard, first, count in mine:
                at = (shard * self._manifest.shard_blocks + first) * TOKENS
                low, high = max(b, at), min(b + size, self.size, at + count * TOKENS)
                if shard in self._skipped:
                    are_counted[row, low - b : high - b] = False
                    opens[row, [low - b, min(high - b, size - 1)]] = True
                    continue
                blocks = found[shard, first, count]
                tokens[row, low - b : high - b] = blocks["tokens"].reshape(-1)[low - at : high - at]
                opens[row, low - b : high - b] |= opened(blocks)[low - at : high - at]
                if (targets := are_targets(blocks)) is not None:
                    are_counted[row, low - b : high - b] = targets[low - at : high - at]
        return tokens, opens, are_counted

    def ahead(self, begin: np.ndarray, size: int) -> None:
        """Begin to fetch pieces of what ``rows`` is about to be asked for, from an object store only. The requests of
        one batch are then in flight while those of the one before are waited for."""
        for b in begin.tolist() if self._per_piece else ():
            for piece in self._pieces(b, min(b + size, self.size)):
                if len(self._ahead) >= PIECES_AHEAD:
                    return
                if piece not in self._ahead and piece[0] not in self._skipped:
                    self._ahead[piece] = self._begun(piece)

    def _begun(self, piece: tuple[int, int, int]) -> Future[np.ndarray]:
        return self._pool.submit(functools.partial(self._piece, *piece))

    def read(self, first: int, stop: int) -> np.ndarray:
        """Return tokens [first, stop), as many as there are."""
        stop = min(stop, self.size)
        tokens, _, _ = self.rows(np.array([first]), max(0, stop - first))
        return tokens[0].astype(self._manifest.dtype)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the ids of every document, without its ``bos``."""
        kept: list[np.ndarray] = []
        step = 1 << 20
        for at in range(0, self.size, step):
            tokens, opens, _ = self.rows(np.array([at]), min(step, self.size - at))
            rest, *begun = np.split(tokens[0].astype(self._manifest.dtype), np.flatnonzero(opens[0]))
            kept.append(rest)
            for part in begun:
                if any(map(len, kept)):
                    yield np.concatenate(kept)[1:]
                kept = [part]
        yield np.concatenate(kept)[1:]

    def _pieces(self, first: int, stop: int) -> list[tuple[int, int, int]]:
        """Return (shard, first block, blocks) of what has tokens [first, stop)."""
        out = []
        low, high = first // TOKENS, -(-stop // TOKENS)
        while low < high:
            shard, block = divmod(low, self._manifest.shard_blocks)
            inside = self._manifest.blocks_in(self._split, shard)
            if self._per_piece:
                block = block // self._per_piece * self._per_piece
                count = min(self._per_piece, inside - block)
            else:
                count = min(high - low, inside - block)
            out.append((shard, block, count))
            low = shard * self._manifest.shard_blocks + block + count
        return out

    def _piece(self, shard: int, first: int, count: int) -> np.ndarray:
        """Return `count` blocks of a shard. Raises StorageError if they cannot be had."""
        name = shard_name(self._split, shard)
        size = self._kind.itemsize
        key = f"{self._mark}/{name}/{first}"
        problem = ""
        for wait_s in (0.0, *AGAIN_AFTER_S):
            if problem:
                say(f"portatrain: packed store {self._at.where}: {problem}; it is tried again in {wait_s:g} s")
                time.sleep(wait_s)
            data = None if self._cache is None else self._cache.get(key)
            kept = data is not None
            try:
                if data is None:
                    data = self._at.read(name, first * size, count * size)
            except (OSError, UserError) as error:
                problem = f"shard {name} cannot be read: {error}"
                self._at.forget(name)
                continue
            if len(data) == count * size:
                blocks = np.frombuffer(data, self._kind)
                bad = np.flatnonzero(sums(blocks) != blocks["crc"])
                if not len(bad):
                    if self._cache is not None and not kept:
                        self._cache.put(key, data)
                    return blocks
                problem = f"shard {name} has another CRC-32 than was written, in block {first + int(bad[0])}"
            else:
                problem = f"shard {name} ends within blocks {first} to {first + count - 1}"
            self._at.forget(name)
            if self._cache is not None:
                self._cache.drop(key)
        raise StorageError(
            f"packed store {self._at.where}",
            expected=f"shard {name} as it was packed",
            got=f"{problem}, {len(AGAIN_AFTER_S) + 1} times",
            do="Repair the storage, or restore the shard from a copy (`portatrain data verify` reads all of them), "
            "and resume the run. To go on without it, leave it out by choice: a change of the recipe with "
            f"--set data.skip_shards={name}.",
        )

    def _wait(self, piece: tuple[int, int, int], future: Future[np.ndarray]) -> np.ndarray:
        waited_s = 0.0
        while True:
            try:
                return future.result(SAY_AFTER_S)
            except TimeoutError:
                if future.done():
                    return future.result()
                waited_s += SAY_AFTER_S
                name = shard_name(self._split, piece[0])
                say(f"portatrain: packed store {self._at.where}: waiting for shard {name} for {waited_s:.0f} s")

    @cached_property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        if self.size > LARGEST_ARRAY:
            raise UserError(
                f"split {self._split} of packed store {self._at.where}",
                expected=f"at most {LARGEST_ARRAY:,} tokens, to be loaded as one array",
                got=f"{self.size:,}",
                do="Read windows of it instead.",
            )
        tokens, opens, _ = self.rows(np.array([0]), self.size)
        return tokens[0].astype(self._manifest.dtype), np.flatnonzero(opens[0])

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, (n,); for small splits only."""
        return self._all[0]

    @property
    def starts(self) -> np.ndarray:
        """(documents,) int64, the index of the first token of each document; for small splits only."""
        return self._all[1]


class Pool:
    """Daemon threads, so that a read that never ends does not keep a process."""

    def __init__(self, threads: int) -> None:
        self._threads, self._started, self._lock = threads, 0, threading.Lock()
        self._work: queue.SimpleQueue[tuple[Future[np.ndarray], Callable[[], np.ndarray]]] = queue.SimpleQueue()

    def submit(self, call: Callable[[], np.ndarray]) -> Future[np.ndarray]:
        future: Future[np.ndarray] = Future()
        self._work.put((future, call))
        with self._lock:
            if self._started < self._threads:
                self._started += 1
                threading.Thread(target=_serve, args=(self._work,), name="portatrain-read", daemon=True).start()
        return future


def _serve(work: queue.SimpleQueue[tuple[Future[np.ndarray], Callable[[], np.ndarray]]]) -> None:
    while True:
        future, call = work.get()
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        del future, call


_pool = Pool(READS_AT_ONCE)


def streams_of(spec: PackedTokens) -> dict[str, PackedStream]:
    """Open a packed store and return its splits, by name. Reads the manifest, and nothing else.

    Raises:
        UserError: there is no store, or it is damaged, of another version, or has another fingerprint.
    """
    if not spec.path:
        raise UserError(
            "PackedTokens path",
            expected="the folder or URL of a packed store",
            got="none",
            do="Make one: portatrain data pack RECIPE OUT; then --set data.path=OUT.",
        )
    at = place(spec.path)
    found = required(at)
    if spec.fingerprint and found.fingerprint != spec.fingerprint:
        raise UserError(
            f"packed store {at.where}",
            expected=f"the fingerprint {spec.fingerprint}",
            got=found.fingerprint,
            do="Name the store that the recipe means, or change its fingerprint.",
        )
    gib = environment.DATA_CACHE_GIB.get()
    folder = environment.DATA_CACHE.get() or cache_folder() / "data"
    cache = _cache(folder, int(gib * 2**30)) if isinstance(at, Bucket) and gib else None
    skip, said = spec.skip_shards, _skipped(spec, at, found)
    made = {split: PackedStream(at, found, split, _pool, cache, skip) for split in found.splits}
    for stream in made.values():
        stream.passed_over = (*stream.passed_over, *said)
    return made


def _skipped(spec: PackedTokens, at: Place, manifest: Manifest) -> list[str]:
    """Return a sentence for each split of which shards are skipped. Raises UserError if there is no such shard."""
    said, known = [], set()
    for split, facts in manifest.splits.items():
        names = [shard_name(split, n) for n in range(len(facts.sha256))]
        known |= set(names)
        blank = [n for n, name in enumerate(names) if name in spec.skip_shards]
        if blank:
            whole = manifest.shard_blocks * TOKENS
            tokens = sum(min(whole, facts.tokens - n * whole) for n in blank)
            said.append(
                f"packed store {at.where}: {counted(len(blank), 'shards')} of {split} skipped by choice "
                f"({', '.join(names[n] for n in blank)}): {tokens} of {facts.tokens} tokens are blank"
            )
    for name in spec.skip_shards:
        if name not in known:
            raise choice(f"skip_shards of packed store {at.where}", name, known)
    return said


@functools.cache
def _cache(folder: Path, budget_bytes: int) -> Cache:
    return Cache(folder, budget_bytes)


def gives_bytes(spec: PackedTokens) -> bool:
    """Return whether every token of a store is a byte of text. Raises UserError if there is no store."""
    return made_from_text(spec) == (None, None)


def made_from_text(spec: PackedTokens) -> tuple[str | None, str | None] | None:
    """Return (tokenizer, bos) of the text that a store was packed from, of which bytes have (None, None); None if it
    was packed from ids. Raises UserError if there is no store."""
    found = required(place(spec.path))
    if "tokenizer" not in found.made_from and any(s.bytes is None for s in found.splits.values()):
        return None
    return found.made_from.get("tokenizer"), found.made_from.get("bos")


def say(line: str) -> None:
    """Write a line to standard error, at once and in one piece: several threads may."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
