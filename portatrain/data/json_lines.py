"""JSON lines, plain or compressed by gzip or zstd."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from portatrain.data.contents import HEAD, check_text, recognised
from portatrain.data.finding import Files, PassedOver, Place, unreadable
from portatrain.errors import UserError

PIECE_BYTES = 8 << 10
"""The compressed bytes that are unpacked at once: a piece of zstd can hold some ten thousand times as many."""


class JsonLines:
    """The lines of a file that are not blank, each one JSON value; an index is a line's number from 0."""

    unit, first = "line", 1

    def __init__(self) -> None:
        self._starts: dict[Place, tuple[np.ndarray, np.ndarray]] = {}  # of plain files: indices, offsets

    def chosen(self, files: Files, passed: PassedOver) -> Files:
        return files

    def in_order(self, place: Place) -> bool:
        return place not in self._starts

    def indices(self, place: Place) -> np.ndarray:
        rows = array("q")
        with opened(place) as (file, kind):
            head = file.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
            check_text(place, head, len(head) + (len(head) == HEAD))
            at = 0
            for line, raw in enumerate(file):
                if raw.strip():
                    rows.extend((line, at))
                at += len(raw)
        found, offsets = np.array(rows, np.int64).reshape(-1, 2).T
        if kind is None and isinstance(place, Path):
            self._starts[place] = found, offsets
        return found

    def records(self, place: Place, start: int) -> Iterator[tuple[int, Any]]:
        line = 0
        with opened(place, known=place in self._starts) as (file, _):
            if place in self._starts:
                found, offsets = self._starts[place]
                file.seek(int(offsets[np.searchsorted(found, start)]))
                line = start
            for index, raw in enumerate(file, line):
                if index >= start and raw.strip():
                    yield index, parse(raw, f"{place}, line {index + 1}")


def parse(raw: bytes, where: str) -> Any:
    """Return one JSON value. Raises UserError if it is none, or has a key twice."""
    try:
        return json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        got = "JSON that is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(where, expected="one JSON object", got=got, do="Correct or delete it.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object with the key {twice!r} twice")
    return found


def _compression(file: IO[bytes]) -> str | None:
    """Return 'gzip' or 'zstd' for a file that begins as one of them, or None."""
    head = file.read(HEAD + 1)
    file.seek(0)
    found = recognised(head[:HEAD], len(head))
    return found.name if found is not None and found.name in ("gzip", "zstd") else None


@contextmanager
def opened(place: Place, *, known: bool = False) -> Iterator[tuple[IO[bytes], str | None]]:
    """Open a file; give it unpacked, and how it is compressed (None: it is not, which may be ``known``).

    Errors while it is read become UserErrors.
    """
    kind = None
    try:
        with place.open("rb") as file:
            kind = None if known else _compression(file)
            if kind == "gzip":
                with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
                    yield unpacked, kind  # type: ignore[misc]
            elif kind == "zstd":
                with io.BufferedReader(_Zstd(file), 1 << 20) as unpacked:
                    yield unpacked, kind
            else:
                yield file, kind
    except (EOFError, gzip.BadGzipFile, zlib.error, _Damaged) as error:
        raise UserError(
            f"data file {place}",
            expected=f"whole {kind} data",
            got=str(error),
            do="The file was cut or changed: copy or make it again.",
        ) from error
    except OSError as error:
        raise unreadable(place, error) from error


class _Damaged(Exception):
    """What is wrong with compressed data."""


class _Zstd(io.RawIOBase):
    """The content of the frames of zstd in a file, one after another. Raises _Damaged at an end within a frame."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                "files of zstd", expected="the package zstandard", got="none", do="Run: pip install 'portatrain[files]'"
            ) from error
        self._api, self._file = zstandard, file
        self._frame: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            self._packed = self._packed or self._file.read(PIECE_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise _Damaged("an end within a frame")
                return 0
            if self._frame is None:
                self._frame = self._api.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(self._packed)
            except self._api.ZstdError as error:
                raise _Damaged(str(error)) from error
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        length = min(len(buffer), len(self._ready))
        buffer[:length] = self._ready[:length]
        self._ready = self._ready[length:]
        return length
