"""An interpolated Kneser-Ney byte 3-gram model, the baseline for a language model on the same split.

This is modified Kneser-Ney [1], with the equation numbers of that paper. c is the count of a trigram ``u v w`` or, for
the lower orders, the number of distinct left neighbours (``N1+(. v w)``, ``N1+(. w)``)::

    P(w | u v) = max(c(u v w) - D(c), 0) / c(u v .)  +  gamma(u v) P(w | v)          (eq. 26)
    gamma(u v) = (D1 N1(u v .) + D2 N2(u v .) + D3+ N3+(u v .)) / c(u v .)
    D1 = 1 - 2 Y n2/n1,  D2 = 2 - 3 Y n3/n2,  D3+ = 3 - 4 Y n4/n3,  Y = n1 / (n1 + 2 n2)   (eq. 27)

The unigram is interpolated with 1/256, so no byte has probability 0. Each document is preceded by two marks that are
not bytes, so its first bytes have contexts of their own. The marks are never predicted.

[1] Chen, Goodman, "An empirical study of smoothing techniques for language modeling", Computer Speech and
Language 13 (1999), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from portatrain.errors import UserError

BYTES = 256
START = BYTES  # the mark before a document, as a context only
_SYMBOLS = BYTES + 1
_PIECE = 1 << 22  # bytes counted at once


@dataclass(frozen=True)
class _Order:
    """One order of the model: ``count`` (..., 256), ``total`` and ``gamma`` (...) per context, ``discount`` (4,)."""

    count: np.ndarray
    total: np.ndarray
    gamma: np.ndarray
    discount: np.ndarray

    @classmethod
    def of(cls, count: np.ndarray) -> _Order:
        discount = discounts(np.array([np.count_nonzero(count == n) for n in (1, 2, 3, 4)]))
        total = count.sum(axis=-1, dtype=np.int64)
        some = [np.count_nonzero(count == n, axis=-1) for n in (1, 2)]
        some.append(np.count_nonzero(count, axis=-1) - some[0] - some[1])
        taken = sum(d * n for d, n in zip(discount[1:], some, strict=True))
        # In an unseen context, the lower order has all the probability.
        gamma = np.where(total > 0, taken / np.maximum(total, 1), 1.0)
        return cls(count, total, gamma, discount)

    def mix(self, at: tuple[np.ndarray, ...], byte: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Return the probabilities, (n,), of ``byte`` in the contexts ``at``, from those of the next lower order."""
        count = self.count[(*at, byte)]
        kept = count - self.discount[np.minimum(count, 3)]
        return kept / np.maximum(self.total[at], 1) + self.gamma[at] * lower


def discounts(n: np.ndarray) -> np.ndarray:
    """Return (0, D1, D2, D3+) from n1..n4, the numbers of entries that occur once to four times.

    A discount must satisfy 0 < D_i < i. If a count of counts is 0, the formula gives no such value, and D_i is i/2.
    """
    out = np.zeros(4)
    y = n[0] / (n[0] + 2 * n[1]) if n[0] else 0.0
    for i in (1, 2, 3):
        d = i - (i + 1) * y * n[i] / n[i - 1] if n[i - 1] else 0.0
        out[i] = d if 0 < d < i else i / 2
    return out


class KneserNey:
    """A byte 3-gram model with Kneser-Ney smoothing, fitted to documents, each an array of bytes, (n,) uint8.

    Raises:
        UserError: the documents have no bytes.
    """

    def __init__(self, documents: Iterable[np.ndarray]) -> None:
        trigrams = np.zeros(_SYMBOLS * _SYMBOLS * BYTES, np.int64)
        for u, v, w in _pieces(documents):
            np.add.at(trigrams, (u * _SYMBOLS + v) * BYTES + w, 1)
        count = trigrams.reshape(_SYMBOLS, _SYMBOLS, BYTES)
        if not count.any():
            raise UserError(
                "3-gram model", expected="documents with bytes in them", got="none", do="Give a training split."
            )
        pairs = np.count_nonzero(count, axis=0)
        self._three, self._two = _Order.of(count), _Order.of(pairs)
        self._one = _Order.of(np.count_nonzero(pairs, axis=0))

    def probability(self, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return P(w | u v), (n,) float64, for symbols u, v and w, (n,) integers; u and v may be `START`."""
        one = self._one.mix((), w, np.full(len(w), 1 / BYTES))
        return self._three.mix((u, v), w, self._two.mix((v,), w, one))

    def bits_per_byte(self, documents: Iterable[np.ndarray]) -> float:
        """Return the mean of -log2 P over all bytes of all documents."""
        bits, count = 0.0, 0
        for u, v, w in _pieces(documents):
            bits -= float(np.log2(self.probability(u, v, w)).sum())
            count += len(w)
        if not count:
            raise UserError(
                "3-gram model", expected="documents with bytes in them", got="none", do="Give a split to score."
            )
        return bits / count


def _pieces(documents: Iterable[np.ndarray]) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the trigrams (u, v, w), each (n,) int64, of several documents at a time."""
    gathered: list[np.ndarray] = []
    size = 0
    marks = np.full(2, START, np.int64)
    for document in documents:
        for begin in range(0, len(document), _PIECE):
            # The next piece of a long document begins with the last two bytes of this one.

            before = document[begin - 2 : begin].astype(np.int64) if begin else marks
            gathered += [before, document[begin : begin + _PIECE].astype(np.int64)]
            size += len(gathered[-1])
            if size >= _PIECE:
                yield _trigrams(gathered)
                gathered, size = [], 0
    if gathered:
        yield _trigrams(gathered)


def _trigrams(gathered: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    symbols = np.concatenate(gathered)
    # Every second array is a pair of context symbols, which are not predicted.
    predicted = np.concatenate([np.full(len(a), i % 2 == 1) for i, a in enumerate(gathered)])
    at = np.flatnonzero(predicted)
    return symbols[at - 2], symbols[at - 1], symbols[at]
