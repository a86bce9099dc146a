"""Compare the bytes between processes in one step of the torch backend, by mesh axis, with what the layout implies.

Run: python -m benchmarks.traffic [--write]     (gloo processes; a minute or two on two cores)

For every collective it counts the larger of a process's input and output. With --write the result goes into
docs/measured/traffic.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from portatrain.backends.base import backend_class
from portatrain.backends.program import Program, make_program
from portatrain.model.layout import MESH_AXES, Mesh
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.system.processes import rank, run_processes
from portatrain.testing import parity

MESHES = (
    "fsdp=2",
    "replica=2",
    "tensor=2",
    "context=2",
    "replica=2,fsdp=2",
    "fsdp=2,tensor=2",
    "fsdp=2,context=2",
    "context=2,tensor=2",
)
SIZES = ["model.layers=2", "model.embed=64", "model.mlp=192", "data.seq_len=64", "batch=16", "accumulation=2"]

KINDS = {
    "all_gather": "all_gather",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_reduce": "all_reduce",
    "allreduce": "all_reduce",
    "all_to_all": "all_to_all",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
}


def recorder(mesh: Mesh | None = None) -> Any:
    """Return a mode that records the bytes of every collective: `found[kind]`, and with a mesh `by_axes[axes][kind]`,
    for the axes along which the members of its group differ."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def axes_of(group: Any) -> str:
        assert mesh is not None
        at = [mesh.coordinates(r) for r in dist.get_process_group_ranks(group)]
        return " x ".join(a for a in MESH_AXES if len({c[a] for c in at}) > 1)

    def group_of(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
                return dist.ProcessGroup.unbox(value)
            if isinstance(value, dist.ProcessGroup):
                return value
        name = next(v for v in reversed((*args, *kwargs.values())) if isinstance(v, str))
        return dist.distributed_c10d._resolve_process_group(name)

    class Traffic(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: dict[str, list[int]] = defaultdict(list)
            self.by_axes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            if any(issubclass(t, DTensor) for t in types):
                return NotImplemented  # the call comes again, with local tensors
            out = func(*args, **(kwargs or {}))
            kind = next((k for n, k in KINDS.items() if n in func._schema.name), None)
            if func.namespace in ("c10d", "_c10d_functional") and kind is not None:
                sides = (args[:1], args[1:2], out)
                held = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in sides)
                n = max(sum(t.nbytes for t in tensors) for tensors in held)
                self.found[kind].append(n)
                if mesh is not None:
                    self.by_axes[axes_of(group_of(func, args, kwargs or {}))][kind] += n
            return out

    return Traffic()


def recipe() -> Recipe:
    return apply_overrides(load_recipe("tiny-lm"), SIZES)


def implied(program: Program, accumulation: int, tokens: int) -> dict[str, int]:
    """Return the bytes by axis in a step, from the layout. `tokens`: of a microbatch on a process, for its part of
    batch and context. Scalars, three a step, and the loss's two numbers per token are left out.

    fsdp: all parameters that it shards, for the forward pass; the blocks' again for the backward pass; their gradients
    after every microbatch. replica and context: the gradients of what a process holds, once. tensor: the stream into
    and out of attention and feed-forward of every layer, the embedding and the loss, in both directions, and the
    gradients of what is whole over it. context: keys and values of every layer, half of the queries and of their
    results, and the gradients of all of these.
    """
    layout, params = program.layout, program.definition.params
    mesh = layout.mesh
    at = mesh.coordinates(0)
    found = dict.fromkeys((a for a in MESH_AXES if mesh.sizes[a] > 1), 0)
    stacks = {t.shape[0] for t in params.values() if t.stack_dims}
    layers = sum(stacks)
    embed = next(t for n, t in params.items() if n == "embed/table").shape[1]
    held = {n: 4 * math.prod(layout.box(t, at)[1]) for n, t in params.items()}
    in_fsdp = {n for n, t in params.items() if any("fsdp" in dim for dim in layout.tensor_spec(t))}
    if mesh.fsdp > 1:
        gathered = sum(held[n] * mesh.fsdp * (2 if t.stack_dims else 1) for n, t in params.items() if n in in_fsdp)
        scattered = sum(held[n] * mesh.fsdp for n in in_fsdp)
        found["fsdp"] += accumulation * (gathered + scattered) + sum(held[n] for n in held if n not in in_fsdp)
    if mesh.tensor > 1:
        found["tensor"] += accumulation * 2 * 2 * (2 * layers + 1) * tokens * embed * 4
        found["tensor"] += sum(
            held[n] for n, t in params.items() if not any("tensor" in dim for dim in layout.tensor_spec(t))
        )
    if mesh.context > 1:
        kv = next(t for n, t in params.items() if n.endswith("wk"))
        width = math.prod(kv.shape[2:]) // mesh.tensor
        found["context"] += accumulation * layers * 2 * 2 * tokens * mesh.context * width * 4
        query = math.prod(next(t for n, t in params.items() if n.endswith("wq")).shape[2:]) // mesh.tensor
        found["context"] += accumulation * layers * 2 * 2 * tokens * query * 4 // 2
    for axis in ("replica", "context"):
        if mesh.sizes[axis] > 1:
            found[axis] += sum(held.values())
    return found


def processes(args: argparse.Namespace) -> int:
    """Measure `args.meshes`, each with one device a process; process 0 writes its results to `args.out`."""
    import torch

    torch.set_num_threads(1)
    chosen = recipe()
    first, second = parity.batches(chosen, 2)
    found = {}
    for mesh in args.meshes:
        backend = backend_class("torch")(make_program(chosen, mesh=mesh))
        state, _ = backend.step(backend.init_state(), first, step=1, scale=1.0)
        with recorder(Mesh.parse(mesh)) as seen:
            backend.step(state, second, step=2, scale=1.0)
        found[mesh] = seen.by_axes
    if rank() == 0:
        Path(args.out).write_text(json.dumps(found))
    return 0


def report() -> str:
    lines = [
        "# Traffic",
        "",
        "`python -m benchmarks.traffic` printed this page on a 2-core x86-64 VM with no accelerator; the processes are "
        "connected by gloo. It counts the bytes that move between processes in one step of the torch backend: for each "
        "collective the larger of its input and its output on one process. "
        f"The model is tiny-lm with {', '.join(SIZES)}, trained by AdamW in fp32. The column `implied` is computed "
        "from the layout (`benchmarks.traffic.implied`).",
        "",
        "| mesh | axis | collectives | bytes that move | implied | ratio |",
        "|---|---|---|---|---|---|",
    ]
    chosen = recipe()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found"
        for n in sorted({Mesh.parse(m).devices for m in MESHES}):
            meshes = [m for m in MESHES if Mesh.parse(m).devices == n]
            if run_processes(n, "benchmarks.traffic:processes", {"meshes": meshes, "out": str(out)}):
                raise SystemExit("the processes failed")
            for mesh, by_axes in json.loads(out.read_text()).items():
                lines += _rows(make_program(chosen, mesh=mesh), chosen, mesh, by_axes)
    return "\n".join(lines) + "\n"


def _rows(program: Program, chosen: Recipe, mesh: str, by_axes: dict[str, dict[str, int]]) -> list[str]:
    sizes = program.layout.mesh
    rows = chosen.batch // chosen.accumulation // (sizes.replica * sizes.fsdp)
    tokens = rows * getattr(chosen.data, "seq_len", 1) // sizes.context
    says = implied(program, chosen.accumulation, tokens)
    lines = []
    for axes in sorted({*by_axes, *says}):
        kinds = by_axes.get(axes, {})
        moved = sum(kinds.values())
        names = ", ".join(f"{kind} {n:,}" for kind, n in sorted(kinds.items()))
        ratio = f"{moved / says[axes]:.3f}" if says.get(axes) else ""
        lines.append(f"| {mesh} | {axes} | {names} | {moved:,} | {says.get(axes, 0):,} | {ratio} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/measured/traffic.md")
    args = parser.parse_args()
    text = report()
    print(text)
    if args.write:
        Path("docs/measured/traffic.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
