"""The documents of one source, read by number; and a copy of them on disk, for sources that are read in order only.

The name of a document is the name of its file within the source and its index in the file. Names and order do not
depend on the location of the source, so a corpus can be moved.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod

import numpy as np

from portatrain.data.encode import Deferred, Encoding, Tokenized
from portatrain.data.finding import Files, PassedOver
from portatrain.errors import UserError
from portatrain.model import rng

EMPTY = "empty files"


class Documents(ABC):
    """Documents [0, n) of one source.

    Attributes:
        vocab: number of token ids. bos: the id that begins every document in the packed stream.
        file: (n,) int64, not decreasing, the file of each document. index: (n,) int64, its index in that file.
        passed: what the source holds and does not read.
        in_order: True if documents are read fast only in the order of their numbers.
        masked: True if `read_masked` gives masks. nothing: why a document has no content, in the plural.
    """

    vocab: int
    bos: int
    file: np.ndarray
    index: np.ndarray
    in_order = False
    masked = False
    nothing = "documents without content"
    _encode: Encoding
    """The encoding of a source of text; a source of ids has none."""

    def __init__(self, files: Files, held_out: Files, passed: PassedOver | None = None) -> None:
        self.passed = PassedOver() if passed is None else passed
        self.files = files + held_out
        self._trained = len(files)

    def __len__(self) -> int:
        return len(self.file)

    @abstractmethod
    def read(self, number: int) -> tuple[np.ndarray, int | None]:
        """Return the token ids of a document without ``bos``, and the number of its source bytes (None: unknown)."""

    def read_masked(self, number: int) -> tuple[np.ndarray, np.ndarray | None, int | None]:
        """Return what `read` does, and between them which tokens are targets: (n,) bool, or None if all are."""
        tokens, size = self.read(number)
        return tokens, None, size

    def defer(self) -> Deferred | None:
        """Let `read` return the bytes of a document instead of its ids, and return the encoding that was put off.

        Return None, and change nothing, if a tokenizer does not encode each document as it is.
        """
        real = getattr(self, "_encode", None)
        if self.masked or not isinstance(real, Tokenized):
            return None
        self._encode = later = Deferred(real)
        return later

    def close(self) -> None:  # noqa: B027  # most sources hold nothing open
        """Close what the source holds open; it is not read any more."""

    def held_out(self, fraction: float) -> np.ndarray:
        """Return (n,) bool, True for the documents of the validation split.

        If files are held out by name, their documents are in it. Otherwise a document is in it if the Philox word at
        its index, under a key from its file's name, is below ``fraction``. Adding documents therefore never moves
        another document to the other split; but if no word of a small corpus is below it, the lowest one counts.
        """
        if self._trained < len(self.files):
            return self.file >= self._trained
        drawn = np.ones(len(self))
        for f, (name, _) in enumerate(self.files):
            here = slice(*np.searchsorted(self.file, (f, f + 1)))
            index = self.index[here]
            if len(index):
                words = rng.words(0, f"data/split/{name}", 0, int(index[-1]) + 1)[index]
                drawn[here] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        held = drawn < fraction
        if fraction and len(self) > 1 and not held.any():
            held[drawn.argmin()] = True
        return held


class Spooled(Documents):
    """The documents of ``source``, which is read once, in order, and closed; their tokens are in a temporary file."""

    def __init__(self, source: Documents) -> None:
        self.vocab, self.bos, self.passed, self.files = source.vocab, source.bos, source.passed, source.files
        self.file, self.index, self._trained = source.file, source.index, source._trained
        self.masked, self.nothing = source.masked, source.nothing
        self._dtype = np.min_scalar_type(max(self.vocab - 1, 0))
        self._places = np.zeros((len(source), 2), np.int64)  # offset in the file, number of tokens
        self._sizes: list[int | None] = []
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  # `close` closes and deletes it
        try:
            for number in range(len(source)):
                tokens, mask, size = source.read_masked(number)
                check_ids_of(source, number, tokens)
                self._places[number] = self._spool.tell(), len(tokens)
                self._spool.write(np.ascontiguousarray(tokens, self._dtype).data)
                if self.masked:
                    counted = np.ones(len(tokens), bool) if mask is None else mask
                    self._spool.write(np.ascontiguousarray(counted, bool).data)
                self._sizes.append(size)
        except BaseException:
            self._spool.close()
            raise
        finally:
            source.close()

    def close(self) -> None:
        self._spool.close()

    def read(self, number: int) -> tuple[np.ndarray, int | None]:
        tokens, _, size = self.read_masked(number)
        return tokens, size

    def read_masked(self, number: int) -> tuple[np.ndarray, np.ndarray | None, int | None]:
        at, count = self._places[number].tolist()
        self._spool.seek(at)
        tokens = np.frombuffer(self._spool.read(count * self._dtype.itemsize), self._dtype)
        mask = np.frombuffer(self._spool.read(count), bool) if self.masked else None
        return tokens, mask, self._sizes[number]


def check_ids_of(source: Documents, number: int, tokens: np.ndarray) -> None:
    """Raise UserError if a document has ids beyond the vocabulary of its source."""
    if not len(tokens):
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= source.vocab:
        raise UserError(
            f"document {source.files[int(source.file[number])][0]}",
            expected=f"ids from 0 to {source.vocab - 1}, the vocabulary being {source.vocab}",
            got=str(low if low < 0 else high),
            do="Correct the tokenizer or the source.",
        )
