"""What a launcher is, and how one is found."""

from __future__ import annotations

import importlib
import importlib.metadata
import shlex
from dataclasses import dataclass
from typing import Any, Protocol

GROUP = "portatrain.launchers"
"""The entry-point group that a lab's own launchers register in."""

_OURS = {"local": "launchers.local:LocalLauncher"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to be carried out somewhere."""

    recipe: str
    """A file or a name, as it was given."""
    run_dir: str
    cluster: str
    backend: str | None = None
    """None: the job chooses by what it lands on."""
    overrides: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """The ``portatrain train`` that the job runs, as words."""
        words = ["portatrain", "train", self.recipe, "--run-dir", self.run_dir]
        if self.backend is not None:
            words += ["--backend", self.backend]
        for override in self.overrides:
            words += ["--set", override]
        return words

    def shell(self) -> str:
        """The same as a line for a shell."""
        return shlex.join(self.command())


class Launcher(Protocol):
    """Carries jobs to one kind of place."""

    def materialize(self, job: Job) -> str:
        """Exactly what ``submit`` would hand over, as text; changes nothing."""
        ...

    def submit(self, job: Job) -> int:
        """Hand the job over; in the foreground, see it to its end. The exit code."""
        ...


def launcher_names() -> list[str]:
    """The names that ``--cluster`` may have, ours first."""
    theirs = {point.name for point in importlib.metadata.entry_points(group=GROUP)}
    return [*_OURS, *sorted(theirs - set(_OURS))]


def launcher_class(name: str) -> Any:
    """The class of the launcher ``name``, one of ``launcher_names()``."""
    if name in _OURS:
        module, _, qualname = _OURS[name].partition(":")
        return getattr(importlib.import_module(module), qualname)
    (point,) = importlib.metadata.entry_points(group=GROUP, name=name)
    return point.load()
