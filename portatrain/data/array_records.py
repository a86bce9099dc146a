"""Records of ArrayRecord files (google/array_record): texts, or JSON objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from portatrain.data.finding import Files, PassedOver, Place, unreadable
from portatrain.data.json_lines import parse
from portatrain.data.token_files import on_disk
from portatrain.errors import UserError

RECORDS = 256
"""The records that are read at once."""


class ArrayRecordFiles:
    """The records of a file; an index is a record's number from 0. json: a record is parsed, else it is the text."""

    unit, first = "record", 0

    def __init__(self, *, json: bool) -> None:
        self._json = json

    def chosen(self, files: Files, passed: PassedOver) -> Files:
        return files

    def in_order(self, place: Place) -> bool:
        return True

    def indices(self, place: Place) -> np.ndarray:
        with _opened(place) as file:
            return np.arange(file.num_records() if file is not None else 0)

    def records(self, place: Place, start: int) -> Iterator[tuple[int, Any]]:
        with _opened(place) as file:
            count = file.num_records() if file is not None else 0
            for low in range(start, count, RECORDS):
                try:
                    found = file.read(low, min(count, low + RECORDS))
                except (ValueError, RuntimeError, IndexError) as error:
                    raise _damaged(place, str(error)) from error
                for index, raw in enumerate(found, low):
                    yield index, parse(raw, f"{place}, record {index}") if self._json else raw


@contextmanager
def _opened(place: Place) -> Iterator[Any]:
    """Open a file; give None for an empty one."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise UserError(
            "ArrayRecord files",
            expected="the package array_record",
            got="none",
            do="Run: pip install 'portatrain[files]'",
        ) from error
    with ExitStack() as copies:
        path = on_disk(place, copies)
        try:
            size = path.stat().st_size
            with path.open("rb"):  # an error of the operating system is told as one
                pass
        except OSError as error:
            raise unreadable(place, error) from error
        if not size:
            yield None
            return
        try:
            file = array_record_module.ArrayRecordReader(str(path))
        except (ValueError, RuntimeError) as error:
            raise _damaged(place, str(error)) from error
        try:
            if not file.ok():
                raise _damaged(place, "a file of another kind, or one that was cut")
            yield file
        finally:
            with suppress(RuntimeError):  # a file that could not be opened cannot be closed
                file.close()


def _damaged(place: Place, got: str) -> UserError:
    return UserError(
        f"data file {place}",
        expected="a whole ArrayRecord file",
        got=" ".join(got.split())[:300],
        do="Copy or write it again.",
    )
