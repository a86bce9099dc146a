"""Run some rows of one backend on one mesh as one process of a group, and make the baselines for comparison."""

from __future__ import annotations

import argparse
import json
import pickle
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.matrix.cells import BACKENDS, MESHES, STEPS, recipe_of
from portatrain.backends.base import simulate_devices
from portatrain.errors import UserError
from portatrain.model.layout import Mesh
from portatrain.system.processes import rank
from portatrain.testing import parity


def main(args: argparse.Namespace) -> int:
    """Run `args`: backend, mesh, rows as [(row, file of its baseline)]; write one line of JSON for each row to
    `out`."""
    how, mesh = BACKENDS[args.backend], MESHES[args.mesh]
    simulate_devices(how.backend, Mesh.parse(mesh).devices)
    if how.backend != "jax":
        import torch

        torch.set_num_threads(1)
    with Path(args.out if rank() == 0 else "/dev/null").open("a") as out:
        for row, file in args.rows:
            began_s = time.perf_counter()
            found: dict[str, Any]
            try:
                given, baseline = pickle.loads(Path(file).read_bytes())
                recipe = recipe_of(args.mesh, row)
                bound = parity.bound_of(recipe, given)
                verdict = parity.compare(baseline, parity.trace(how.make(), recipe, given, mesh=mesh), bound=bound)
                found = {"gradient": verdict.gradient, "loss": verdict.loss, "norm": verdict.norm}
                found |= {"of": verdict.worst_gradient, "bound": bound}
            except UserError as error:
                found = {"refused": str(error)}
            except Exception:
                found = {"failed": traceback.format_exc()[-4000:]}
            found["seconds"] = round(time.perf_counter() - began_s, 1)
            out.write(json.dumps({"row": row, **found}) + "\n")
            out.flush()
            if "failed" in found:
                return 1  # the processes may no longer be at the same point
    return 0


def baselines(args: argparse.Namespace) -> int:
    """Write the batches and the trace of one jax device in fp32 for `args.rows`: [(mesh, row, file)]."""
    from portatrain.backends.jax import JaxBackend

    for mesh, row, file in args.rows:
        recipe = recipe_of(mesh, row)
        given = parity.batches(recipe, STEPS)
        made = pickle.dumps((given, parity.trace(JaxBackend, recipe, given)))
        partial = Path(file).with_suffix(".partial")
        partial.write_bytes(made)
        partial.replace(file)
    return 0
