"""Encodings: from the bytes of a document to token ids, which are the bytes themselves or a tokenizer's ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from portatrain.errors import UserError
from portatrain.system.paths import expand


class Encoding(Protocol):
    """A function from bytes to token ids, (n,) integers in [0, vocab). Id ``bos`` begins a document.

    ``where`` names the document, for messages. ``text`` is the way back; ids that are no text are left out of it.
    named: True if ``bos`` is a token that a text can have.
    """

    vocab: int
    bos: int
    named: bool

    def __call__(self, data: bytes, where: str) -> np.ndarray: ...

    def text(self, ids: Sequence[int]) -> str: ...

    def masked(self, text: str, spans: Iterable[tuple[int, int]], where: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text, and (n,) bool: which of them lie, at least in part, in spans of its characters."""


class Bytes:
    """The encoding in which each byte is a token. Id 0 also begins a document; only its position distinguishes it from
    a zero byte."""

    vocab, bos, named = 256, 0, False

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        return np.frombuffer(data, np.uint8)

    def text(self, ids: Sequence[int]) -> str:
        return bytes(n for n in ids if 0 < n < 256).decode("utf-8", "replace")

    def masked(self, text: str, spans: Iterable[tuple[int, int]], where: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self(text.encode(), where)
        mask = np.zeros(len(ids), bool)
        for begin, end in spans:
            low = len(text[:begin].encode())
            mask[low : low + len(text[begin:end].encode())] = True
        return ids, mask


class Tokenized:
    """The encoding of a local ``tokenizer.json``, by the package `tokenizers`, without added special tokens.

    Truncation, padding and BPE dropout, which such a file may ask for, are switched off: a corpus is encoded whole, and
    the same each time. ``vocab`` is the largest id + 1, since ids may have holes.

    Raises:
        UserError: the package is missing, the file cannot be loaded, or ``bos`` is not one of its tokens.
    """

    def __init__(self, path: str, bos: str | None) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError(
                "tokenizer", expected="the package tokenizers", got="none", do="Run: pip install 'portatrain[data]'"
            ) from error
        file = expand(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise UserError(
                f"tokenizer {path}",
                expected="a tokenizer.json that the package tokenizers can load, or its folder",
                got=str(error),
                do="Give the path of a local tokenizer.json; nothing is downloaded.",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None
        self.named = bos is not None
        self.vocab = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if bos is None:
            self.bos, self.vocab = self.vocab, self.vocab + 1
            return
        found = self._tokenizer.token_to_id(bos)
        if found is None:
            raise UserError(
                f"bos of tokenizer {path}",
                expected="one of its tokens, or None for an additional id",
                got=repr(bos),
                do="Choose the token that begins a document, from added_tokens in tokenizer.json.",
            )
        self.bos = found

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(_text(data, where), add_special_tokens=False).ids, np.uint32)

    def special(self, text: str) -> list[int]:
        """Return the ids of a text with the special tokens that the file itself adds."""
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def token(self, number: int) -> str:
        """Return the token with that id as it is written in a text; '' if it has none."""
        return self._tokenizer.id_to_token(number) or ""

    def many(self, documents: Sequence[tuple[bytes, str]]) -> list[np.ndarray]:
        """Return what calls for each (data, where) would return; the library encodes them in one call."""
        texts = [_text(data, where) for data, where in documents]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in found]

    def text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(n) for n in ids if n < self.vocab], skip_special_tokens=True)
        return text

    def masked(self, text: str, spans: Iterable[tuple[int, int]], where: str) -> tuple[np.ndarray, np.ndarray]:
        made = self._tokenizer.encode(text, add_special_tokens=False)
        low, high = np.array(made.offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(low), bool)
        for begin, end in spans:
            mask |= (low < end) & (high > begin)
        return np.array(made.ids, np.uint32), mask


class Deferred:
    """The encoding `real`, put off: a call returns the bytes themselves, (n,) uint8, and keeps `where`."""

    def __init__(self, real: Tokenized) -> None:
        self.real, self.vocab, self.bos, self.named, self.where = real, real.vocab, real.bos, real.named, ""
        self.text, self.masked = real.text, real.masked

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        self.where = where
        return np.frombuffer(data, np.uint8)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            where,
            expected="UTF-8 text, since a tokenizer is used",
            got=str(error),
            do="Convert or remove the document, or use bytes as tokens (tokenizer=None).",
        ) from error


def encoding(tokenizer: str | None, bos: str | None) -> Encoding:
    """Return the encoding of a text source. Raises UserError if ``bos`` is given without a tokenizer."""
    if tokenizer is not None:
        return Tokenized(tokenizer, bos)
    if bos is not None:
        raise UserError(
            "bos", expected="None, since bytes are tokens", got=repr(bos), do="Give a tokenizer too, or remove bos."
        )
    return Bytes()
