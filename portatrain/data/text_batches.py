"""Make the batches of a language model: `Windows.at` cuts windows out of a packed stream of tokens.

In the stream, documents follow each other, and each begins with the token ``bos``. Window w has tokens [w S, w S + S)
as inputs and tokens [w S + 1, w S + S + 1) as targets. Consecutive windows overlap by one token, so every token of the
stream except the first is a target exactly once. Targets that begin a document are masked. Every other token is
predicted once, from the tokens before it in its document and its window.
"""

from __future__ import annotations

import hashlib

import numpy as np

from portatrain.data.corpus import Stream, require_window
from portatrain.data.split import Batch, Order, Split, samples
from portatrain.data.store.reading import PackedStream


def blank(count: int, seq_len: int) -> Batch:
    """Return ``count`` padding rows, as `Split.blank` does; it needs no stream, only the shapes and dtypes."""
    names = ("tokens", "targets", "segment_ids", "positions")
    empty = {k: np.zeros((count, seq_len), np.int32) for k in names}
    return {**empty, "mask": np.zeros((count, seq_len), np.float32), "sample": np.full(count, -1, np.int64)}


class Windows(Split):
    """The windows of one packed stream.

    The arrays of a batch are (B, S), except for ``sample``:

    - ``tokens``, ``targets``: int32.
    - ``mask``: float32, the weight of each target, 1 or 0.
    - ``segment_ids``: int32, the number of the document within the window, from 1; 0 for padding after the end of the
      stream. Attention must not cross segments.
    - ``positions``: int32, from 0 in each segment.
    - ``sample``: (B,) int64, the sample number.
    """

    def __init__(
        self, stream: Stream | PackedStream, *, name: str, seq_len: int, seed: int, permuted: bool, order: str
    ) -> None:
        self.stream, self.name, self.seq_len = stream, name, seq_len
        found = stream.size
        require_window(name, found, stream.documents, seq_len)
        self.windows = -(-(found - 1) // seq_len)
        text = f"portatrain.windows.1\0{stream.fingerprint}\0{seq_len}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        targets = found - stream.documents
        self.bytes_per_target = None if stream.bytes is None else stream.bytes / targets
        # An evaluation that ends early then has windows of the whole split; it is the same for every seed.
        scattered = stream.scattered and not permuted
        self._order = Order(self.windows, 0 if scattered else seed, order, permuted=permuted or scattered)

    def batch(self, start: int, count: int) -> Batch:
        return self.at(samples(start, count))

    def at(self, sample: np.ndarray) -> Batch:
        """Return the samples with the numbers ``sample``, (B,) int64."""
        size, begin = self.seq_len, self._order(sample) * self.seq_len
        drawn, opens = self.stream.rows(begin, size + 1)
        opens[:, 0] = False  # a window always begins a segment
        column = np.arange(size, dtype=np.int32)
        inside = (begin[:, None] + column) < self.stream.size
        segment = 1 + np.cumsum(opens[:, :size], axis=1, dtype=np.int32)
        position = column - np.maximum.accumulate(column * opens[:, :size], axis=1)
        has_target = (begin[:, None] + column + 1) < self.stream.size
        return {
            "tokens": drawn[:, :size].copy(),
            "targets": drawn[:, 1:].copy(),
            "mask": (has_target & ~opens[:, 1:]).astype(np.float32),
            "segment_ids": np.where(inside, segment, 0).astype(np.int32),
            "positions": np.where(inside, position, 0).astype(np.int32),
            "sample": sample.astype(np.int64),
        }

    def blank(self, count: int) -> Batch:
        return blank(count, self.seq_len)
