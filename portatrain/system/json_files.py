"""JSON files that are written atomically, and JSON-lines logs that survive a crash in the middle of a line."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from portatrain.errors import UserError


def write_json(path: Path, data: object) -> None:
    """Write ``data`` atomically: a reader, or a restart after a crash, sees the whole old file or the whole new one."""
    write_text(path, json.dumps(finite(data), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as `write_json` does."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the record of a shared run
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the entries of ``folder`` to disk, so that a rename or a new file in it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Return the JSON in ``path``. Raises UserError if the file is missing, unreadable or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            str(path),
            expected="a JSON file that portatrain wrote",
            got=str(error),
            do="Restore the file from a copy, or use a new run directory.",
        ) from error


class JsonLines:
    """An append-only file with one JSON object per line.

    Each line is passed to the operating system at once, so a killed process loses at most the line that it was writing.
    Floats are written with all their digits; NaN and infinity become null.
    """

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, object]) -> None:
        self._file.write(json.dumps(finite(row), separators=(",", ":"), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``JsonLines`` file, without an incomplete last line; [] if there is no file.

    Raises:
        UserError: a line other than the last one is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):  # without a newline: incomplete
                break
            raise UserError(
                f"{path}, line {number}",
                expected="a JSON object",
                got=f"{line[:60].decode(errors='replace')!r} ({error})",
                do="Remove that line if you know what damaged it.",
            ) from error
        rows.append(row)
    return rows


def finite(value: object) -> object:
    """Return `value` with None for NaN and infinities, which JSON does not have."""

    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
