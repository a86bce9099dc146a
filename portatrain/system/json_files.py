"""JSON files that are written atomically, and JSON-lines logs that survive a crash in the middle of a line.

JSON has no NaN and no infinities. Here they are written as the texts "nan", "inf" and "-inf" (`strict`), and `number`
reads them back. It also reads null as NaN, since earlier versions wrote null for all three.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from portatrain.errors import UserError, of_reading


def write_json(path: Path, data: object) -> None:
    """Write ``data`` atomically: a reader, or a restart after a crash, sees the whole old file or the whole new one."""
    write_text(path, json.dumps(strict(data), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write `text` as `write_json` does; the umask is taken from `mode`."""
    temporary = str(path.with_name(f".{path.name}.{secrets.token_hex(6)}"))
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
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


def loads(text: str | bytes) -> Any:
    """Return the JSON in `text`. Raises ValueError if it is none, also if it is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def read_json(path: Path) -> Any:
    """Return the JSON in ``path``. Raises UserError if the file is missing, unreadable or damaged."""
    try:
        return loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise of_reading(error)(
            str(path),
            expected="a JSON file that portatrain wrote",
            got=str(error),
            do="Restore the file from a copy, or use a new run directory.",
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``. Raises UserError if it is missing, unreadable or something else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(
            str(path),
            expected="a JSON object that portatrain wrote",
            got=f"{json.dumps(found)[:60]}",
            do="Restore the file from a copy, or use a new run directory.",
        )
    return found


class JsonLines:
    """An append-only file with one JSON object per line.

    Each line is passed to the operating system at once, so a killed process loses at most the line that it was writing.
    Floats are written with all their digits.
    """

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, object]) -> None:
        self._file.write(json.dumps(strict(row), separators=(",", ":"), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush the appended lines to disk, so that they survive a power failure."""
        if not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            with contextlib.suppress(OSError):  # what could not be written above cannot be written now
                self._file.close()


def read_lines(path: Path, check: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row) -> list[dict[str, Any]]:
    """Return the rows of a ``JsonLines`` file, without an incomplete last line; [] if there is no file.

    `check` converts a row to its final form, or raises ValueError.

    Raises:
        UserError: a line other than the last one is damaged, or the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise of_reading(error)(
            str(path), expected="a file that can be read", got=str(error), do="Restore the file from a copy."
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            row = check(row)
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


def strict(value: object) -> Any:
    """Return `value` with "nan", "inf" and "-inf" for the numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def number(value: object) -> float:
    """Return a number that `strict` wrote, which may be NaN or infinite; None is NaN.

    Raises:
        ValueError: `value` is something else.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or (isinstance(value, str) and value not in ("nan", "inf", "-inf")):
        raise ValueError(f"{value!r:.60} is no number")
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r:.60} is no number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a number that is too large") from None


def digits(text: str) -> int | None:
    """Return the number in `text`, a part of a file name, or None if it is not up to 12 decimal digits."""

    return int(text) if text.isascii() and text.isdigit() and len(text) <= 12 else None
