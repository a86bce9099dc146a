"""Open the record of a run, wherever it is, and find runs by name."""

from __future__ import annotations

import os
from pathlib import Path

from portatrain.errors import UserError, choice
from portatrain.runs.run_dir import RunDir
from portatrain.system.urls import is_remote


def open_run(where: str | Path, *, work: bool = False) -> RunDir:
    """Return the run directory at a path or URL. `work`: True in a process that trains the run, see `RemoteRun`."""
    if not is_remote(where):
        return RunDir(where)
    from portatrain.runs.remote_run_dir import RemoteRun  # imports NumPy, which a folder does not need

    return RemoteRun(str(where), work=work)


def find(name: str, runs: str | Path) -> RunDir:
    """Return the run `name` in the folder `runs`, or at the path `name`; UserError with similar names if there is none.
    Either may be a URL of an object store."""
    if is_remote(name) or is_remote(runs):
        url = name if is_remote(name) else f"{str(runs).rstrip('/')}/{name}"
        if "run.json" in ((run := open_run(url)).entries() or ()):
            return run
        if is_remote(name):
            raise UserError(
                f"run {name}",
                expected="a run of portatrain, with a run.json",
                got="none below that URL",
                do="`launch list --runs URL` lists the runs below one.",
            )
    for path in (Path(runs) / name, Path(name)) if not is_remote(runs) else ():
        if _is_run(path):
            return RunDir(path)
    known = names(runs)
    if not known:
        raise UserError(
            f"run {name!r}",
            expected=f"a run in {runs}",
            got="none there",
            do="Give --runs DIR if your runs are elsewhere, or the path of the run directory.",
        )
    raise choice(f"run {name!r} in {runs}", name, known, listed=f"`launch list --runs {runs}` shows all of them.")


def names(runs: str | Path) -> list[str]:
    """Return the names of the runs in a folder or below a URL, without those that this user may not read."""
    if is_remote(runs):
        from portatrain.runs.remote_run_dir import run_names

        return run_names(str(runs))
    folder = Path(runs)
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if os.access(p, os.X_OK) and _is_run(p))


def _is_run(path: Path) -> bool:
    return (path / "run.json").exists() or (path / "jobs").is_dir()
