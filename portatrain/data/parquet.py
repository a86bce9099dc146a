"""Rows of Parquet files, read in groups, of the columns that documents take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.data.arrow import columns, explained, pyarrow_module, rows_of
from portatrain.data.finding import Files, PassedOver, Place

ROWS = 256
"""The rows that are converted at once: it limits the memory, as a row may be a long document."""
PART_BYTES = 64 << 10
"""The least bytes of a request to a store: the footer and the pages lie apart."""


class ParquetRows:
    """The rows of a Parquet file; an index is a row's number from 0. Pages that have checksums are verified."""

    unit, first = "row", 0

    def __init__(self, fields: tuple[str, ...]) -> None:
        self._fields = fields

    def chosen(self, files: Files, passed: PassedOver) -> Files:
        return files

    def in_order(self, place: Place) -> bool:
        return True

    def indices(self, place: Place) -> np.ndarray:
        with _opened(place) as file:
            columns(place, file.schema_arrow.names, self._fields)
            return np.arange(file.metadata.num_rows)

    def records(self, place: Place, start: int) -> Iterator[tuple[int, Any]]:
        with _opened(place) as file:
            wanted = columns(place, file.schema_arrow.names, self._fields)
            counts = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            ends = np.cumsum(counts)
            group = int(np.searchsorted(ends, start, side="right"))
            at = int(ends[group] - counts[group]) if group < len(counts) else start
            groups = list(range(group, len(counts)))
            with explained(place, "Parquet"):
                batches = file.iter_batches(ROWS, row_groups=groups, columns=wanted, use_threads=False)
            while True:
                with explained(place, "Parquet"):
                    batch = next(batches, None)
                if batch is None:
                    return
                if at + len(batch) > start:
                    skip = max(0, start - at)
                    for i, row in enumerate(rows_of(batch, skip, place, at), skip):
                        yield at + i, row
                at += len(batch)


@contextmanager
def _opened(place: Place) -> Iterator[Any]:
    pyarrow_module()
    import pyarrow.parquet as parquet

    with explained(place, "Parquet"):
        on_disk = isinstance(place, Path)
        source = open(place, "rb") if isinstance(place, Path) else place.open(buffering=PART_BYTES)  # noqa: SIM115
    with source:
        with explained(place, "Parquet"):
            file = parquet.ParquetFile(source, pre_buffer=not on_disk, page_checksum_verification=True)
        with file:
            yield file
