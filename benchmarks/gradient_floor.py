"""Compare the gradients of a first step in float32 with the same step in float64: the floor for any comparison of two
backends. It runs on one device, for any row of the parity matrix.

    python -m benchmarks.gradient_floor [--row tiny-vit] [--mesh "fsdp=3, sizes by three"]

In float64 the torch backend runs, eagerly: its parameters and inputs converted, its casts to float32 made casts to
float64. Prints for every parameter the largest difference over the largest gradient.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import torch

from benchmarks.exact_gradients import exact
from benchmarks.matrix.cells import MESHES, ROWS, recipe_of
from portatrain.backends.jax import JaxBackend
from portatrain.backends.program import make_program
from portatrain.backends.torch import TorchBackend
from portatrain.testing import parity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", default="tiny-vit", choices=list(ROWS))
    parser.add_argument("--mesh", default="1", choices=list(MESHES), help="whose sizes: one device runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = recipe_of(args.mesh, args.row)
    batch = parity.batches(recipe, 1)[0]
    program = dataclasses.replace(make_program(recipe), compile=False)
    truth = exact(program, batch)
    found = {}
    for make in (JaxBackend, TorchBackend):
        backend = make(program)
        found[make.name] = backend.gradients(backend.init_state(), batch, step=1)[1]
    print(f"{args.row}: gradients of step 1, largest difference over the largest value")
    print(f"{'':28s}{'jax - float64':>15s}{'torch - float64':>17s}{'jax - torch':>13s}")
    for name in sorted(truth):
        top, jax, mine = np.abs(truth[name]).max(), found["jax"][name], found["torch"][name]
        apart = [np.abs(a - b).max() / top for a, b in ((jax, truth[name]), (mine, truth[name]), (jax, mine))]
        print(f"{name:28s}{apart[0]:15.1e}{apart[1]:17.1e}{apart[2]:13.1e}")


if __name__ == "__main__":
    main()
