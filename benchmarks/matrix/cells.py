"""Define the parity matrix: backends x meshes x rows. A row is a recipe with its overrides.

The recipe files are the shipped ones, byte for byte; sizes are overrides, and the same for all cells of a row. Only the
mesh of three devices also has sizes of its own, which three divides, beside the recipe's sizes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from portatrain.backends.base import backend_class, devices_a_process, missing
from portatrain.backends.program import Program, make_program
from portatrain.errors import UserError
from portatrain.model.layout import Mesh
from portatrain.recipe import Recipe, apply_overrides, load_recipe

STEPS = 20

_LM = ["model.layers=2", "model.embed=64", "model.mlp=192", "data.seq_len=64", "batch=16", "clip_norm=none"]
_VIT = ["model.layers=2", "model.dropout=0.0", "batch=16", "clip_norm=none"]

ROWS: dict[str, tuple[str, list[str]]] = {
    "tiny-lm": ("tiny-lm", _LM),
    "tiny-vit": ("tiny-vit", _VIT),
    "accumulation 4": ("tiny-lm", [*_LM, "accumulation=4"]),
    "dropout": ("tiny-lm", [*_LM, "model.dropout=0.1"]),
}

BY_THREE = {"tiny-lm": ["batch=24", "model.embed=96", "model.mlp=288"], "tiny-vit": ["batch=24", "model.embed=96"]}
"""Overrides that make three divide the sizes."""

MESHES = {
    "1": "",
    "fsdp=4": "fsdp=4",
    "replica=2,fsdp=2": "replica=2,fsdp=2",
    "tensor=2": "tensor=2",
    "fsdp=2,tensor=2": "fsdp=2,tensor=2",
    "context=2": "context=2",
    "fsdp=2,context=2,tensor=2": "fsdp=2,context=2,tensor=2",
    "fsdp=3, sizes by three": "fsdp=3",
    "fsdp=3, sizes as they are": "fsdp=3",
}


@dataclass(frozen=True, kw_only=True)
class How:
    """A column: a backend and how it runs. processes: None means one a device. elsewhere: the environment
    variable that names another Python for a backend that cannot share this environment."""

    backend: str
    processes: int | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    elsewhere: str | None = None

    def make(self) -> Callable[[Program], Any]:
        found = backend_class(self.backend)
        return lambda program: found(dataclasses.replace(program, **dict(self.changes)))


BACKENDS: dict[str, How] = {
    "jax": How(backend="jax", processes=1),
    "jax, 2 processes": How(backend="jax", processes=2),
    "torch": How(backend="torch", changes=(("compile", False),)),
    "torch, compiled": How(backend="torch", changes=(("compile", True),)),
    "deepspeed-1": How(backend="deepspeed-1"),
    "deepspeed-2": How(backend="deepspeed-2"),
    "deepspeed-3": How(backend="deepspeed-3"),
    "torch-xla": How(backend="torch-xla", processes=1, elsewhere="PORTATRAIN_XLA_PYTHON"),
}


def recipe_of(mesh: str, row: str) -> Recipe:
    name, overrides = ROWS[row]
    more = BY_THREE[name] if mesh.endswith("by three") else []
    return apply_overrides(load_recipe(name), [*overrides, *more, f"steps={STEPS}", "schedule.warmup=5"])


def baseline_of(mesh: str, row: str) -> str:
    """Return the name of the one-device run that a cell is compared with."""
    return f"{row}, by three" if mesh.endswith("by three") else row


def refusal(backend: str, mesh: str, row: str) -> str | None:
    """Return the error that a cell ends in before anything starts, or None."""
    how = BACKENDS[backend]
    try:
        program = make_program(recipe_of(mesh, row), mesh=MESHES[mesh])
        if how.processes is not None:
            devices_a_process(program.layout.mesh.devices, how.processes)
    except UserError as error:
        return str(error)
    return None


def processes(backend: str, mesh: str) -> int:
    return BACKENDS[backend].processes or Mesh.parse(MESHES[mesh]).devices


def interpreter(backend: str) -> str | None:
    """Return the Python that runs the cells of a column; None if its backend is not installed."""
    how = BACKENDS[backend]
    if not missing(how.backend):
        return sys.executable
    return os.environ.get(how.elsewhere) if how.elsewhere else None


def installed(backend: str) -> bool:
    return interpreter(backend) is not None


def cover() -> list[tuple[str, str, str]]:
    """Return cells in which every pair of backend and mesh, backend and row, mesh and row occurs."""
    rows = list(ROWS)
    return [
        (backend, mesh, rows[(b + m) % len(rows)])
        for b, backend in enumerate(BACKENDS)
        for m, mesh in enumerate(MESHES)
    ]
