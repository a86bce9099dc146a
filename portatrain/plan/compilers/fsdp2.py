"""The torch backend's own step with tensors that have no contents, on a process group that is not there: what one
process of FSDP2 would hold at its fullest. Runs in a process of its own.

It sees what eager execution allocates, to the byte of each tensor's storage: not the allocator's fragments, not NCCL's
buffers, not a compiler's fusions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from portatrain.overrides import override
from portatrain.recipe import load_recipe
from portatrain.trainer import make_program


def run(asked: Mapping[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """Trace one step of rank 0; peak bytes by kind, FLOPs and bytes of collectives."""
    stage("loading torch")
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils.flop_counter import FlopCounterMode

    from portatrain.plan.compilers.xla import batch_of

    recipe = override(load_recipe(asked["recipe"], cwd=None), asked["overrides"])
    world = int(asked["options"]["world"])
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    program = make_program(recipe, mesh=asked["mesh"])
    batch = batch_of(recipe.data, recipe.batch, recipe.accumulation)
    stage(f"tracing rank 0 of {world}, layer by layer")
    backend = _backend(program)  # its process groups are made of real ranks
    with FakeTensorMode(allow_non_fake_inputs=True), MemTracker() as memory:
        infos = backend.definition.tensors

        def part(role: str, name: str, index: tuple[int, ...]) -> Any:
            return torch.empty(backend._part(infos[role, name], role)[1], dtype=torch.float32)

        state = backend._lowered(part)
        with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
            backend._accumulate(state, batch, 1)
            norm = backend._norm(state)
            grads = backend._grads(state)
            torch._foreach_mul_(grads, 1.0)
            state.optimizer.step(scale=1.0)
        del norm, grads
    peak = memory.get_tracker_snapshot("peak")[torch.device("cpu")]
    kinds = {str(getattr(kind, "value", kind)): int(size) for kind, size in peak.items()}
    return {
        "compiler": f"FSDP2 traced, torch {torch.__version__}", "fits": True, "peak_bytes": kinds.pop("Total"),
        "kinds": kinds, "flops": float(counter.get_total_flops()), "devices": world,
        "collective_bytes": traffic.named(backend.world),
    }  # fmt: skip


def _backend(program: Any) -> Any:
    import torch

    from portatrain.backends.torch.backend import TorchBackend
    from portatrain.backends.torch.distributed import MeshBackend
    from portatrain.state import sample_words

    class Traced(MeshBackend):
        """Batches of no contents, and no look at values."""

        def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
            mine = {}
            for key, value in batch.items():
                rows = value[self.world.my_rows(value.shape[0])]
                rows = sample_words(rows) if key == "sample" else rows
                mine[key] = torch.zeros(rows.shape, dtype=torch.from_numpy(rows[:0]).dtype)
            return self._values(mine)

    assert issubclass(Traced, TorchBackend)
    return Traced(program)


class _Traffic:
    """Bytes of the gathered array of every functional or plain collective, by process group."""

    def __init__(self) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        found: dict[str, float] = {}

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                name = str(func)
                if "c10d" in name and "wait" not in name and "barrier" not in name:
                    size, group = _moved(name, args, out)
                    found[group] = found.get(group, 0.0) + size
                return out

        self.found, self.mode = found, Mode()

    def __enter__(self) -> _Traffic:
        self.mode.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.mode.__exit__(*exc)

    def named(self, world: Any) -> dict[str, float]:
        """By mesh axes, as far as the groups are known by their size."""
        return {name: size for name, size in sorted(self.found.items()) if size}


def _moved(name: str, args: Any, out: Any) -> tuple[float, str]:
    """(bytes of the gathered array, an all-reduce twice; the size of its group) of one call."""
    import torch
    from torch.utils._pytree import tree_leaves

    def nbytes(tree: Any) -> float:
        return float(
            sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, torch.Tensor))
        )

    groups = [a for a in tree_leaves(args) if hasattr(a, "size") and not isinstance(a, torch.Tensor)]
    size = groups[0].size() if groups else 0
    given = nbytes(args)
    if "allreduce" in name or "all_reduce" in name:
        return 2 * nbytes(args[0]), f"{size} processes"
    # Either the result or the operand is the gathered array: the larger of the two.
    first = nbytes(args[0]) if args else given
    second = nbytes(args[1]) if len(args) > 1 else 0.0
    return max(first, second, nbytes(out) if "all_gather" in name else 0.0), f"{size} processes"
