"""A split: the fixed infinite sequence of samples that training and evaluation read, by number.

B batch, S seq. Sample n is window ``n mod windows`` of epoch ``n div windows``; every epoch of a training
split is permuted anew. Nothing depends on how the sequence is cut into batches, or on who reads it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from portatrain.errors import UserError
from portatrain.model.rng import Permutation

Batch = dict[str, np.ndarray]


class Split(ABC):
    """Samples by number.

    Attributes:
        name: ``train`` or ``validation``.
        windows: number of distinct samples, one epoch.
        fingerprint: SHA-256, in hex, of all that decides what a sample holds except the seed: tokens,
            document boundaries, window length. It does not depend on where the source lies.
        bytes_per_target: source bytes per predicted token, None where targets do not stand for bytes.
            Bits per byte are nats per target / (ln 2 * bytes_per_target).
    """

    name: str
    windows: int
    fingerprint: str
    bytes_per_target: float | None = None

    @abstractmethod
    def batch(self, start: int, count: int) -> Batch:
        """Samples [start, start + count): arrays of leading size ``count``, with ``sample`` (B,) int64."""

    @abstractmethod
    def blank(self, count: int) -> Batch:
        """``count`` rows of the same keys, shapes and dtypes whose mask is 0 and whose sample is -1."""

    def once(self, count: int) -> Iterator[Batch]:
        """Every sample of the first epoch exactly once in batches of ``count``, the last filled with `blank`."""
        for start in range(0, self.windows, count):
            real = min(count, self.windows - start)
            batch = self.batch(start, real)
            if real < count:
                blank = self.blank(count - real)
                batch = {k: np.concatenate((v, blank[k])) for k, v in batch.items()}
            yield batch

    def require(self, count: int) -> None:
        """Raise UserError where a batch of ``count`` is more than the split holds."""
        if count > self.windows:
            raise UserError(
                f"{self.name} data",
                expected=f"at least {count} samples, one batch",
                got=f"{self.windows}",
                do="Use a smaller batch, shorter windows, or more data.",
            )


class Order:
    """Which window sample n is: a permutation an epoch, or none."""

    def __init__(self, windows: int, seed: int, name: str, *, permuted: bool) -> None:
        self.windows, self._seed, self._name, self._permuted = windows, seed, name, permuted
        self._cache: dict[int, Permutation] = {}

    def __call__(self, sample: np.ndarray) -> np.ndarray:
        """Windows (B,) int64 of samples (B,) int64."""
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
            if len(self._cache) > 8:  # reads go forward: old epochs do not come back
                self._cache = {}
            found = self._cache[epoch] = Permutation(self.windows, self._seed, f"{self._name}/epoch/{epoch}")
        return found


def samples(start: int, count: int) -> np.ndarray:
    """Numbers [start, start + count), (count,) int64."""
    if start < 0 or count < 0:
        raise ValueError(f"samples [{start}, {start} + {count}) do not exist")
    return np.arange(start, start + count, dtype=np.int64)


def batch_hash(batch: Batch) -> str:
    """SHA-256, in hex, over names, dtypes, shapes and contents, keys in sorted order."""
    digest = hashlib.sha256()
    for key in sorted(batch):
        value = np.ascontiguousarray(batch[key])
        value = value.astype(value.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{key}\0{value.dtype.str}\0{value.shape}\0".encode())
        digest.update(value.data)
    return digest.hexdigest()
