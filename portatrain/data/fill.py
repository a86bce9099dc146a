"""Which documents fill which sample, if documents stay whole: one a sample, or several by best fit.

Documents are pieces of at most ``size`` pairs: a longer one is cut into pieces of ``size`` and a rest. By best fit
(decreasing), pieces of a block of documents are taken from the longest to the shortest, and each goes to the sample
with the least room that has enough (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3). The
result follows from the lengths alone, so every process finds the same samples.
"""

from __future__ import annotations

import numpy as np

BLOCK = 1 << 16
"""The documents that are fitted together; it limits the memory that fitting takes."""


class Samples:
    """The pieces of every sample. lengths: (documents,) the pairs of each document, at least 1.

    It keeps 8 bytes a document, 8 a piece and 8 a sample.
    """

    def __init__(self, lengths: np.ndarray, size: int, *, single: bool) -> None:
        self._size, self._lengths = size, lengths
        documents, parts, begins = [], [], [np.zeros(1, np.int64)]
        filled = 0
        for low in range(0, len(lengths), BLOCK):
            here = lengths[low : low + BLOCK]
            count = -(-here // size)
            document = np.repeat(np.arange(len(here)), count)
            part = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
            if single:
                ends = np.arange(1, len(document) + 1)
            else:
                order, ends = best_fit(np.minimum(here[document] - part * size, size), size)
                document, part = document[order], part[order]
            documents.append((low + document).astype(np.uint32))
            parts.append(part.astype(np.uint32))
            begins.append(filled + ends)
            filled += len(document)
        self._document, self._part = np.concatenate(documents), np.concatenate(parts)
        self._begins = np.concatenate(begins)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, sample: int) -> list[tuple[int, int, int]]:
        """Return (document, first pair of it, pairs) for each piece of a sample."""
        out = []
        for i in range(int(self._begins[sample]), int(self._begins[sample + 1])):
            document, begin = int(self._document[i]), int(self._part[i]) * self._size
            out.append((document, begin, min(self._size, int(self._lengths[document]) - begin)))
        return out


def best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (order, ends): the pieces sample by sample, and how many pieces the samples up to each one have.

    lengths: (n,) from 1 to ``size``. Of equal lengths the earlier piece comes first, and of samples with equal room the
    one that came to have it last.
    """
    sample = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(size + 1)]
    rooms = 0  # bit r is set if a sample has room r; the lowest bit from `length` on is the best fit
    made = 0
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = size, made
            made += 1
        sample[piece] = chosen
        if left := room - length:
            with_room[left].append(chosen)
            rooms |= 1 << left
    by_sample = np.argsort(sample, kind="stable")
    return by_sample, np.cumsum(np.bincount(sample, minlength=made))
