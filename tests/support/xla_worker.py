"""One process that sees several simulated XLA devices and runs cell after cell on meshes of all of them."""

from __future__ import annotations

import argparse
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch_xla.distributed.spmd as spmd
from torch_xla.debug import metrics

from benchmarks.matrix.cells import STEPS, recipe_of
from portatrain.backends.torch import TorchBackend
from portatrain.backends.torch_xla import XlaBackend, devices, losses, ops
from portatrain.model.layout import Layout, Mesh
from portatrain.testing import CASES, measure, parity
from tests.support.mesh_cases import CASES as PROGRAMS
from tests.support.mesh_measure import held, tensors
from tests.support.mesh_measure import measure as run_steps


class Scattered(XlaBackend):
    """Operations on arguments that lie cut over four devices, along the first two axes that two divides."""

    @classmethod
    def _given(cls, array: Any) -> torch.Tensor:
        there = super()._given(array)
        free = ["a", "b"]
        spec = tuple(free.pop(0) if free and n % 2 == 0 else None for n in there.shape)
        if 0 < there.ndim <= devices.MOST_AXES:
            spmd.mark_sharding(there, spmd.Mesh(np.arange(4), (2, 2), ("a", "b")), spec)
        return there


def contract(words: str) -> tuple[int, list[str]]:
    """(comparisons, those that differ) of the cases with `words` in their name, on cut arguments."""
    checks = [
        check
        for case in CASES
        if words in case.name
        for precision in case.precisions
        for check in measure(Scattered, case, precision)
    ]
    return len(checks), [str(check) for check in checks if not check.good]


def _method(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, make(getattr(owner, name)))


MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "the first part of the batch alone gives the table its gradient": _method(
        losses, "_chunk", lambda whole: lambda *given: (*whole(*given)[:2], whole(*given)[2][:1].expand(4, -1, -1, -1))
    ),
    "the last row of every microbatch is left out": _method(
        XlaBackend,
        "_put",
        lambda whole: (
            lambda self, batch: whole(
                self,
                {**batch, "mask": batch["mask"] * (np.arange(len(batch["mask"])) < len(batch["mask"]) - 1)[:, None]},
            )
        ),
    ),
    "the step number stays 1": _method(
        XlaBackend, "_numbers", lambda whole: lambda self, step, scale=0.0: whole(self, min(step, 1), scale)
    ),
    "scales of norms: half of the gradient": _method(
        ops._SummedInTwoSteps, "backward", lambda whole: staticmethod(lambda ctx, g: (whole(ctx, g)[0] / 2, None))
    ),
}
"""Wrong sums, and what is wrong with a step's numbers."""


def steps(case: str, mesh: str, mutant: str = "") -> Any:
    with MUTANTS[mutant]():
        return run_steps(XlaBackend, PROGRAMS[case], mesh)


def graphs(case: str, mesh: str) -> dict[str, Any]:
    """Graphs compiled by each of five steps, and the operations that fell back to the host."""
    one = XlaBackend(PROGRAMS[case].program(mesh))
    state = one.init_state()
    batches = PROGRAMS[case].batches()
    metrics.clear_all()
    counts, compiled = [], []
    for step in range(1, 6):
        state, result = one.step(state, batches[step % len(batches)], step=step, scale=min(1.0, step / 3))
        float(result.loss)
        counts.append(one.graphs())
        compiled.append(devices.compilations())
    return {"graphs": counts, "compiled": compiled, "fallbacks": metrics.executed_fallback_ops()}


def held_bytes(case: str, mesh: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of parameters and optimizer after a step, on all devices: as held, and as the layout says."""
    one = XlaBackend(PROGRAMS[case].program(mesh))
    state, _ = one.step(one.init_state(), PROGRAMS[case].batches()[0], step=1, scale=1.0)
    layout = one.program.layout
    said = {"params": 0, "opt": 0}
    for kept, index, tensor in one.state_arrays(state):
        if (kind := kept.role.partition("/")[0]) in said:
            spec = layout.tensor_spec(kept.info, role=kept.laid_out_as)[len(index) :]
            cut = int(np.prod([layout.mesh.over(axes) for axes in spec]))
            said[kind] += tensor.numel() * tensor.element_size() // cut * layout.mesh.devices
    found = one.describe_memory(state)
    return {kind: found[kind] for kind in said}, said


def moved(case: str, start: str, mesh: str, end: str) -> dict[str, int]:
    """A state after a step, from backend `start` to `end`, one of which is torch-xla on `mesh`: how many tensors are
    the same bit for bit, and how many there are."""
    made = {
        "torch": lambda: TorchBackend(PROGRAMS[case].program("")),
        "torch-xla": lambda: XlaBackend(PROGRAMS[case].program(mesh)),
    }
    one = made[start]()
    state, _ = one.step(one.init_state(), PROGRAMS[case].batches()[0], step=1, scale=1.0)
    before = tensors(one, state, lambda x: [x])

    def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Any:
        return before[role, name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]

    other = made[end]()
    there = other.restore_state(read)
    after = tensors(other, there, lambda x: [x])
    assert before.keys() == after.keys()
    boxes = [len(held(b, s)) for b, s in ((one, state), (other, there))]
    same = sum(bool((before[k] == after[k]).all()) and before[k].dtype == after[k].dtype for k in before)
    return {"same": same, "tensors": len(before), "boxes before": boxes[0], "boxes after": boxes[1]}


def recipe(row: str, mesh: str) -> parity.Verdict:
    """A row of the parity matrix on `mesh` beside one device of the torch backend."""
    chosen = recipe_of(mesh, row)
    given = parity.batches(chosen, STEPS)
    mine = parity.trace(XlaBackend, chosen, given, mesh=mesh)
    return parity.compare(parity.trace(TorchBackend, chosen, given), mine, bound=parity.bound_of(chosen, given))


def refused(mesh: str) -> str:
    XlaBackend(PROGRAMS["lm"].program(mesh))
    return "nothing"


def laid(mesh: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The parts of an (8, 4) tensor over (fsdp, tensor)."""
    there = devices.Devices(Layout(mesh=Mesh.parse(mesh)))
    return there.parts(there.put(np.zeros((8, 4), np.float32), (("fsdp",), ("tensor",))))


KINDS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (contract, steps, graphs, held_bytes, moved, recipe, refused, laid)
}


def main(args: argparse.Namespace) -> int:
    """`args.cells`: [(id, kind, arguments)]; what each gives goes into `args.out`, a pickle after another."""
    torch.set_num_threads(1)
    torch.zeros(1, device=devices.device())  # a backward pass on the CPU first would leave autograd no place for XLA's
    with Path(args.out).open("ab") as out:
        for name, kind, given in args.cells:
            began_s = time.perf_counter()
            try:
                found = KINDS[kind](*given)
            except Exception:
                found = traceback.format_exc()
            pickle.dump((name, found, time.perf_counter() - began_s), out)
            out.flush()
    return 0
