"""One process of a group that runs cell after cell: starting one takes longer than most cells."""

from __future__ import annotations

import argparse
import pickle
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.traffic import recorder
from portatrain.backends.base import backend_class
from portatrain.backends.torch import TorchBackend, mesh
from portatrain.backends.torch.step_counter import CPU_ATTENTION
from tests.support import fp8_rows
from tests.support.as_on_a_gpu import FLEX, flex_on_a_cpu
from tests.support.mesh_cases import CASES
from tests.support.mesh_measure import held, measure, tensors
from tests.support.mesh_mutants import MUTANTS


def gather(mine: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def moved(case: str, start: str, end: str) -> bool:
    """Whether a state saved on mesh `start` and restored on `end` is the same, bit for bit, in every role."""
    one = TorchBackend(CASES[case].program(start))
    state = one.init_state()
    batch = CASES[case].batches()[0]
    state, _ = one.step(state, batch, step=1, scale=1.0)
    before = tensors(one, state, gather)

    def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Any:
        return before[role, name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]

    other = TorchBackend(CASES[case].program(end))
    there = other.restore_state(read)
    after = tensors(other, there, gather)
    sizes = [sum(a.nbytes for *_, a in held(b, s)) for b, s in ((one, state), (other, there))]
    if sizes[0] == sizes[1]:
        raise AssertionError(f"{start} and {end} hold as much a process: nothing was moved")
    return before.keys() == after.keys() and all((before[k] == after[k]).all() for k in before)


def probed(backend: Any, case: str, on: str) -> dict[str, Any]:
    """What a probe of step 2 says, all state before it, after it, and after step 2."""
    one = backend(CASES[case].program(on))
    first, second, *_ = CASES[case].batches()
    state, _ = one.step(one.init_state(), first, step=1, scale=1.0)
    before = tensors(one, state, gather)
    found = one.probe(state, second, step=2, scale=0.5)
    after = tensors(one, state, gather)
    state, result = one.step(state, second, step=2, scale=0.5)
    stepped = tensors(one, state, gather)
    return {"probe": found, "before": before, "after": after, "stepped": stepped, "norm": float(result.grad_norm)}


def traffic(case: str, on: str) -> dict[str, list[int]]:
    """Bytes of every collective of the second step, by kind."""
    backend = TorchBackend(CASES[case].program(on))
    state = backend.init_state()
    first, second, *_ = CASES[case].batches()
    state, _ = backend.step(state, first, step=1, scale=1.0)
    with recorder() as seen:
        backend.step(state, second, step=2, scale=1.0)
    return dict(seen.found)


class _Pairs(TorchDispatchMode):
    """Count the pairs of a query and a key that attention computes, forward, over samples and heads."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func._overloadpacket) == CPU_ATTENTION:
            q, k = args[:2]
            self.found += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return func(*args, **(kwargs or {}))


def pairs(case: str, on: str) -> list[int]:
    """Return the pairs that attention computes in a step, of each process."""
    backend = TorchBackend(CASES[case].program(on))
    state = backend.init_state()
    with _Pairs() as counted:
        backend.step(state, CASES[case].batches()[0], step=1, scale=1.0)
    return gather(counted.found)


def main(args: argparse.Namespace) -> int:
    """`args.cells`: [(id, kind, arguments)]; what each gives goes into `args.out`, a pickle after another. `backend`:
    another one than torch, for cells of kind case."""
    backend = backend_class(getattr(args, "backend", "torch"))
    torch.set_num_threads(1)
    mesh.TIMEOUT_S = 60
    with Path(args.out if dist_rank() == 0 else "/dev/null").open("ab") as out:
        for name, kind, given in args.cells:
            began_s = time.perf_counter()
            try:
                if kind == "moved":
                    found: Any = moved(*given)
                elif kind == "probed":
                    found = probed(backend, *given)
                elif kind == "traffic":
                    found = traffic(*given)
                elif kind == "rows in fp8":
                    found = fp8_rows.on_two()
                elif kind == "pairs":
                    found = pairs(*given)
                else:
                    case, on, mutant = given
                    with flex_on_a_cpu() if mutant == FLEX else MUTANTS[mutant]():
                        found = measure(backend, CASES[case], on, gather)
            except Exception:
                found = traceback.format_exc()
            pickle.dump((name, found, time.perf_counter() - began_s), out)
            out.flush()
    return 0


def dist_rank() -> int:
    from portatrain.system.processes import rank

    return rank()
