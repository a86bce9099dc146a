"""A side that runs in other processes: with another Python, so with the packages of another environment, or on a mesh
with a process a device.

The processes run the code of this portatrain and the recipe's file. They take requests from a folder, numbered files,
and each writes its answer beside them: states and gradients as logical tensors, and what every operation took and gave.
"""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.backends.base import Arrays, process_per_device
from portatrain.backends.reference.watched import watch_oracle
from portatrain.backends.watched import Body, Watched
from portatrain.errors import UserError
from portatrain.model.layout import Mesh
from portatrain.recipe import Recipe, load_recipe
from portatrain.system.processes import free_port
from portatrain.testing.bisect.sides import Running, Side
from portatrain.testing.bisect.together import together
from portatrain.testing.recipe_check.measured import boxes_of, put_together

POLL_S = 0.005
PARENT_S = 2.0
"""How often a process looks whether the one that asks it still runs."""
SHOWN = 12
"""Packages that are listed."""


def running(side: Side) -> Running:
    """Return a side that runs: in this process if that can be, else served by others."""
    devices = Mesh.parse(side.mesh).devices
    if side.python or (side.make is None and devices > 1 and process_per_device(side.backend)):
        return Served(side)
    return Running(side)


class Served(Running):
    """A `Running` whose backend is in other processes; there is one state at a time, and it is there."""

    def __init__(self, side: Side) -> None:
        self._describe(side)
        devices = Mesh.parse(side.mesh).devices
        self.processes = devices if process_per_device(side.backend) else 1
        self._folder = tempfile.TemporaryDirectory(prefix="portatrain-bisect-")
        self._path, self._number = Path(self._folder.name), 0
        job = {
            "name": side.name,
            "recipe": side.recipe.to_json(),
            "source": side.source,
            "backend": side.backend,
            "mesh": side.mesh,
            "named_kernels": side.kernels,
            "cwd": os.getcwd(),
        }
        _write(self._path / "job", job)
        root = str(Path(__file__).parents[3])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
        if self.processes > 1:
            env |= {"WORLD_SIZE": str(devices), "LOCAL_WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1"}
            env["MASTER_PORT"] = str(free_port())
        self._started: list[subprocess.Popen[bytes]] = []
        try:
            for r in range(self.processes):
                self._started.append(self._start(side, env, r))
            self.packages: dict[str, str] = self._answers()[0]
        except BaseException:
            self.close()
            raise

    def _start(self, side: Side, env: Mapping[str, str], r: int) -> subprocess.Popen[bytes]:
        mine = {**env, "RANK": str(r), "LOCAL_RANK": str(r)} if self.processes > 1 else dict(env)
        command = [side.python or sys.executable, "-m", "portatrain.testing.bisect.served"]
        command += [str(self._path), str(r), str(os.getpid())]
        try:
            with (self._path / f"said-{r}").open("wb") as said:
                return subprocess.Popen(command, env=mine, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        except OSError as error:
            raise UserError(
                f"the Python of {self.name}",
                expected="the path of a Python, such as the bin/python of a virtual environment",
                got=f"{side.python}: {error.strerror or error}",
                do="Give --python-a and --python-b such paths.",
            ) from None

    def close(self) -> None:
        """End the processes."""
        for process in self._started:
            process.kill()
            process.wait()
        self._folder.cleanup()

    # ---- requests

    def _ask(self, what: str, *given: Any) -> list[Any]:
        """Return the answers of all processes."""
        self._number += 1
        _write(self._path / f"request-{self._number}", (what, given))
        return self._answers()

    def _answers(self) -> list[Any]:
        paths = [self._path / f"answer-{self._number}-{r}" for r in range(self.processes)]
        while not all(path.exists() for path in paths):
            for r, process in enumerate(self._started):
                if process.poll() is not None and not paths[r].exists():
                    raise self._ended(r, process.returncode)
            time.sleep(POLL_S)
        found = [pickle.loads(path.read_bytes()) for path in paths]
        for value in found:
            if isinstance(value, UserError):
                raise value
        return found

    def _ended(self, r: int, code: int) -> UserError:
        lines = (self._path / f"said-{r}").read_text(errors="replace").strip().splitlines()
        return UserError(
            f"{self.name} in its own process",
            expected="a Python of 3.11 or newer with NumPy, ml_dtypes, rich, google-crc32c and the backend's framework",
            got=f"it ended with exit code {code}{f': {lines[-1]}' if lines else ''}",
            do="Install them there, or give another Python.",
        )

    # ---- what a side does

    def state(self, arrays: Mapping[str, np.ndarray]) -> Any:
        self._arrays = arrays
        self._ask("state", dict(arrays))
        return None

    def whole(self, state: Any) -> Arrays:
        return put_together(self.program, self._ask("boxes"))

    def gradients(self, state: Any, batch: Mapping[str, np.ndarray], step: int) -> tuple[float, Arrays]:
        found: tuple[float, Arrays] = self._ask("gradients", dict(batch), step)[0]
        return found

    def stepped(self, state: Any, batch: Mapping[str, np.ndarray], step: int, scale: float) -> Any:
        self._ask("stepped", dict(batch), step, scale)
        return None

    def watch(self, state: Any, batch: Mapping[str, np.ndarray], step: int) -> list[Watched] | None:
        found: list[list[Watched] | None] = self._ask("watch", dict(batch), step)
        if self.processes == 1 or found[0] is None:
            return found[0]
        made = []
        for m, parts in enumerate(zip(*(one or () for one in found), strict=True)):
            micro = {k: v[m] for k, v in batch.items()}
            given = self.parameters(self._arrays), micro, self.context(micro, step)
            whole, _ = watch_oracle(self.definition, *given, states=self.states(self._arrays))
            made.append(together(self.program.layout.mesh, parts, whole))
        return made


def other_packages(a: Running, b: Running) -> list[str]:
    """Return a note on the packages that differ between the environments of two sides; empty if none does."""
    if not isinstance(a, Served) and not isinstance(b, Served):
        return []
    held = [side.packages if isinstance(side, Served) else packages() for side in (a, b)]
    names = sorted(n for n in held[0].keys() | held[1].keys() if held[0].get(n) != held[1].get(n))
    if not names:
        return []
    pairs = [f"{n} {held[0].get(n, 'none')} and {held[1].get(n, 'none')}" for n in names[:SHOWN]]
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"packages that differ between {a.name} and {b.name}: {', '.join(pairs)}{more}"]


def packages() -> dict[str, str]:
    """Return the versions of Python and of all packages of this environment, the first of a name on the path.

    A copy that a package has of another one (setuptools puts the folder of its own on the path) is none of them.
    """
    found = {"python": platform.python_version()}
    installed = [path for path in sys.path if not re.search(r"[/\\](site|dist)-packages[/\\].", path)]
    for one in importlib.metadata.distributions(path=installed):
        name = (one.metadata["Name"] or "").lower().replace("-", "_")
        if name and name != "portatrain":  # its code is this one
            found.setdefault(name, one.version)
    return found


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(pickle.dumps(value))
    partial.rename(path)


# ---- in such a process


def main(folder: Path, rank: int, parent: int) -> None:
    """Answer requests until the process that asks has ended."""
    job = pickle.loads((folder / "job").read_bytes())
    number = 0
    try:
        if job["source"]:
            load_recipe(job["source"], cwd=Path(job["cwd"]))  # its classes are then found by their names
        settings = {key: job[key] for key in ("name", "backend", "mesh")}
        recipe = Recipe.from_json(job["recipe"])
        here = Running(Side(recipe=recipe, kernels=job["named_kernels"], **settings))
        found: Any = packages()
    except UserError as error:
        found = error
    state: Any = None
    while True:
        _write(folder / f"answer-{number}-{rank}", found)
        number += 1
        if not _waited(folder / f"request-{number}", parent):
            return
        what, given = pickle.loads((folder / f"request-{number}").read_bytes())
        try:
            if what == "state":
                state, found = here.state(*given), None
            elif what == "boxes":
                found = boxes_of(here.backend, state)
            elif what == "gradients":
                found = here.gradients(state, *given)
            elif what == "stepped":
                state, found = here.stepped(state, *given), None
            else:
                found = _plain(here.watch(state, *given))
        except UserError as error:
            found = error


def _waited(path: Path, parent: int) -> bool:
    """Return True once the file is there; False if the process that asks has ended."""
    looked_s = time.monotonic()
    while not path.exists():
        if time.monotonic() - looked_s > PARENT_S:
            if os.getppid() != parent:
                return False
            looked_s = time.monotonic()
        time.sleep(POLL_S)
    return True


def _plain(found: list[Watched] | None) -> list[Watched] | None:
    """Leave out functions of the model, which are of this process; those of the oracle are taken instead."""
    for watched in found or ():
        for call in watched.calls:
            args, options = call.template
            call.template = (tuple(replace(a, run=_gone) if isinstance(a, Body) else a for a in args), options)
    return found


def _gone(*given: Any) -> Any:
    raise AssertionError("a function of another process")


if __name__ == "__main__":
    from portatrain.testing.bisect import served  # what it sends belongs to that module, and not to __main__

    served.main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
