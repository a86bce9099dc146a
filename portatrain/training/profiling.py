"""Profile a range of steps: `--profile 100:103` traces steps 100 to 103, both included.

The trace is a file in the attempt's folder; its ten most expensive operations are an event of the attempt. A profile
never ends a run: if it cannot be made, an event has the reason. A run that has already passed the range, because it
resumes behind it, goes on without a profile; one that resumes inside it profiles the rest. Only process 0 traces.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from portatrain.backends.profile import Trace, most_expensive
from portatrain.errors import LONGEST, UserError
from portatrain.runs.events import Kind

if TYPE_CHECKING:
    from portatrain.backends.base import Backend


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """The steps `first` to `last`, both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str, last_step: int) -> StepRange:
        """Return the range 'FIRST:LAST'; UserError unless it lies in steps 1 to `last_step` of the run."""
        found = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", text)
        if found is None:
            raise UserError(
                f"--profile {text}",
                expected="two steps, FIRST:LAST, such as 100:103",
                got=repr(text),
                do="Give the first and the last step to profile, joined by a colon.",
            )
        first, last = int(found[1]), int(found[2])
        if first > last:
            raise UserError(
                f"--profile {text}",
                expected="a first step that is not after the last one",
                got=f"first {first}, last {last}",
                do=f"Use --profile {last}:{first}." if last else "Count steps from 1.",
            )
        if first < 1 or last > last_step:
            raise UserError(
                f"--profile {text}",
                expected=f"steps from 1 to {last_step}, which this run trains",
                got=f"{first} to {last}",
                do="Choose steps of the run, a few after its first, which compiles.",
            )
        return cls(first=first, last=last)

    def __str__(self) -> str:
        return f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"


def check_backend(backend: Backend) -> None:
    """Raise UserError if the backend has no profiler."""
    if getattr(backend, "start_trace", None) is None:
        raise UserError(
            f"--profile on the {backend.name} backend",
            expected="a backend with a profiler (`start_trace`), such as jax, torch or deepspeed-1",
            got="one without",
            do="Leave --profile out, or use another backend.",
        )


class Profile:
    """The profile of one attempt, which process 0 makes. A `with` block stops its trace, however the block ends.

    wanted: the range, or None for no profile. done: the number of steps that the run has trained before. folder: of
    the attempt.
    """

    def __init__(
        self, wanted: StepRange | None, backend: Backend, folder: Path, done: int, event: Callable[..., None]
    ) -> None:
        self._backend, self._folder, self._event = backend, folder, event
        self._trace: Trace | None = None
        self._traced: int | None = None
        """The last step in the trace."""
        if wanted is not None and done >= wanted.last:
            event(Kind.PROFILE_SKIPPED, what=f"{wanted}: the run resumes after step {done}")
            wanted = None
        elif wanted is not None and done >= wanted.first:
            wanted = StepRange(first=done + 1, last=wanted.last)
        self._wanted = None if backend.process else wanted

    def begins(self, step: int) -> bool:
        """Return whether the trace begins with `step`, which has not begun yet."""
        return self._wanted is not None and step == self._wanted.first

    def ends(self, step: int) -> bool:
        """Return whether the trace ends with `step`, which has been trained."""
        return self._trace is not None and self._wanted is not None and step == self._wanted.last

    def start(self) -> None:
        """Start the trace. All earlier steps are over on the device."""
        try:
            self._trace = self._backend.start_trace()  # type: ignore[attr-defined]  # optional
        except Exception as error:  # of the framework's profiler, which raises its own kinds
            self._failed(error)

    def step(self, step: int) -> AbstractContextManager[object]:
        """Mark `step` in the trace, if there is one, for the time of a `with` block."""
        if self._trace is None:
            return contextlib.nullcontext()
        self._traced = step
        return self._trace.step(step)

    def stop(self) -> None:
        """Stop the trace, if there is one, and write it. All of its steps are over on the device."""
        trace, self._trace = self._trace, None
        if trace is None or self._wanted is None:
            return
        made = StepRange(first=self._wanted.first, last=self._traced or self._wanted.first)
        name = f"profile-{made.first}-{made.last}"
        try:
            files, operations = trace.stop(self._folder, name)
        except Exception as error:  # a full disk, or an error of the framework's profiler
            self._failed(error)
            return
        self._event(
            Kind.PROFILED,
            first=made.first,
            last=made.last,
            files=[path.relative_to(self._folder).as_posix() for path in files],
            operations=most_expensive(operations),
        )

    def _failed(self, error: Exception) -> None:
        self._event(Kind.PROFILE_FAILED, what=f"{self._wanted}: {type(error).__name__}: {error}"[:LONGEST])

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
