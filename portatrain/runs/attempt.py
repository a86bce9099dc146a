"""The record that one attempt writes into the run directory; every write checks the claim first."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from portatrain.errors import LONGEST, UserError
from portatrain.runs.claim import ClaimHandle
from portatrain.system import json_files


class Record(Protocol):
    """The methods of a run directory that an attempt calls to write."""

    def send(self) -> None:
        """Upload this attempt's files; return when they are stored."""

    def put(self, name: str, data: object) -> bool:
        """Write `data` atomically as the JSON file `name` of the run."""


class Attempt:
    """An attempt of this process. Every write checks first that the process still holds the claim."""

    def __init__(self, run: Record, number: int, folder: Path, claim: ClaimHandle) -> None:
        self.run, self.number, self.folder, self._claim = run, number, folder, claim
        self._metrics = json_files.JsonLines(folder / "metrics.jsonl")
        self._events = json_files.JsonLines(folder / "events.jsonl")

    @property
    def token(self) -> str:
        """The token of the claim; a supervisor passes it to its child process in the variable `environment.CLAIM`."""
        return self._claim.owner.token

    def metrics(self, row: Mapping[str, object]) -> None:
        """Append one step to metrics.jsonl."""
        self._claim.fence()
        self._metrics.append(row)

    def event(self, kind: str, **fields: object) -> None:
        """Append one event, with the time, to events.jsonl."""
        self._claim.fence()
        self._events.append({"event": kind, "unix_s": time.time(), **fields})

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Hold the run for writes that are final, such as a commit. Raises UserError if the claim has been lost.

        Syncs or uploads pending metrics and events first, so that no checkpoint is newer than its metrics.
        """
        for file in (self._metrics, self._events):
            file.sync()
        self.run.send()
        with self._claim.guard():
            yield

    def write(self, name: str, data: object) -> None:
        """Write a JSON file of the run directory, such as summary.json, atomically."""
        with self.guard():
            self.run.put(name, data)

    def note(self, name: str, data: object) -> None:
        """Write a JSON file of this attempt's folder, such as plan.json, atomically."""
        self._claim.fence()
        json_files.write_json(self.folder / name, data)

    def keep_error(self, error: BaseException) -> str:
        """Write the traceback of the error that ended the attempt to error.txt; return the reason in one line."""
        return keep_error(self.folder / "error.txt", error)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Write summary.json, then DONE, which marks the run as finished successfully."""
        self.write("summary.json", dict(summary))
        self.write("DONE", {"attempt": self.number, "unix_s": time.time()})

    def abandon(self) -> None:
        """Close the files of an attempt that could not begin."""
        for file in (self._events, self._metrics):
            with contextlib.suppress(OSError):
                file.close()

    def close(self) -> None:
        """Close the files and release the claim; the claim is released even if closing fails."""
        with ExitStack() as stack:
            stack.callback(self._claim.release)
            stack.callback(self.run.send)
            stack.callback(self._events.close)
            stack.callback(self._metrics.close)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except (OSError, UserError):
            if error is None:  # otherwise `error` is reported; this one is probably its consequence
                raise


def keep_error(path: Path, error: BaseException) -> str:
    """Write `error` and its traceback to `path` if possible; return the reason in one line.

    A user's mistake has a traceback only if it is in the user's own code; its paragraph is the last line of the file.
    """
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError, ValueError):
        if isinstance(error, UserError):
            text = f"{error.trace}\n\n{said}" if error.trace else said
        else:
            text = "".join(traceback.format_exception(error)).rstrip()
        path.write_text(text + "\n", encoding="utf-8", errors="replace")
        if isinstance(error, UserError) and error.trace:
            error.kept = str(path)
    return " ".join(said.split())[:LONGEST]


class NullAttempt:
    """The attempt as seen by a process other than process 0, which writes the record.

    It has the same number, and writes nothing but the error of its own process.
    """

    def __init__(self, number: int, folder: Path, process: int) -> None:
        self.number, self.folder, self.process = number, folder, process

    def keep_error(self, error: BaseException) -> str:
        """Write the traceback of this process's error to error-rank-R.txt; return the reason in one line."""
        return keep_error(self.folder / f"error-rank-{self.process}.txt", error)

    def event(self, kind: str, **fields: object) -> None:
        """Do nothing."""

    def guard(self) -> AbstractContextManager[None]:
        """Do nothing: process 0 holds the claim."""
        return nullcontext()

    def write(self, name: str, data: object) -> None:
        """Do nothing."""

    def note(self, name: str, data: object) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, object]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> NullAttempt:
        return self

    def __exit__(self, *exc: object) -> None:
        pass
