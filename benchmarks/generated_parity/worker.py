"""One process of a group that traces cells, one after another."""

from __future__ import annotations

import argparse
import pickle
import traceback
from pathlib import Path
from typing import Any

from benchmarks.generated_parity.cells import STEPS, Cell
from portatrain.backends.base import backend_class, simulate_devices
from portatrain.system.processes import rank
from portatrain.testing import parity


def main(args: argparse.Namespace) -> int:
    """`args.cells`: [(number, fields of a `Cell`)], all on one backend and as many devices; (number, trace) of each
    goes into `args.out`, a pickle after another, as soon as it is there."""
    cells = [(number, Cell(**{**fields, "overrides": tuple(fields["overrides"])})) for number, fields in args.cells]
    first = cells[0][1]
    simulate_devices(first.backend, first.devices)
    if first.backend != "jax":
        import torch

        torch.set_num_threads(1)
    with Path(args.out if rank() == 0 else "/dev/null").open("ab") as out:
        for number, cell in cells:
            recipe = cell.recipe()
            found: Any
            try:
                given = parity.batches(recipe, STEPS)
                found = parity.trace(backend_class(cell.backend), recipe, given, mesh=cell.mesh)
            except Exception:
                found = traceback.format_exc()
            pickle.dump((number, found), out)
            out.flush()
    return 0
