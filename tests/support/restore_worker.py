"""One process of a group that restores checkpoint after checkpoint, with copies read by everyone and in parts."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from checkpoints_format import Box, LocalStore, Reader
from portatrain.backends.base import backend_class, simulate_devices
from portatrain.backends.state import full_name
from portatrain.checkpoint import shared_reads
from portatrain.checkpoint.restore import restored
from portatrain.checkpoint.saver import Checkpoints
from portatrain.system import processes
from portatrain.system.environment import READ_ONCE
from tests.support.mesh_cases import CASES


class Counting(LocalStore):
    """Counts the bytes that are asked of the packs."""

    nbytes = 0

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        if name.startswith("pack-"):
            self.nbytes += sum(b.nbytes for b in buffers)
        super().read_into(name, offset, buffers)


def wrong_part(self: shared_reads.Share, mesh: Any, at: Any, offset: Any, shape: Any) -> Any:
    """`Share.part` of a process that always takes the first part."""
    return PART(self, mesh, dict.fromkeys(at, 0), offset, shape)


PART = shared_reads.Share.part


def crossed(devices: Sequence[Any]) -> list[Any]:
    """An order of four devices in which neighbours belong to different processes, as on the torus of several hosts."""
    return [devices[i] for i in (0, 2, 1, 3)]


def restore(backend: Any, folder: str, how: str, again: Path) -> tuple[int, list[str], int]:
    """(bytes read of values, names of boxes that are not the checkpoint's, boxes looked at). 'crossed' is also saved
    into `again`."""
    wrong = mock.patch.object(shared_reads.Share, "part", wrong_part) if how == "wrong" else nullcontext()
    said = {READ_ONCE.name: "0" if how == "each" else "1"}
    with Counting(Path(folder)) as store, mock.patch.dict("os.environ", said), wrong:
        through = Reader(store)
        state = restored(backend, through)
        nbytes = store.nbytes - sum(table.nbytes for table in through._tables.values())
        boxes = [(full_name(b.role, b.name), Box(b.offset, b.shape), b.fetch()) for b in backend.local_boxes(state)]
        off = [n for n, box, array in boxes if np.asarray(array).tobytes() != through.read(n, box).tobytes()]
    if how == "crossed":
        checkpoints = Checkpoints(again, process=backend.process, processes=backend.processes)
        checkpoints.save(1, backend, state, {})
        checkpoints.wait()
    return nbytes, off, len(boxes)


def main(args: argparse.Namespace) -> int:
    """`args.cells`: [(case, mesh, folder of a checkpoint, 'each' | 'parts' | 'wrong' | 'crossed')]; every process
    leaves a pickle of what it found in `args.out`."""
    if args.backend == "jax":
        simulate_devices("jax", args.devices)
    else:
        import torch

        torch.set_num_threads(1)
    shared_reads.LEAST_BYTES = 1  # the cases are small
    kind, found = backend_class(args.backend), []
    for case, mesh, folder, how in args.cells:
        try:
            program = dataclasses.replace(CASES[case].program(mesh), seed=1)
            if how == "crossed":
                program = dataclasses.replace(program, order=crossed)
            found.append(restore(kind(program), folder, how, Path(args.out) / f"again {case} {mesh}"))
        except Exception:
            found.append(traceback.format_exc())
    (Path(args.out) / str(processes.rank())).write_bytes(pickle.dumps(found))
    return 0
