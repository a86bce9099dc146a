"""Open the record of a run, wherever it is."""

from __future__ import annotations

from pathlib import Path

from portatrain.runs.run_dir import RunDir
from portatrain.system.urls import is_remote


def open_run(where: str | Path, *, work: bool = False) -> RunDir:
    """The run directory at a path, or at a URL of an object store. `work`: to carry the run out, see `RemoteRun`."""
    if not is_remote(where):
        return RunDir(where)
    from portatrain.runs.remote_run_dir import RemoteRun  # with NumPy: not needed for a folder

    return RemoteRun(str(where), work=work)
