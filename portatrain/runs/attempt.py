"""One attempt at a run: what it writes of itself into the run directory, fenced by its claim."""

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
    """The part of a run directory that an attempt writes through."""

    def send(self) -> None:
        """Upload this attempt's files; return when they are stored."""

    def put(self, name: str, data: object) -> bool:
        """Write `data` as the JSON file `name` of the run, whole."""


class Attempt:
    """The attempt of this process at a run. Every write checks first that the claim is still ours."""

    def __init__(self, run: Record, number: int, folder: Path, claim: ClaimHandle) -> None:
        self.run, self.number, self.folder, self._claim = run, number, folder, claim
        self._metrics = json_files.JsonLines(folder / "metrics.jsonl")
        self._events = json_files.JsonLines(folder / "events.jsonl")

    @property
    def token(self) -> str:
        """Of the claim; the environment variable `claim.TOKEN` hands it to a process that goes on with it."""
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
        """While entered the run is ours; UserError where it is not.

        The metrics and events so far are synced, or uploaded, first, so that no commit is newer than its rows.
        """
        for file in (self._metrics, self._events):
            file.sync()
        self.run.send()
        with self._claim.guard():
            yield

    def write(self, name: str, data: object) -> None:
        """Write a JSON file of the run directory, such as summary.json, whole."""
        with self.guard():
            self.run.put(name, data)

    def note(self, name: str, data: object) -> None:
        """Write a JSON file of this attempt's folder, such as plan.json, whole."""
        self._claim.fence()
        json_files.write_json(self.folder / name, data)

    def keep_error(self, error: BaseException) -> str:
        """Write the traceback of what ended the attempt into error.txt; return the reason in one line."""
        return keep_error(self.folder / "error.txt", error)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Write summary.json, then DONE: the run is over, and was a success."""
        self.write("summary.json", dict(summary))
        self.write("DONE", {"attempt": self.number, "unix_s": time.time()})

    def close(self) -> None:
        """End the attempt; the run directory is free for the next one, whatever fails before."""
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
            if error is None:  # else that one is told, and this is most likely its consequence
                raise


def keep_error(path: Path, error: BaseException) -> str:
    """Write the traceback of `error` to `path`, if that is possible; return the reason in one line."""
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError, ValueError):
        text = said if isinstance(error, UserError) else "".join(traceback.format_exception(error)).rstrip()
        path.write_text(text + "\n", encoding="utf-8", errors="replace")
    return " ".join(said.split())[:LONGEST]


class NullAttempt:
    """An attempt that another process of the run has begun: the same number, and of its record nothing is written but
    the error of this process."""

    def __init__(self, number: int, folder: Path, process: int) -> None:
        self.number, self.folder, self.process = number, folder, process

    def keep_error(self, error: BaseException) -> str:
        """Write the traceback of what ended this process into error-rank-R.txt; return the reason in one line."""
        return keep_error(self.folder / f"error-rank-{self.process}.txt", error)

    def event(self, kind: str, **fields: object) -> None:
        """Nothing."""

    def guard(self) -> AbstractContextManager[None]:
        """Nothing: the process that began the attempt guards it."""
        return nullcontext()

    def write(self, name: str, data: object) -> None:
        """Nothing."""

    def note(self, name: str, data: object) -> None:
        """Nothing."""

    def finish(self, summary: Mapping[str, object]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def __enter__(self) -> NullAttempt:
        return self

    def __exit__(self, *exc: object) -> None:
        pass
