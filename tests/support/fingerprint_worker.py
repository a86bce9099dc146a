"""One process of a group that restores checkpoint after checkpoint and compares fingerprints, with and without one bit
changed on one process."""

from __future__ import annotations

import argparse
import itertools
import pickle
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import LocalStore, Reader
from portatrain.backends.base import backend_class, simulate_devices
from portatrain.backends.state import full_name
from portatrain.checkpoint import fingerprints
from portatrain.checkpoint.format_layout import format_layout
from portatrain.checkpoint.saver import Checkpoints, reads
from portatrain.system import processes
from tests.support.mesh_cases import CASES


@dataclass
class Found:
    """What one process saw of one checkpoint."""

    honest: list[str] = field(default_factory=list)
    """The tensors that an honest restore is said to have changed: none."""
    flipped: Counter[str] = field(default_factory=Counter)
    """The single bits that changed, each in another tensor or another restore, by role; of process 0."""
    copies: Counter[str] = field(default_factory=Counter)
    """The parameters of which a bit changed in the copy that DeepSpeed keeps beside the one that is saved; of all
    processes."""
    missed: list[str] = field(default_factory=list)
    """Restores after which not exactly the changed tensors were named."""


def with_bits(read: Any, rng: np.random.Generator) -> Any:
    """Return `read` with one bit changed in each of about half of the tensors, in one box that is asked for."""
    left: dict[str, int] = {}

    def wrong(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        array = read(role, name, offset, shape)
        full = full_name(role, name)
        left.setdefault(full, int(rng.integers(2)))
        if left[full] and array.size and (array.ndim < 2 or rng.integers(2)):
            left[full] = 0
            array = np.array(array)
            raw = array.reshape(-1).view(np.uint8)
            raw[int(rng.integers(raw.size))] ^= 1 << int(rng.integers(8))
        return array

    return wrong


def look(backend: Any, folder: str, flips: int, seed: int) -> Found:
    """Restore the checkpoint in `folder` as it is, then with bits changed on one process until there were `flips`."""
    found, done = Found(), 0
    with LocalStore(Path(folder)) as store:
        reader = Reader(store)
        saved = fingerprints.saved_in(reader.meta)
        assert saved is not None and set(saved) == set(reader.names)
        state = backend.restore_state(reads(reader))
        found.honest = fingerprints.compare(backend, state, saved)
        if hasattr(backend, "unequal_copies"):
            change_copies(backend, state, saved, found)
        held = bits_of(backend, state)
        for number in itertools.count():
            if done >= flips:
                return found
            rng = np.random.default_rng((seed, number))
            mine = int(rng.integers(backend.processes)) == backend.process
            state = backend.restore_state(with_bits(reads(reader), rng) if mine else reads(reader))
            named, now = fingerprints.compare(backend, state, saved), bits_of(backend, state)
            # What the state has of the changes: DeepSpeed reads whole parameters, broadcasts and keeps a part.
            mine_1 = np.array([now[name] != held[name] for name in reader.names], np.uint64)
            changed = [n for n, of in zip(reader.names, fingerprints.added_up(backend, mine_1), strict=True) if of]
            done += len(changed)
            if set(named) != set(changed):
                found.missed.append(f"{named} for {changed}")
            if not backend.process:
                found.flipped.update(map(role_of, changed))
    raise AssertionError("never here")


def change_copies(backend: Any, state: Any, saved: Any, found: Found) -> None:
    """Change one bit of each copy of a parameter that is not saved, one after another, each on one process."""
    for i, piece in enumerate(state.pieces):
        part = state.parts.get(i)
        if part is None or (piece.name in found.copies):
            continue
        copy = part.values if backend.stage < 3 else piece.tensor.ds_tensor.detach()[: part.n]
        mine = part.n > 0 and backend.process == i % 2
        holders = fingerprints.added_up(backend, np.array([mine], np.uint64))[0]
        bits, at, bit = copy.view(torch_int32()), i % max(part.n, 1), 1 << i % 31
        if mine:
            bits[at] ^= bit
        named = fingerprints.compare(backend, state, saved)
        if mine:
            bits[at] ^= bit
        wanted = [full_name(piece.role, piece.name)] if holders else []
        found.copies[piece.name] += int(holders)
        if named != wanted:
            found.missed.append(f"{named} for a copy of {wanted}")


def torch_int32() -> Any:
    import torch

    return torch.int32


def bits_of(backend: Any, state: Any) -> dict[str, list[bytes]]:
    """The bits of everything that this process holds, by tensor."""
    found: dict[str, list[bytes]] = {t.name: [] for t in format_layout(backend.program).tensors}
    for box in backend.local_boxes(state):
        found.setdefault(full_name(box.role, box.name), []).append(np.asarray(box.fetch()).tobytes())
    return found


def role_of(full: str) -> str:
    """'opt/v' of 'opt/v/blocks/w'."""
    parts = full.split("/")
    return "/".join(parts[:2]) if parts[0] == "opt" else parts[0]


def main(args: argparse.Namespace) -> int:
    """`args.cells`: [(case, mesh, folder, flips, folder to save into or None)]; every process leaves a pickle of what
    it found in `args.out`."""
    if args.backend == "jax":
        simulate_devices("jax", args.devices)
    else:
        import torch

        torch.set_num_threads(1)
    kind, found, made = backend_class(args.backend), [], {}
    for number, (case, mesh, folder, flips, again) in enumerate(args.cells):
        try:
            if (case, mesh) not in made:
                made = {(case, mesh): kind(CASES[case].program(mesh))}
            backend = made[case, mesh]
            found.append(look(backend, folder, flips, args.seed + number))
            if again is not None:
                with LocalStore(Path(folder)) as store:
                    state = backend.restore_state(reads(Reader(store)))
                checkpoints = Checkpoints(again, process=backend.process, processes=backend.processes)
                checkpoints.save(1, backend, state, {})
                checkpoints.wait()
                backend.agree(0)
        except Exception:
            found.append(traceback.format_exc())
    (Path(args.out) / str(processes.rank() or 0)).write_bytes(pickle.dumps(found))
    return 0
