"""`Split`: the infinite sequence of samples, addressed by number, that training or evaluation reads.

Shape letters: B batch, S seq. Sample n is window ``n mod windows`` of epoch ``n div windows``. Every epoch of a
training split has its own permutation. Sample n is the same for every batch size and every process.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from portatrain.errors import UserError
from portatrain.model.rng import Permutation
from portatrain.system.text import counted

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sources of a split of which an evaluation reports the loss by itself.

    Attributes:
        name: what the metrics are called by: ``loss/NAME``, ``bits_per_byte/NAME``.
        sources: the values of ``source`` in a batch that belong to it.
        bytes_per_target: source bytes per predicted token of these sources, or None; see `Split`.
    """

    name: str
    sources: tuple[int, ...]
    bytes_per_target: float | None


class Split(ABC):
    """A sequence of samples, addressed by number.

    Attributes:
        name: ``train`` or ``validation``.
        windows: number of distinct samples, which are one epoch.
        fingerprint: SHA-256, in hex, of everything but the seed that decides the samples: tokens, document boundaries,
            window length. It does not depend on the location of the source.
        bytes_per_target: source bytes per predicted token, or None if targets do not represent bytes. Bits per byte
            are nats per target / (ln 2 * bytes_per_target).
        groups: the sources of a mixture, by name; a batch then has ``source``. (): there is one source.
    """

    name: str
    windows: int
    fingerprint: str
    bytes_per_target: float | None = None
    groups: tuple[Group, ...] = ()

    @abstractmethod
    def batch(self, start: int, count: int) -> Batch:
        """Return samples [start, start + count) as arrays (B, ...) with B = count; ``sample`` is (B,) int64."""

    def part(self, start: int, count: int, rows: np.ndarray) -> Batch:
        """Return `batch(start, count)` for a process that uses only the rows (B,) bool of it.

        Other rows may be blank, except for their sample number, if reading them costs time.
        """
        return self.batch(start, count)

    @abstractmethod
    def blank(self, count: int) -> Batch:
        """Return ``count`` padding rows, with the keys, shapes and dtypes of `batch`, mask 0 and sample -1."""

    def once(self, count: int) -> Iterator[Batch]:
        """Yield every sample of the first epoch once, in batches of ``count``; `blank` rows fill the last batch."""
        for start in range(0, self.windows, count):
            real = min(count, self.windows - start)
            batch = self.batch(start, real)
            if real < count:
                blank = self.blank(count - real)
                batch = {k: np.concatenate((v, blank[k])) for k, v in batch.items()}
            yield batch

    def ahead(self, start: int, count: int, rows: np.ndarray | None) -> None:  # noqa: B027  # most splits are here
        """Begin to fetch what `batch`, or `part` with ``rows``, is about to read, and do not wait for it. It may be
        called from the thread that reads, and changes no sample."""

    def check_end(self, end: int) -> None:  # noqa: B027  most splits repeat
        """Raise UserError if samples [0, end) repeat a source that must not be repeated."""

    def require(self, count: int) -> None:
        """Raise UserError if the split has fewer than ``count`` distinct samples."""
        if count > self.windows:
            raise UserError(
                f"{self.name} data",
                expected=f"at least {counted(count, 'samples')}, one batch",
                got=f"{self.windows}",
                do="Use a smaller batch, a smaller seq_len, or more data.",
            )


class Order:
    """The order of windows: the map from sample number to window. Each epoch has its own permutation, or none."""

    def __init__(self, windows: int, seed: int, name: str, *, permuted: bool) -> None:
        self.windows, self._seed, self._name, self._permuted = windows, seed, name, permuted
        self._cache: dict[int, Permutation] = {}

    def __call__(self, sample: np.ndarray) -> np.ndarray:
        """Return the windows, (B,) int64, of samples (B,) int64."""
        epoch, window = np.divmod(sample, self.windows)
        if not self._permuted:
            return window
        out = np.empty_like(window)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            out[here] = self._permutation(e)(window[here])
        return out

    def _permutation(self, epoch: int) -> Permutation:
        found = self._cache.get(epoch)
        if found is None:
            if len(self._cache) > 8:  # reads move forward, so old epochs are not needed again
                self._cache = {}
            found = self._cache[epoch] = Permutation(self.windows, self._seed, f"{self._name}/epoch/{epoch}")
        return found


def samples(start: int, count: int) -> np.ndarray:
    """Return the numbers [start, start + count), (count,) int64."""
    if start < 0 or count < 0:
        raise ValueError(f"samples [{start}, {start} + {count}) do not exist")
    return np.arange(start, start + count, dtype=np.int64)


def batch_hash(batch: Batch) -> str:
    """Return the SHA-256, in hex, of the names, dtypes, shapes and contents of the arrays, in the order of the keys."""

    digest = hashlib.sha256()
    for key in sorted(batch):
        value = np.ascontiguousarray(batch[key])
        value = value.astype(value.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{key}\0{value.dtype.str}\0{value.shape}\0".encode())
        digest.update(value.data)
    return digest.hexdigest()
