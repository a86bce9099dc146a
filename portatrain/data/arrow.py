"""Rows of Arrow files (IPC streams and files), as `datasets` of Hugging Face writes them; what Parquet shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from portatrain.data.finding import Files, PassedOver, Place, unreadable
from portatrain.errors import UserError, choice
from portatrain.system import json_files

FILE_MARK = b"ARROW1\0\0"
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a stream that its writer closed."""
ABOUT = ("state.json", "dataset_info.json")
"""What `datasets` writes beside the data of a split."""
SPLITS = "dataset_dict.json"


class ArrowRows:
    """The rows of an Arrow file; an index is a row's number from 0."""

    unit, first = "row", 0

    def __init__(self, fields: tuple[str, ...]) -> None:
        self._fields = fields

    def chosen(self, files: Files, passed: PassedOver) -> Files:
        """Return the files without what `datasets` keeps beside them: descriptions, and caches of earlier work."""
        listed: dict[str, set[str]] = {}
        for name, place in files:
            folder, _, base = name.rpartition("/")
            if base == SPLITS:
                splits = _list(_json(place), "splits")
                raise UserError(
                    f"data folder {_above(place)}",
                    expected="the folder of one split",
                    got=f"a dataset with the splits {', '.join(map(str, splits))}",
                    do=f"Add the split to the path, as in {_above(place)}/{splits[0] if splits else 'train'}; "
                    "another one can be in validation_paths.",
                )
            if base == "state.json":
                rows = _list(_json(place), "_data_files")
                listed[folder] = {str(one.get("filename")) for one in rows if isinstance(one, dict)}
        out = []
        for name, place in files:
            folder, _, base = name.rpartition("/")
            if base in ABOUT and folder in listed:
                continue
            if folder in listed and base not in listed[folder]:
                passed.add("files that are not in the state.json beside them", name)
            else:
                out.append((name, place))
        for folder, names in listed.items():
            have = {name.rpartition("/")[2] for name, _ in out if name.rpartition("/")[0] == folder}
            if missing := sorted(names - have):
                raise UserError(
                    f"dataset {folder or 'folder'}",
                    expected=f"the files that its state.json lists, such as {missing[0]}",
                    got=f"{len(names) - len(missing)} of {len(names)}",
                    do="Copy the whole folder of the dataset, and name the folder and not its files.",
                )
        return out

    def in_order(self, place: Place) -> bool:
        return True

    def indices(self, place: Place) -> np.ndarray:
        total = 0
        for batch in self._batches(place):
            total += len(batch)
        return np.arange(total)

    def records(self, place: Place, start: int) -> Iterator[tuple[int, Any]]:
        at = 0
        for batch in self._batches(place):
            if at + len(batch) > start:
                skip = max(0, start - at)
                for i, row in enumerate(rows_of(batch, skip, place, at), skip):
                    yield at + i, row
            at += len(batch)

    def _batches(self, place: Place) -> Iterator[Any]:
        """Yield the record batches of a file, with the columns that documents take."""
        api = pyarrow_module()
        with explained(place, "Arrow"):
            with place.open("rb") as file:
                head, size = file.read(len(FILE_MARK)), file.seek(0, 2)
                file.seek(max(0, size - len(STREAM_END)))
                tail = file.read()
            if not size:
                return
            if head != FILE_MARK and tail != STREAM_END:
                raise UserError(
                    f"data file {place}",
                    expected="an Arrow file, or an Arrow stream with its mark of the end",
                    got="a file without it",
                    do="Copy or write it again: it was cut, or is of another kind.",
                )
            source = api.memory_map(str(place)) if isinstance(place, Path) else api.PythonFile(place.open(), mode="r")
            opened = (api.ipc.open_file if head == FILE_MARK else api.ipc.open_stream)(source)
        with source, opened:
            wanted = columns(place, opened.schema.names, self._fields)
            numbers = range(opened.num_record_batches) if head == FILE_MARK else None
            while True:
                with explained(place, "Arrow"):
                    if numbers is None:
                        try:
                            batch = opened.read_next_batch()
                        except StopIteration:
                            return
                    elif not numbers:
                        return
                    else:
                        batch, numbers = opened.get_batch(numbers[0]), numbers[1:]
                yield batch.select(wanted)


def pyarrow_module() -> Any:
    """Return pyarrow. Raises UserError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise UserError(
            "Parquet and Arrow files",
            expected="the package pyarrow",
            got="none",
            do="Run: pip install 'portatrain[files]'",
        ) from error
    return pyarrow


@contextmanager
def explained(place: Place, kind: str) -> Iterator[None]:
    """Convert pyarrow's errors, while entered, to a UserError that names the file."""
    api = pyarrow_module()
    try:
        yield
    except (api.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise unreadable(place, error) from error
        raise UserError(
            f"data file {place}",
            expected=f"a whole {kind} file",
            got=" ".join(str(error).split())[:300] or type(error).__name__,
            do="It was cut or changed, or is of another kind: copy it again, or leave it out by a glob.",
        ) from error


def columns(place: Place, names: Sequence[str], fields: tuple[str, ...]) -> list[str]:
    """Return those of ``fields`` that a file has; a document of one field needs it. Raises UserError if it has none."""
    if twice := [name for name in fields if names.count(name) > 1]:
        raise UserError(
            f"column {twice[0]!r} of {place}",
            expected="one column of that name",
            got=str(names.count(twice[0])),
            do="Write the file with different names.",
        )
    found = [name for name in fields if name in names]
    if not found:
        raise choice(f"column of {place}", fields[0], names)
    return found


def rows_of(batch: Any, skip: int, place: Place, at: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record batch from row ``skip`` on; row 0 is row ``at`` of the file."""
    for i in range(skip, len(batch)):
        try:
            (row,) = batch.slice(i, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{place}, row {at + i}",
                expected="text in UTF-8",
                got=str(error),
                do="Correct the row, or store bytes that are no text in a column of binary.",
            ) from error
        yield row


def _list(found: dict[str, Any], key: str) -> list[Any]:
    """Return the list under `key`; [] if something else is there."""
    return rows if isinstance(rows := found.get(key), list) else []


def _json(place: Place) -> dict[str, Any]:
    try:
        with place.open("rb") as file:
            found = json_files.loads(file.read())
        if isinstance(found, dict):
            return found
    except OSError as error:
        raise unreadable(place, error) from error
    except ValueError:
        pass
    raise UserError(
        f"data file {place}",
        expected="what datasets writes beside a dataset",
        got="no JSON object",
        do="Copy it again.",
    )


def _above(place: Place) -> str:
    return str(PurePosixPath(str(place)).parent) if isinstance(place, Path) else str(place).rpartition("/")[0]
