"""Compare the bytes on a device by the layout and the planner with the bytes that the backends hold.

Run: python -m benchmarks.memory [--write]     (simulated devices; a few minutes on two cores)

With --write the result goes into docs/measured/memory.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from portatrain.backends.base import backend_class, missing, simulate_devices
from portatrain.backends.program import make_program
from portatrain.backends.state import slot_tensors
from portatrain.model.layout import MESH_AXES, Mesh
from portatrain.plan.cost.policy import REMATS
from portatrain.plan.cost.recipes import shape_of
from portatrain.plan.cost.workload import on_mesh
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.system.processes import rank, run_processes
from portatrain.testing import parity

DEVICES = 4
MESHES = ("fsdp=4", "replica=2,fsdp=2", "fsdp=2,tensor=2", "context=2,tensor=2", "tensor=4")
SIZES = ["model.kv_heads=4"]  # which four divides
POLICIES = tuple(REMATS)


def recipe(*more: str) -> Recipe:
    return apply_overrides(load_recipe("tiny-lm"), [*SIZES, *more])


def predicted(mesh: str) -> dict[str, int]:
    """Return the bytes on device 0, from the layout alone."""
    program = make_program(recipe(), mesh=mesh)
    at = program.layout.mesh.coordinates(0)

    def held(tensor: Any, role: str) -> int:
        return 4 * math.prod(program.layout.box(tensor, at, role=role)[1])

    tensors = program.definition.params.values()
    return {
        "params": sum(held(t, "params") for t in tensors),
        "opt": sum(held(s, s.role) for t in tensors for s in slot_tensors(program.optimizer, t).values()),
    }


def measured(backend: str, mesh: str) -> dict[str, int]:
    """Return the bytes that one device of this process holds after a step."""
    chosen = recipe()
    made = backend_class(backend)(make_program(chosen, mesh=mesh))
    state = made.init_state()
    state, _ = made.step(state, parity.batches(chosen, 1)[0], step=1, scale=1.0)
    mine = Mesh.parse(mesh).devices // made.processes
    return {role: n // mine for role, n in made.describe_memory(state).items() if role in ("params", "opt")}


def jax_part(args: argparse.Namespace) -> int:
    simulate_devices("jax", DEVICES)
    found: dict[str, Any] = {mesh: measured("jax", mesh) for mesh in MESHES}
    found["remat"] = {policy: _jax_step(policy) for policy in POLICIES}
    Path(args.out).write_text(json.dumps(found))
    return 0


def _jax_step(policy: str) -> dict[str, int]:
    """Return the compiler's own figures for one device of the step on fsdp=4."""
    chosen = recipe(f"remat={policy}", "batch=16")
    made: Any = backend_class("jax")(make_program(chosen, mesh="fsdp=4"))
    step, given = made.abstract_step(parity.batches(chosen, 1)[0])
    stats = step.lower(*given).compile().memory_analysis()
    return {"arguments": stats.argument_size_in_bytes, "temporaries": stats.temp_size_in_bytes}


def torch_part(args: argparse.Namespace) -> int:
    found = {mesh: measured(args.backend, mesh) for mesh in args.meshes}
    if rank() == 0:
        Path(args.out).write_text(json.dumps(found))
    return 0


def torch_remat(args: argparse.Namespace) -> int:
    """Return the bytes that live between the passes, for one device and a microbatch of four rows."""
    from benchmarks.live_bytes import Live

    found = {}
    for policy in POLICIES:
        chosen = recipe(f"remat={policy}", "batch=4")
        made: Any = backend_class("torch")(make_program(chosen))
        state = made.init_state()
        batch = {k: v[0] for k, v in parity.batches(chosen, 1)[0].items()}
        with Live() as live:
            loss, _ = made._forward(state, made._put(batch), 1, True)
            gc.collect()
            found[policy] = live.bytes
        loss.sum.backward()
    Path(args.out).write_text(json.dumps(found))
    return 0


def kept(policy: str, rows: int) -> float:
    """Return the planner's bytes of activations that a policy keeps of the blocks in torch, fp32."""
    chosen = recipe()
    work = on_mesh(shape_of(chosen), (1,) * len(MESH_AXES))
    tokens = rows * shape_of(chosen).seq_len
    return sum(kind.n * kind.kept(REMATS[policy], 4, static=False) for kind in work.kinds) * tokens * 4


def _run(n: int, entry: str, folder: str, **args: Any) -> Any:
    out = Path(folder) / "found"
    if run_processes(n, f"benchmarks.memory:{entry}", {"out": str(out), **args}):
        raise SystemExit(f"{entry} {args} failed")
    return json.loads(out.read_text())


def report() -> str:
    lines = [
        "# Memory",
        "",
        "`python -m benchmarks.memory` printed this page on a 2-core x86-64 VM with no accelerator; the devices are "
        f"simulated. The model is tiny-lm with {', '.join(SIZES)}, trained by AdamW in fp32.",
        "",
        "## Parameters and optimizer state on a device",
        "",
        "The table compares the bytes that the layout predicts with the bytes that a backend holds after a step.",
        "",
        "| mesh | what | layout | jax | torch |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        jax = _run(1, "jax_part", folder)
        torch = _run(DEVICES, "torch_part", folder, backend="torch", meshes=MESHES)
        for mesh in MESHES:
            for role, bytes_ in predicted(mesh).items():
                cells = [f"{found[mesh][role]:,} ({found[mesh][role] / bytes_ - 1:+.2%})" for found in (jax, torch)]
                lines.append(f"| {mesh} | {role} | {bytes_:,} | {' | '.join(cells)} |")
        if not missing("deepspeed-3"):
            lines += _zero(folder)
        live = _run(1, "torch_remat", folder)
    lines += [
        "",
        "torch's AdamW also keeps a count of steps for every tensor, of four bytes.",
        "",
        "## Activations kept for the backward pass",
        "",
        "All figures are in megabytes.",
        "",
        "- predicted: the activations of the blocks that a remat policy keeps for a microbatch of four rows, by the "
        "planner.",
        "- torch: the bytes that are alive after the forward pass and the loss, on one device with four rows.",
        "- jax: the temporaries of the whole step by the compiler's count, on one of four devices with four rows each. "
        "On a CPU XLA schedules for speed and not for memory, so only the differences between policies are meaningful.",
        "- less than none: the difference from the policy `none`.",
        "",
        "| policy | predicted | torch | less than none | jax, temporaries | less than none |",
        "|---|---|---|---|---|---|",
    ]
    for policy in POLICIES:
        a, b = live[policy], jax["remat"][policy]["temporaries"]
        saved = [(live["none"] - a) / 1e6, (jax["remat"]["none"]["temporaries"] - b) / 1e6]
        cells = [kept(policy, 4) / 1e6, a / 1e6, saved[0], b / 1e6, saved[1]]
        lines.append(f"| {policy} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _zero(folder: str) -> list[str]:
    """Return DeepSpeed's shares, which differ from the layout's, because it cuts tensors that are joined end to end."""
    lines = [
        "",
        "DeepSpeed on fsdp=4, with its padding. The prediction is ZeRO's arithmetic; the float32 copy of a process's "
        "part counts as optimizer state.",
        "",
        "| stage | what | predicted | held |",
        "|---|---|---|---|",
    ]
    whole = 4 * make_program(recipe()).definition.parameters
    for stage in (1, 2, 3):
        name = f"deepspeed-{stage}"
        found = _run(DEVICES, "torch_part", folder, backend=name, meshes=["fsdp=4"])["fsdp=4"]
        for role, bytes_ in (("params", whole if stage < 3 else whole // DEVICES), ("opt", 3 * whole // DEVICES)):
            lines.append(f"| {stage} | {role} | {bytes_:,} | {found[role]:,} ({found[role] / bytes_ - 1:+.2%}) |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/measured/memory.md")
    args = parser.parse_args()
    text = report()
    print(text)
    if args.write:
        Path("docs/measured/memory.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
