"""One process of a group that traces generated cells, one after another."""

from __future__ import annotations

import argparse
import pickle
import traceback
from pathlib import Path
from typing import Any

from portatrain.backends.base import backend_class, simulate_devices
from portatrain.system.processes import rank
from portatrain.testing import parity
from tests.support.generated_cells import STEPS, generated


def main(args: argparse.Namespace) -> int:
    """`args`: seed and count of `generated`, the `numbers` of cells to run, all on one backend and as many devices;
    (number, trace) of each goes into `out`, a pickle after another."""
    cells = generated(args.seed, args.count)
    first = cells[args.numbers[0]]
    simulate_devices(first.backend, first.devices)
    if first.backend != "jax":
        import torch

        torch.set_num_threads(1)
    with Path(args.out if rank() == 0 else "/dev/null").open("ab") as out:
        for number in args.numbers:
            recipe = cells[number].recipe()
            found: Any
            try:
                given = parity.batches(recipe, STEPS)
                found = parity.trace(backend_class(first.backend), recipe, given, mesh=cells[number].mesh)
            except Exception:
                found = traceback.format_exc()
            pickle.dump((number, found), out)
            out.flush()
    return 0
