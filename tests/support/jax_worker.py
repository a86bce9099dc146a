"""One process of a group that runs cell after cell on the jax backend, with two simulated devices in each."""

from __future__ import annotations

import argparse
import pickle
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from portatrain.backends.base import simulate_devices
from portatrain.system.processes import rank
from tests.support.mesh_cases import CASES
from tests.support.mesh_measure import measure


def gather(mine: Any) -> list[Any]:
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(pickle.dumps(mine), np.uint8)
    sizes = np.asarray(process_allgather(np.int32(data.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    every = np.asarray(process_allgather(padded))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def first_rows(whole: Any) -> Any:
    """A backend's `_put` that hands every process the rows of the first one."""

    def put(self: Any, batch: Any, lead: int) -> Any:
        def half(v: np.ndarray) -> np.ndarray:
            rows = np.arange(v.shape[lead]) % max(1, v.shape[lead] // 2)
            return np.take(v, rows, axis=lead)

        return whole(self, {k: half(v) for k, v in batch.items()}, lead)

    return put


def main(args: argparse.Namespace) -> int:
    """`args.cells`: [(case, mesh, whether every process is to train on its first rows)] of meshes with the same number
    of devices; `args.out` takes a pickle of each."""
    simulate_devices("jax", args.devices)
    from portatrain.backends.jax import JaxBackend

    with Path(args.out if rank() == 0 else "/dev/null").open("ab") as out:
        for case, mesh, mutant in args.cells:
            try:
                with mock.patch.object(JaxBackend, "_put", first_rows(JaxBackend._put)) if mutant else nullcontext():
                    found: Any = measure(JaxBackend, CASES[case], mesh, gather)
            except Exception:
                found = traceback.format_exc()
            pickle.dump(found, out)
            out.flush()
    return 0
