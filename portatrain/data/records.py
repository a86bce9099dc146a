"""Sources of records: JSON lines, rows of Parquet and Arrow files, ArrayRecord files.

A reader gives the records of a file in order, from any one on; `record_text` makes a document of a record. Documents
are read fast in the order of their numbers only, since files are compressed or cut into groups of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, Protocol

import numpy as np

from portatrain.data.documents import EMPTY, Documents
from portatrain.data.encode import Encoding, encoding
from portatrain.data.finding import Files, PassedOver, Place
from portatrain.data.record_text import Made, Make, maker
from portatrain.data.spec import ArrayRecords, Arrow, Jsonl, Parquet, _Records
from portatrain.errors import UserError


class Reader(Protocol):
    """The records of one kind of files. unit: what a record is called, as "row"; first: the number of the first."""

    unit: str
    first: int

    def chosen(self, files: Files, passed: PassedOver) -> Files:
        """Return the files to read, of those that were found."""

    def indices(self, place: Place) -> np.ndarray:
        """Return the indices of a file's records, (n,) int64, increasing. Raises UserError for another kind of file."""

    def records(self, place: Place, start: int) -> Iterator[tuple[int, Any]]:
        """Yield (index, record) from the record with the index ``start`` on."""

    def in_order(self, place: Place) -> bool:
        """Return True if a record in the middle of a file cannot be read fast; it is asked after `indices`."""


class RecordDocuments(Documents):
    """The documents that ``spec`` makes of the records of its files; ``fields``: further ones that are read."""

    def __init__(
        self, files: Files, held_out: Files, passed: PassedOver, spec: _Records, fields: tuple[str, ...] = ()
    ) -> None:
        self._make: Make = maker(spec)
        self._reader = reader(spec, tuple(dict.fromkeys((*self._make.fields, *fields))))
        files, held_out = (self._reader.chosen(part, passed) for part in (files, held_out))
        super().__init__(files, held_out, passed)
        self._encode = encoding(spec.tokenizer, spec.bos)
        self.vocab, self.bos, self.masked = self._encode.vocab, self._encode.bos, self._make.masked
        if self.masked:
            self.nothing = "chats without an answer"
        found = []
        for name, place in self.files:
            found.append(self._reader.indices(place))
            if not len(found[-1]):
                passed.add(EMPTY, name)
        self.in_order = any(self._reader.in_order(place) for _, place in self.files)
        self.file = np.repeat(np.arange(len(found)), [len(one) for one in found])
        self.index = np.concatenate(found) if found else np.empty(0, np.int64)
        self._open: Iterator[tuple[int, Any]] | None = None
        self._next = -1  # the document that the open reader gives next

    def read(self, number: int) -> tuple[np.ndarray, int | None]:
        tokens, _, size = self.read_masked(number)
        return tokens, size

    def read_masked(self, number: int) -> tuple[np.ndarray, np.ndarray | None, int | None]:
        where, record = self.record(number)
        made = self._make(record, where)
        if made is None:
            return np.empty(0, np.uint8), np.empty(0, bool) if self.masked else None, 0
        if made.answers is None:
            return self._encode(made.text, where), None, len(made.text)
        tokens, mask = ids_of(made, self._encode, where)
        if not mask.any():
            tokens, mask = tokens[:0], mask[:0]
        return tokens, mask, None

    def record(self, number: int) -> tuple[str, Any]:
        """Return the name of a record for messages, and the record."""
        f, index = int(self.file[number]), int(self.index[number])
        place = self.files[f][1]
        if self._open is None or number != self._next or (number and self.file[number - 1] != f):
            self.close()
            self._open = self._reader.records(place, index)
        self._next = -1  # if reading fails, the next call opens the file anew
        where = f"{place}, {self._reader.unit} {index + self._reader.first}"
        found, record = next(self._open, (-1, None))
        if found != index:
            raise UserError(where, expected="the record that was there", got="another file", do="Start again.")
        self._next = number + 1
        return where, record

    def close(self) -> None:
        if self._open is not None:
            with closing(self._open):  # type: ignore[type-var]  # readers are generators
                self._open = None


def ids_of(made: Made, encode: Encoding, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a chat without the token that opens every document, and (n,) bool, those of its answers."""
    tokens, mask = encode.masked(made.text.decode(), made.answers or [], where)
    if len(tokens) and tokens[0] == encode.bos and encode.named:
        return tokens[1:], mask[1:]  # the template wrote that token
    return tokens, mask


def reader(spec: _Records, fields: tuple[str, ...]) -> Reader:
    """Return the reader of a source's files; of a record it reads ``fields`` at least."""
    if isinstance(spec, Jsonl):
        from portatrain.data.json_lines import JsonLines

        return JsonLines()
    if isinstance(spec, Parquet):
        from portatrain.data.parquet import ParquetRows

        return ParquetRows(fields)
    if isinstance(spec, Arrow):
        from portatrain.data.arrow import ArrowRows

        return ArrowRows(fields)
    if isinstance(spec, ArrayRecords):
        from portatrain.data.array_records import ArrayRecordFiles

        return ArrayRecordFiles(json=bool(fields))
    raise TypeError(f"{type(spec).__name__} is not a source of records")
