"""Time the training step on fsdp=2 beside hand-written ones of the same mathematics, in paired rounds.

    python -m benchmarks.sharded_step --write                # into docs/measured/speed.md
    python -m benchmarks.sharded_step --modes jax --shape toy --rounds 10

Contenders, each on two simulated devices of this machine:
    jax             two XLA devices in one process; by hand: jit of the whole step, every matrix split over its embed
                    axis by a NamedSharding, the batch over its rows
    torch-eager     two gloo processes of one thread; by hand: fully_shard (FSDP2) on every block and on the root,
                    clip_grad_norm_, AdamW over DTensors
    torch-compiled  the same, each block and the loss compiled

Shared cores and loopback stand in for chips and links, so the benchmark compares the work of the programs, not the
speed of a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.paired import Ratio, interleaved, ratio
from benchmarks.shapes import SHAPES, Shape, batch_of, program_of
from benchmarks.step_time import LOSSES_AGREE, PAGE, Step
from portatrain.backends.base import backend_class, simulate_devices
from portatrain.backends.state import initial_box
from portatrain.system.processes import rank, run_processes

MODES = ("jax", "torch-eager", "torch-compiled")
MESH, DEVICES = "fsdp=2", 2
BEGIN, END = "<!-- sharded_step -->\n", "<!-- /sharded_step -->"


def ours(mode: str, shape: Shape) -> Step:
    name = "jax" if mode == "jax" else "torch"
    backend: Any = backend_class(name)(
        program_of(shape, compile=None if mode == "jax" else mode.endswith("compiled"), mesh=MESH)
    )
    held = [backend.init_state()]
    given = {k: v[None] for k, v in batch_of(shape).items()}

    def step() -> float:
        held[0], result = backend.step(held[0], given, step=1, scale=1.0)
        if mode == "jax":
            import jax

            jax.block_until_ready(held[0])
        return float(result.loss)

    return step


def by_hand(mode: str, shape: Shape, params: dict[str, np.ndarray]) -> Step:
    if mode == "jax":
        from benchmarks import hand_jax

        return hand_jax.hand_sharded(shape, params, batch_of(shape), devices=DEVICES)
    from benchmarks import hand_torch

    return hand_torch.hand_fsdp2(shape, params, batch_of(shape), compile=mode.endswith("compiled"))


def worker(args: argparse.Namespace) -> int:
    """`args`: mode, shape, layers, rounds, `params`, a pickle, and `out`, which takes what process 0 measured."""
    simulate_devices("jax" if args.mode == "jax" else "torch", DEVICES)
    if args.mode != "jax":
        import torch

        torch.set_num_threads(1)
    shape = replace(SHAPES[args.shape], layers=args.layers)
    params = pickle.loads(Path(args.params).read_bytes())
    run = {"ours": ours(args.mode, shape), "hand": by_hand(args.mode, shape, params)}
    losses = {name: [step() for _ in range(3)] for name, step in run.items()}
    apart = max(abs(a - b) / b for a, b in zip(losses["ours"], losses["hand"], strict=True))
    if apart > LOSSES_AGREE:
        raise RuntimeError(f"{args.mode}: losses differ by {apart:.1e}: {losses}")
    interleaved(run, rounds=2)
    seconds = interleaved(run, rounds=args.rounds)  # the same order in every process: its seed is fixed
    if rank() == 0:
        Path(args.out).write_text(json.dumps({"seconds": seconds, "apart": apart}))
    return 0


def measure(mode: str, shape: Shape, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        params, out = Path(folder) / "params", Path(folder) / "out"
        program = program_of(shape)
        made = {
            name: initial_box(info, program.seed, (0,) * len(info.shape), info.shape)
            for name, info in program.definition.params.items()
        }
        params.write_bytes(pickle.dumps(made))
        args = {
            "mode": mode,
            "shape": shape.name,
            "layers": shape.layers,
            "rounds": rounds,
            "params": str(params),
            "out": str(out),
        }
        # XLA's devices share one process and all of its threads; gloo's have a process and a thread each.
        if run_processes(1 if mode == "jax" else DEVICES, "benchmarks.sharded_step:worker", args):
            raise SystemExit(f"sharded_step: {mode} failed")
        return json.loads(out.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default=",".join(MODES), help="of " + ", ".join(MODES))
    parser.add_argument("--shape", default="tiny-lm", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="put the table into docs/measured/speed.md")
    args = parser.parse_args()
    shape, apart = SHAPES[args.shape], 0.0
    lines = [
        "| mode | tokens/s, ours over the hand-written: median [95 % interval] | tokens/s, ours and theirs |",
        "|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for mode in args.modes.split(","):
        found = measure(mode, shape, args.rounds)
        apart = max(apart, found["apart"])
        mine, theirs = found["seconds"]["ours"], found["seconds"]["hand"]
        speeds = " and ".join(f"{shape.tokens / median(s):,.0f}" for s in (mine, theirs))
        lines.append(f"| {mode} | {Ratio(**asdict(ratio(mine, theirs)))} | {speeds} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        f"{os.cpu_count()}-core {platform.machine()} VM, no accelerator, two simulated devices; {shape.name}: "
        f"{shape.about}; float32; torch {version('torch')}, jax {version('jax')}; {args.rounds} paired rounds. First "
        f"losses within {apart:.1e} of each other.",
    ]
    print(lines[-1])
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        PAGE.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
