"""Find documents that are twice in packed stores, and what evaluation sets share with what is trained on.

Documents are compared by two 64-bit sums of their tokens, and runs of tokens by one. The sums go to files in
buckets, so that memory does not grow with the stores: about 200 bytes for each of BUCKET_DOCUMENTS documents, 9 for
each of SLICE_GRAMS runs of tokens of the evaluation sets, and a bit for each document that is trained on.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from portatrain.data.store.layout import Manifest
from portatrain.data.store.progress import EVERY_S, duration
from portatrain.data.store.reading import PackedStream

BLOCK = 1 << 18
BUCKET_DOCUMENTS = 1 << 21
SLICE_GRAMS = 1 << 26
EXAMPLES = 5

_ROW = np.dtype([("sums", np.uint64, (2,)), ("part", np.uint32), ("document", np.uint64)])
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """One split of one store. trained: whether it is what runs train on, and not an evaluation set."""

    where: str
    split: str
    stream: PackedStream
    trained: bool

    @property
    def name(self) -> str:
        return f"{self.where} {self.split}"


@dataclass
class Shared:
    """What the documents of an evaluation set share with those that are trained on.

    grams: its runs of tokens; seen: those of them that are trained on. documents: its documents with such a run. short:
    its documents that are too short to have a run. trained: documents that are trained on and have such a run.
    """

    grams: int = 0
    seen: int = 0
    documents: int = 0
    short: int = 0
    trained: int = 0


@dataclass
class Copies:
    """Documents of `part` that are equal to one of `other`, and the first of them as (document, document there).

    If `other` is the part itself, the first of several equal documents is not counted.
    """

    part: Part
    other: Part
    documents: int
    examples: list[tuple[int, int]] = field(default_factory=list)


def copies(parts: Sequence[Part], tell: Tell = lambda line: None) -> list[Copies]:
    """Return the equal documents, for each pair of parts that has some."""
    total = sum(part.stream.documents for part in parts)
    buckets = 1
    while buckets * BUCKET_DOCUMENTS < total and buckets < 256:
        buckets *= 2
    found: dict[tuple[int, int], Copies] = {}
    with tempfile.TemporaryDirectory(prefix="portatrain-check-") as folder:
        paths = [Path(folder, f"{n:03d}") for n in range(buckets)]
        _spill(parts, paths, tell)
        for path in paths:
            if path.exists():
                _equal(np.fromfile(path, _ROW), parts, found)
                path.unlink()
    return [found[key] for key in sorted(found)]


def shared(parts: Sequence[Part], gram: int, tell: Tell = lambda line: None) -> dict[Part, Shared]:
    """Return, for each evaluation set, the runs of `gram` tokens that it shares with what is trained on.

    A run lies within one document, without the id that begins it.
    """
    out: dict[Part, Shared] = {}
    trained = [part for part in parts if part.trained]
    for part in (part for part in parts if not part.trained):
        counts = out[part] = Shared()
        touched = [np.zeros(one.stream.documents, bool) for one in trained]
        hit = np.zeros(part.stream.documents, bool)
        whole = np.zeros(part.stream.documents, bool)  # the documents that are long enough
        for wanted in _slices(part, gram):
            seen = np.zeros(len(wanted), bool)
            for one, mine in zip(trained, touched, strict=True):
                for sums, documents in _grams(one, gram, _Told(f"{part.name} in {one.name}", one, tell)):
                    at, there = _among(sums, wanted)
                    seen[at[there]] = True
                    mine[documents[there]] = True
            for sums, documents in _grams(part, gram):
                at, there = _among(sums, wanted)
                whole[documents] = True
                counts.grams += int(there.sum())
                counts.seen += int(seen[at[there]].sum())
                hit[documents[there][seen[at[there]]]] = True
        counts.documents, counts.trained = int(hit.sum()), sum(int(mine.sum()) for mine in touched)
        counts.short = part.stream.documents - int(whole.sum())
    return out


def parts_of(where: str, manifest: Manifest, streams: dict[str, PackedStream], *, evaluated: bool) -> list[Part]:
    """Return the splits of a store that have documents. evaluated: all of them are evaluation sets."""
    splits = [split for split, facts in manifest.splits.items() if facts.documents]
    return [Part(where, split, streams[split], split == "train" and not evaluated) for split in splits]


# ---- equal documents


def _spill(parts: Sequence[Part], paths: Sequence[Path], tell: Tell) -> None:
    shift = np.uint64(64 - (len(paths).bit_length() - 1))
    for number, part in enumerate(parts):
        for first, sums in _documents(part, _Told(part.name, part, tell)):
            rows = np.zeros(len(sums), _ROW)
            rows["sums"], rows["part"] = sums, number
            rows["document"] = np.arange(first, first + len(sums), dtype=np.uint64)
            bucket = sums[:, 0] >> shift if len(paths) > 1 else np.zeros(len(sums), np.uint64)
            for n in np.unique(bucket).tolist():
                with paths[n].open("ab") as file:
                    rows[bucket == n].tofile(file)


def _equal(rows: np.ndarray, parts: Sequence[Part], found: dict[tuple[int, int], Copies]) -> None:
    """Add the equal documents of a bucket to `found`."""
    if not len(rows):
        return
    order = np.lexsort((rows["document"], rows["part"], rows["sums"][:, 1], rows["sums"][:, 0]))
    rows = rows[order]
    new = np.ones(len(rows), bool)
    new[1:] = (rows["sums"][1:] != rows["sums"][:-1]).any(axis=1)
    kind = np.cumsum(new) - 1  # equal documents are of one kind
    several = np.bincount(kind)[kind] > 1
    rows, kind = rows[several], kind[several]
    mine = {n: rows["part"] == n for n in range(len(parts))}
    for a, b in itertools.combinations_with_replacement(range(len(parts)), 2):
        if a == b:
            kinds, documents = kind[mine[a]], rows["document"][mine[a]]
            again = np.zeros(len(kinds), bool)
            again[1:] = kinds[1:] == kinds[:-1]
        else:
            kinds, documents = kind[mine[b]], rows["document"][mine[b]]
            again = np.isin(kinds, kind[mine[a]])
        if not again.any():
            continue
        one = found.setdefault((a, b), Copies(parts[b], parts[a], 0))
        one.documents += int(again.sum())
        there = kind[mine[a]]
        for at in np.flatnonzero(again)[: EXAMPLES - len(one.examples)].tolist():
            same = rows["document"][mine[a]][np.searchsorted(there, kinds[at])]
            one.examples.append((int(documents[at]), int(same)))


def _documents(part: Part, told: _Told) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first document, (n, 2) uint64 sums of n documents), in order."""
    open_sums, length, number = np.zeros(2, np.uint64), 0, -1
    for at in range(0, part.stream.size, BLOCK):
        told.at(at)
        tokens_1S, opens_1S, _ = part.stream.rows(np.array([at]), min(BLOCK, part.stream.size - at))
        tokens, opens = tokens_1S[0].astype(np.uint64), opens_1S[0]
        begin = np.flatnonzero(opens)
        index = np.arange(len(tokens))
        last = np.maximum.accumulate(np.where(opens, index, -1))
        place = np.where(last >= 0, index - last, index + length).astype(np.uint64)
        first = _mixed(tokens + (place + np.uint64(1)) * _GOLDEN)
        both = np.stack([first, _mixed(first ^ _GOLDEN)], axis=1)
        cuts = begin if len(begin) and begin[0] == 0 else np.concatenate([[0], begin])
        summed = np.add.reduceat(both, cuts, axis=0)
        if len(cuts) > len(begin):  # the document that was open goes on
            summed[0] += open_sums
        elif number >= 0:
            yield number, open_sums[None]
        done = summed[:-1]
        if len(cuts) > len(begin):
            if len(done):
                yield number, done
        elif len(done):
            yield number + 1, done
        number += len(begin)
        open_sums = summed[-1]
        length = int(place[-1]) + 1
    if number >= 0:
        yield number, open_sums[None]


# ---- shared runs of tokens


def _slices(part: Part, gram: int) -> Iterator[np.ndarray]:
    """Yield the distinct sums of an evaluation set's runs, sorted, at most about SLICE_GRAMS at a time."""
    kept: list[np.ndarray] = []
    done = np.zeros(0, np.uint64)

    def new() -> np.ndarray:
        return np.setdiff1d(np.concatenate(kept) if kept else done, done)

    for sums, _ in _grams(part, gram):
        kept.append(sums)
        if sum(map(len, kept)) >= SLICE_GRAMS:
            if len(now := new()):
                yield now
            kept, done = [], np.union1d(done, now)
    if len(now := new()):
        yield now


def _grams(part: Part, gram: int, told: _Told | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (sums, documents) of the runs of `gram` tokens that begin in a block, both (n,)."""
    before = 0
    for at in range(0, part.stream.size, BLOCK):
        if told is not None:
            told.at(at)
        size = min(BLOCK + gram - 1, part.stream.size - at)
        tokens_1S, opens_1S, _ = part.stream.rows(np.array([at]), size)
        mixed, opens = _mixed(tokens_1S[0].astype(np.uint64) + _GOLDEN), opens_1S[0]
        documents = before + np.cumsum(opens) - 1
        before += int(opens[:BLOCK].sum())
        runs = size - gram + 1
        if runs <= 0:
            continue
        sums, crossed = np.zeros(runs, np.uint64), np.zeros(runs, bool)
        for i in range(gram):
            sums = sums * np.uint64(0xD1342543DE82EF95) + mixed[i : i + runs]
            crossed |= opens[i : i + runs]
        yield sums[~crossed], documents[:runs][~crossed]


def _among(sums: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each sum in `wanted`, sorted, and whether it is there."""
    at = np.minimum(np.searchsorted(wanted, sums), len(wanted) - 1)
    return at, wanted[at] == sums


def _mixed(x: np.ndarray) -> np.ndarray:
    """Return the finalizer of SplitMix64 (Steele, Lea and Flood 2014) of each number."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Told:
    """Says how much of a part has been read."""

    def __init__(self, what: str, part: Part, tell: Tell) -> None:
        self._what, self._total, self._tell = what, part.stream.size, tell
        self._began_s = self._told_s = time.monotonic()

    def at(self, tokens: int) -> None:
        now_s = time.monotonic()
        if tokens and now_s >= self._told_s + EVERY_S:
            self._told_s = now_s
            left_s = (now_s - self._began_s) * (self._total - tokens) / tokens
            self._tell(f"{self._what}: {100 * tokens / self._total:.1f} % read, {duration(left_s)} left")
