"""Make the batches of a language model: `Windows` cuts windows out of a packed stream of tokens, `Whole` fills samples
with documents that stay whole.

In the stream, documents follow each other, and each begins with the token ``bos``. Window w has tokens [w S, w S + S)
as inputs and tokens [w S + 1, w S + S + 1) as targets. Consecutive windows overlap by one token, so every token of the
stream except the first is a target exactly once. Targets that begin a document are masked. Every other token is
predicted once, from the tokens before it in its document and its window.

A document of n tokens, with ``bos``, has n - 1 pairs of an input and its target. `Whole` puts all of them into one
sample, or, if they are more than S, into several of at most S; so every pair is in a sample exactly once, too.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from portatrain.data.corpus import Stream, require_window
from portatrain.data.fill import Samples
from portatrain.data.split import Batch, Order, Split, samples
from portatrain.data.store.reading import PackedStream


def blank(count: int, seq_len: int) -> Batch:
    """Return ``count`` padding rows, as `Split.blank` does; it needs no stream, only the shapes and dtypes."""
    names = ("tokens", "targets", "segment_ids", "positions")
    empty = {k: np.zeros((count, seq_len), np.int32) for k in names}
    return {**empty, "mask": np.zeros((count, seq_len), np.float32), "sample": np.full(count, -1, np.int64)}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Columns [column, column + count) of a sample: tokens from `token` of the stream on, all of one document."""

    column: int
    count: int
    token: int


class TokenSplit(Split):
    """The samples of one packed stream.

    The arrays of a batch are (B, S), except for ``sample``:

    - ``tokens``, ``targets``: int32.
    - ``mask``: float32, the weight of each target, 1 or 0.
    - ``segment_ids``: int32, the number of the document within the sample, from 1; 0 for padding. Attention must not
      cross segments.
    - ``positions``: int32, from 0 in each segment.
    - ``sample``: (B,) int64, the sample number.
    """

    stream: Stream | PackedStream
    seq_len: int
    _order: Order

    def _about(self, stream: Stream | PackedStream, name: str, seq_len: int, kind: str) -> None:
        self.stream, self.name, self.seq_len = stream, name, seq_len
        self.fingerprint = hashlib.sha256(f"{kind}\0{stream.fingerprint}\0{seq_len}".encode()).hexdigest()
        targets = stream.size - stream.documents
        self.bytes_per_target = None if stream.bytes is None else stream.bytes / targets

    def batch(self, start: int, count: int) -> Batch:
        return self.at(samples(start, count))

    def ahead(self, start: int, count: int, rows: np.ndarray | None) -> None:
        sample = samples(start, count)
        self.ahead_at(sample if rows is None else sample[rows])

    def ahead_at(self, sample: np.ndarray) -> None:
        """Begin to fetch what `at` is about to read."""

    @abstractmethod
    def at(self, sample: np.ndarray) -> Batch:
        """Return the samples with the numbers ``sample``, (B,) int64."""

    @abstractmethod
    def pieces(self, sample: int) -> list[Piece]:
        """Return the documents in the sample of that number, one piece each, in the order of their segments."""

    def blank(self, count: int) -> Batch:
        return blank(count, self.seq_len)


class Windows(TokenSplit):
    """The windows of one packed stream, across documents."""

    def __init__(
        self, stream: Stream | PackedStream, *, name: str, seq_len: int, seed: int, permuted: bool, order: str
    ) -> None:
        require_window(name, stream.size, stream.documents, seq_len)
        self._about(stream, name, seq_len, "portatrain.windows.1")
        self.windows = -(-(stream.size - 1) // seq_len)
        # An evaluation that ends early then has windows of the whole split; it is the same for every seed.
        scattered = stream.scattered and not permuted
        self._order = Order(self.windows, 0 if scattered else seed, order, permuted=permuted or scattered)

    def part(self, start: int, count: int, rows: np.ndarray) -> Batch:
        if isinstance(self.stream, Stream):  # it is here
            return self.batch(start, count)
        sample = samples(start, count)
        out = self.blank(count)
        for key, value in self.at(sample[rows]).items():
            out[key][rows] = value
        return out | {"sample": sample}

    def ahead_at(self, sample: np.ndarray) -> None:
        if isinstance(self.stream, PackedStream):
            self.stream.ahead(self._order(sample) * self.seq_len, self.seq_len + 1)

    def at(self, sample: np.ndarray) -> Batch:
        size, begin = self.seq_len, self._order(sample) * self.seq_len
        drawn, opens, counted = self.stream.rows(begin, size + 1)
        opens[:, 0] = False  # a window always begins a segment
        column = np.arange(size, dtype=np.int32)
        inside = (begin[:, None] + column) < self.stream.size
        segment = 1 + np.cumsum(opens[:, :size], axis=1, dtype=np.int32)
        position = column - np.maximum.accumulate(column * opens[:, :size], axis=1)
        has_target = (begin[:, None] + column + 1) < self.stream.size
        return {
            "tokens": drawn[:, :size].copy(),
            "targets": drawn[:, 1:].copy(),
            "mask": (has_target & ~opens[:, 1:] & counted[:, 1:]).astype(np.float32),
            "segment_ids": np.where(inside, segment, 0).astype(np.int32),
            "positions": np.where(inside, position, 0).astype(np.int32),
            "sample": sample.astype(np.int64),
        }

    def pieces(self, sample: int) -> list[Piece]:
        number = np.array([sample])
        first = int(self._order(number)[0]) * self.seq_len
        segment_S = self.at(number)["segment_ids"][0]
        found = []
        for segment in range(1, int(segment_S.max()) + 1):
            column = np.flatnonzero(segment_S == segment)
            found.append(Piece(column=int(column[0]), count=len(column), token=first + int(column[0])))
        return found


class Whole(TokenSplit):
    """Samples of whole documents: several that fit together, or one each (``single``). Padding follows them."""

    stream: Stream

    def __init__(
        self, stream: Stream, *, name: str, seq_len: int, seed: int, permuted: bool, order: str, single: bool
    ) -> None:
        require_window(name, len(stream.tokens), len(stream.starts), 1)
        self._about(stream, name, seq_len, f"portatrain.{'single' if single else 'best-fit'}.1")
        pairs = np.diff(stream.starts, append=len(stream.tokens)) - 1
        self._samples = Samples(pairs, seq_len, single=single)
        self.windows = len(self._samples)
        self._order = Order(self.windows, seed, order, permuted=permuted)

    def at(self, sample: np.ndarray) -> Batch:
        out = self.blank(len(sample)) | {"sample": sample.astype(np.int64)}
        for row, window in enumerate(self._order(sample).tolist()):
            at = 0
            for segment, (document, begin, count) in enumerate(self._samples[window], 1):
                first = int(self.stream.starts[document]) + begin
                here = slice(at, at + count)
                ids = self.stream.read(first, first + count + 1)
                counted = self.stream.are_targets(first, first + count + 1)
                out["tokens"][row, here], out["targets"][row, here] = ids[:-1], ids[1:]
                out["mask"][row, here] = 1 if counted is None else counted[1:]
                out["segment_ids"][row, here] = segment
                out["positions"][row, here] = np.arange(count)
                at += count
        return out

    def pieces(self, sample: int) -> list[Piece]:
        found, at = [], 0
        for document, begin, count in self._samples[int(self._order(np.array([sample]))[0])]:
            found.append(Piece(column=at, count=count, token=int(self.stream.starts[document]) + begin))
            at += count
        return found
