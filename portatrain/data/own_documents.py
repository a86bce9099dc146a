"""The documents of a `DocumentSource`: read once, kept in a temporary file, and sorted by name."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from portatrain.data.documents import Documents
from portatrain.data.encode import encoding
from portatrain.data.own import DocumentSource
from portatrain.errors import UserError
from portatrain.errors.users_code import explained


class OwnDocuments(Documents):
    """The documents of ``spec``, each a file of its own to `Documents`."""

    def __init__(self, spec: DocumentSource) -> None:
        self._what = f"{type(spec).__name__}.documents()"
        self._encode = encoding(getattr(spec, "tokenizer", None), getattr(spec, "bos", None))
        self.vocab, self.bos = self._encode.vocab, self._encode.bos
        self._texts = tempfile.TemporaryFile()  # noqa: SIM115  # `close` closes and deletes it
        try:
            places = self._read_all(spec)
        except Exception as error:
            self.close()
            if mistake := explained(error, self._what):
                raise mistake from error
            raise
        names = sorted(places)
        super().__init__([(name, Path(name)) for name in names], [])
        self._places = [places[name] for name in names]
        self.file = np.arange(len(names))
        self.index = np.zeros(len(names), np.int64)

    def _read_all(self, spec: DocumentSource) -> dict[str, tuple[int, int]]:
        """Write every document to the temporary file; return name -> (offset, bytes)."""
        places: dict[str, tuple[int, int]] = {}
        at = 0
        for found in spec.documents():
            if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], str)):
                raise self._wrong("pairs (name, text) of a str and a str or bytes", f"a {type(found).__name__}")
            name, text = found
            if not isinstance(text, (str, bytes)):
                raise self._wrong(f"a text of document {name!r}, a str or bytes", f"a {type(text).__name__}")
            if name in places:
                raise self._wrong("documents with names that are all different", f"two of the name {name!r}")
            data = text.encode() if isinstance(text, str) else text
            self._texts.write(data)
            places[name] = (at, len(data))
            at += len(data)
        return places

    def _wrong(self, expected: str, got: str) -> UserError:
        return UserError(self._what, expected=expected, got=got, do="Correct what the method yields.")

    def close(self) -> None:
        self._texts.close()

    def read(self, number: int) -> tuple[np.ndarray, int | None]:
        at, size = self._places[number]
        self._texts.seek(at)
        return self._encode(self._texts.read(size), f"document {self.files[number][0]!r}"), size
