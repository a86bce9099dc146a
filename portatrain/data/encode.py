"""Bytes of a document to token ids: the bytes themselves, or a tokenizer's."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from portatrain.errors import UserError


class Encoding(Protocol):
    """``vocab`` ids, of which ``bos`` opens a document; a call turns bytes from ``where`` into ids (n,)."""

    vocab: int
    bos: int

    def __call__(self, data: bytes, where: str) -> np.ndarray: ...


class Bytes:
    """A byte is its own id. Id 0 opens a document: a zero byte inside one is told apart by its place."""

    vocab, bos = 256, 0

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        return np.frombuffer(data, np.uint8)


class Tokenized:
    """A tokenizer of the `tokenizers` library from its local JSON file; adds no special tokens of its own."""

    def __init__(self, path: str, bos: str | None) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError(
                "tokenizer", expected="the package tokenizers", got="none", do="Run: pip install 'portatrain[data]'"
            ) from error
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise UserError(
                f"tokenizer {path}",
                expected="a tokenizer.json that the package tokenizers can load, or its folder",
                got=str(error),
                do="Give the path of a local tokenizer.json; nothing is fetched.",
            ) from error
        self.vocab = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if bos is None:
            self.bos, self.vocab = self.vocab, self.vocab + 1
            return
        found = self._tokenizer.token_to_id(bos)
        if found is None:
            raise UserError(
                f"bos of tokenizer {path}",
                expected="one of its tokens, or None for an id of its own",
                got=repr(bos),
                do="Look for the token that opens a document among added_tokens in tokenizer.json.",
            )
        self.bos = found

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                where,
                expected="UTF-8 text, as a tokenizer reads",
                got=str(error),
                do="Convert or leave out the document, or use bytes as tokens (tokenizer=None).",
            ) from error
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)


def encoding(tokenizer: str | None, bos: str | None) -> Encoding:
    """The encoding of a text source."""
    if tokenizer is not None:
        return Tokenized(tokenizer, bos)
    if bos is not None:
        raise UserError(
            "bos", expected="None where bytes are tokens", got=repr(bos), do="Give a tokenizer as well, or drop bos."
        )
    return Bytes()
