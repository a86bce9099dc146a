"""One process of a group that trains one short run after another, each with a bit flipped on one device, or with none.

A cell is (name of the run, mesh, site, position of the device, last step that is good). Site 'copy' flips a bit of a
parameter at rest in the device's own copy, 'sum' one of a gradient after it was summed over the devices, in what this
process has of it, '' none; the others are those of `refereed.flips`.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import refereed
from portatrain.backends.base import backend_class, simulate_devices
from portatrain.errors import MachineError
from portatrain.runs.run_dir import RunDir
from portatrain.system.processes import rank
from portatrain.training.trainer import train

FAULTY = 3
"""The step from which on a device is faulty; the checks are of steps 2, 4 and 6."""


def main(args: argparse.Namespace) -> int:
    """Train `args.cells` in `args.folder`; a run that ends by the referee leaves its message in NAME.txt."""
    if args.backend == "jax":
        simulate_devices("jax", args.devices)
        import jax

        jax.config.update("jax_disable_most_optimizations", True)
    else:
        import torch

        torch.set_num_threads(1)
    for name, mesh, site, device in args.cells:
        said = ""
        try:
            with planted(args.backend, site, device):
                run = RunDir(Path(args.folder) / name)
                code = train(refereed.recipe(args.by), run, backend=args.backend, mesh=mesh)
                assert code == 0, code
        except MachineError as error:
            said = str(error)
        except Exception:
            said = traceback.format_exc()
        if not rank():
            (Path(args.folder) / f"{name}.txt").write_text(said)
    return 0


@contextmanager
def planted(backend: str, site: str, device: int) -> Iterator[None]:
    """Flip a bit of `site` on `device`, from step FAULTY on."""
    if not site:
        yield
    elif site in ("copy", "sum"):
        with (_at_rest if site == "copy" else _summed)(backend, device):
            yield
    else:
        with refereed.flips(backend, site, device, since=FAULTY):
            yield


@contextmanager
def _at_rest(backend: str, device: int) -> Iterator[None]:
    """Flip a bit of a parameter on `device` alone, after step FAULTY."""
    kinds = [backend_class(backend)]
    if backend == "torch":
        from portatrain.backends.torch.mesh_backend import MeshBackend

        kinds = [MeshBackend]
    step = kinds[0].step

    def flipping(self: Any, state: Any, batch: Any, **more: Any) -> Any:
        state, result = step(self, state, batch, **more)
        if more["step"] == FAULTY and backend == "torch":
            _flip_torch(self, state, device)
        elif more["step"] == FAULTY:
            state = refereed.flipped_at_rest(self, state, device, 1, 3)
        return state, result

    with mock.patch.object(kinds[0], "step", flipping):
        yield


def _flip_torch(backend: Any, state: Any, device: int) -> None:
    import torch

    if backend.process == device:
        for piece in state.pieces:
            if piece.name == "down":
                local = getattr(piece.tensor, "_local_tensor", piece.tensor).detach()
                wrong = torch.from_numpy(refereed.flipped(local.cpu().numpy(), 1, 3))
                local.copy_(wrong)


@contextmanager
def _summed(backend: str, device: int) -> Iterator[None]:
    """Multiply an element of a summed gradient by 2^10: in torch on one process, in jax on all devices."""
    if backend == "torch":
        from portatrain.backends.torch.mesh_backend import MeshBackend

        norm = MeshBackend._norm

        def wrong(self: Any, state: Any) -> Any:
            if self.process == device and state.optimizer.count == FAULTY:
                grads = {p.name: p.tensor.grad for p in state.pieces}
                getattr(grads["up"], "_local_tensor", grads["up"]).reshape(-1)[0] *= 1024
            return norm(self, state)

        with mock.patch.object(MeshBackend, "_norm", wrong):
            yield
        return
    from portatrain.backends.jax.accumulation import Accumulation

    sums = Accumulation.__call__

    def scaled(self: Any, batch: Any) -> Any:
        grads, *rest = sums(self, batch)
        if self.devices.size > 1:
            grads = {**grads, "down": grads["down"].at[0].multiply(1024)}
        return (grads, *rest)

    with mock.patch.object(Accumulation, "__call__", scaled):
        yield
