"""Measure a small recipe on meshes of processes, for backends with a process a device.

One group of processes runs all meshes. Each process loads the recipe's file again, as a job does. If it fails on a
mesh, the group ends, and another one runs the meshes that are left.
"""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from portatrain.backends.base import Backend, backend_class
from portatrain.backends.program import make_program
from portatrain.errors import UserError, users_code
from portatrain.recipe import Recipe, load_recipe
from portatrain.system.exit_codes import OK
from portatrain.system.processes import rank, run_processes
from portatrain.testing.recipe_check.measured import Arrays, Measured, measure
from portatrain.testing.recipe_check.report import CheckFailed

DEVICES = 2


def on_meshes(
    backend: str,
    recipe: Recipe,
    source: str,
    meshes: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    points: Mapping[str, Arrays],
    states: Arrays,
) -> dict[str, Measured | UserError]:
    """Return what `backend` gives on each of `meshes`, or the error in which it ended there.

    Args:
        source: the recipe's file or name, as `load_recipe` takes it. `recipe` may differ from the recipe there.
    """
    job = {
        "backend": backend,
        "recipe": recipe.to_json(),
        "source": source,
        "batches": [dict(batch) for batch in batches],
        "points": {name: dict(params) for name, params in points.items()},
        "states": states,
    }
    found: dict[str, Measured | UserError] = {}
    while left := [mesh for mesh in meshes if mesh not in found]:
        with tempfile.TemporaryDirectory(prefix="portatrain-check-") as folder:
            Path(folder, "job").write_bytes(pickle.dumps(job | {"meshes": left}))
            try:
                code = run_processes(DEVICES, f"{__name__}:main", {"folder": folder, "cwd": os.getcwd()})
                error: UserError = CheckFailed(
                    f"{backend} on {left[0]}",
                    expected=f"{DEVICES} processes that end",
                    got=f"exit code {code}",
                    do="The check itself failed, which says nothing of the recipe. The lines above say more.",
                )
            except UserError as raised:
                error = raised
            for mesh, value in _results(Path(folder, "found")):
                found[mesh] = value
        failed = next((mesh for mesh in left if mesh not in found), None)
        if failed is not None:
            found[failed] = error
    return found


def _results(path: Path) -> list[tuple[str, Measured]]:
    found = []
    if path.exists():
        with path.open("rb") as file:
            while file.peek(1):
                found.append(pickle.load(file))
    return found


def main(args: argparse.Namespace) -> int:
    """One process of the group."""
    folder = Path(args.folder)
    job = pickle.loads((folder / "job").read_bytes())
    load_recipe(job["source"], cwd=Path(args.cwd))  # its classes are then found by their names
    recipe, cls = Recipe.from_json(job["recipe"]), backend_class(job["backend"])
    for mesh in job["meshes"]:
        backend = cls(make_program(recipe, mesh=mesh))  # a failure of this, as of the network, is not the model's
        try:
            value = measure(
                backend, job["batches"], job["points"], job["states"], gather=_gathering(backend, folder / mesh)
            )
        except Exception as error:
            if isinstance(error, (UserError, OSError)) or users_code.is_machines(error):
                raise
            what = f"{job['backend']} on {mesh}"
            line = users_code.at_line(error, called=True)
            raise users_code.explained(error, what if line else "") or UserError(
                what,
                expected="a step that ends",
                got=f"{type(error).__name__}: {error}",
                do="It ends on one device: look for shapes or values that the model takes from a device's own part.",
            ) from error
        if rank() == 0:
            with (folder / "found").open("ab") as out:
                pickle.dump((mesh, value), out)
    return OK


def _gathering(backend: Backend, folder: Path) -> Callable[[Any], list[Any]]:
    """Return a function that gives process 0 what every process holds, through files."""

    def gather(mine: Any) -> list[Any]:
        folder.mkdir(exist_ok=True)
        (folder / str(rank())).write_bytes(pickle.dumps(mine))
        backend.agree(0)
        if rank():
            return []
        return [pickle.loads(path.read_bytes()) for path in sorted(folder.iterdir())]

    return gather
