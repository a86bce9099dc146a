"""Find a checkpoint by the path that a user gives, and explain a path that has none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoints_format import LocalStore, NotCommittedError, Reader, Store
from portatrain.checkpoint import locations
from portatrain.checkpoint.errors import explained
from portatrain.errors import UserError, of_reading
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files
from portatrain.system.urls import SCHEMES


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    """A checkpoint: its folder or URL, and its step if the name gives it."""

    path: Path | str
    step: int | None
    listed: bool = False
    """True if it was found in a folder of checkpoints, in which no link is followed; a user's own path may be one."""

    def open(self) -> Store:
        if isinstance(self.path, Path):
            if self.listed:
                locations.refuse_link(self.path)
            return LocalStore(self.path)
        from portatrain.checkpoint.object_store import ObjectStore

        return ObjectStore(self.path)


def places(given: Path | str) -> list[FoundCheckpoint]:
    """Return the checkpoints at a path or URL, sorted by step.

    The path is a run directory, its folder of checkpoints, or one checkpoint. Only the file COMMIT tells if a
    checkpoint is complete. Raises UserError for any other path.
    """
    what = f"checkpoint {given}"
    if str(given).startswith(SCHEMES):
        return _remote(str(given))
    path = Path(given)
    if (path / "checkpoints.json").is_file():
        return _remote(str(RunDir(path).checkpoints()))
    if not path.exists():
        raise UserError(what, expected="a run directory or a checkpoint", got="no such folder", do="Check the path.")
    if not path.is_dir():
        raise UserError(what, expected="a run directory or a checkpoint", got="a file", do="Give its folder.")
    try:
        names = {p.name for p in path.iterdir()}
        if "COMMIT" in names or any(n.startswith("root-") for n in names):
            step = path.name[5:] if path.name.startswith("step-") else ""
            return [FoundCheckpoint(path=path, step=json_files.digits(step))]
        folder = path / "checkpoints" if "checkpoints" in names else path
        steps = sorted(
            (n, p)
            for p in folder.iterdir()
            if p.name.startswith("step-") and (n := json_files.digits(p.name[5:])) is not None
        )
    except PermissionError as error:
        raise UserError(
            what, expected="a folder that can be read", got="no permission", do="Ask for it, or copy the folder."
        ) from error
    except OSError as error:
        raise of_reading(error)(
            what, expected="a folder that can be read", got=str(error), do="Restore it from a copy, or check the path."
        ) from error
    if not steps:
        raise UserError(
            what,
            expected="a run directory or a checkpoint",
            got="an empty folder" if not names else f"a folder with {', '.join(sorted(names)[:4])}",
            do="A run directory has run.json and checkpoints/step-NNNNNNNN; a checkpoint has a COMMIT.",
        )
    return [FoundCheckpoint(path=p, step=step, listed=True) for step, p in steps]


def _remote(url: str) -> list[FoundCheckpoint]:
    last = url.rstrip("/").rpartition("/")[2]
    if locations.steps_of([last]):
        return [FoundCheckpoint(path=url, step=locations.steps_of([last])[0])]
    with explained():
        steps = locations.location_of(url).steps()
        if not steps and (inside := locations.location_of(f"{url.rstrip('/')}/checkpoints").steps()):  # a run directory
            url, steps = f"{url.rstrip('/')}/checkpoints", inside
    if not steps:
        raise UserError(
            f"checkpoint {url}",
            expected="checkpoints below it",
            got="nothing",
            do="Check the URL, and that the environment's credentials may list it.",
        )
    return [FoundCheckpoint(path=f"{url.rstrip('/')}/{locations.step_name(s)}", step=s) for s in steps]


def _none_trusted(path: Path | str) -> UserError:
    return UserError(
        f"checkpoint {path}",
        expected="a checkpoint that is trusted",
        got="only such as were saved after the last agreement before a device computed wrong numbers",
        do="Resume the run, or name the step to use one of them all the same.",
    )


@contextlib.contextmanager
def opened(path: Path | str, step: int | None = None) -> Iterator[Reader]:
    """Open the checkpoint of `step`, by default the newest committed one that is trusted. Every error is a
    UserError."""
    found, distrusts = places(path), False
    if step is not None:
        chosen = [p for p in found if p.step == step]
        if not chosen:
            steps = ", ".join(str(p.step) for p in found)
            raise UserError(
                f"checkpoint {path}",
                expected=f"step {step} among its checkpoints",
                got=f"steps {steps}",
                do="Choose one of these.",
            )
        found = chosen
    elif isinstance(found[0].path, Path) and found[0].listed and (Path(path) / "run.json").is_file():
        doubted, there = RunDir(Path(path)).doubted(), len(found)
        found = [one for one in found if one.step not in doubted]
        distrusts = len(found) < there
        if not found:
            raise _none_trusted(path)
    for checkpoint in reversed(found):
        with explained(), contextlib.closing(checkpoint.open()) as store:
            try:
                reader = Reader(store)
            except NotCommittedError:
                if checkpoint is found[0]:
                    if distrusts:  # the others are committed, and not trusted
                        raise _none_trusted(path) from None
                    raise
                continue
            from portatrain.checkpoint.format_layout import check_step, check_tiles  # with NumPy: a listing needs none

            if checkpoint.step is not None:
                check_step(reader, checkpoint.step, store.describe("COMMIT"))
            check_tiles(reader)
            yield reader
            return
