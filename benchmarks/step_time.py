"""Time the training step of the lowered decoder beside others of the same shapes and mathematics, in paired rounds.

    python -m benchmarks.step_time --write                # everything, into docs/measured/speed.md
    python -m benchmarks.step_time --modes jax --shapes toy --rounds 10

Contenders:
    ours                Backend.step: forward, backward, clip, AdamW
    hand                the best native style of the framework: hand_torch.py, hand_jax.py; compiled torch has two:
                        each block and the loss (as ours, and as training at scale does), or the whole model
    hand, XLA defaults  the same without our compiler options (jax)
    transformers        LlamaForCausalLM with the same optimizer (torch)
    bare                nothing but the step's matrix products and attention: a bound from below, not a goal

All start from the same parameters and must have the same first losses. Every round runs each once in an order drawn
anew; a ratio is ours over theirs in tokens a second: the median over the rounds with its 95 % interval (order
statistics). Every mode and shape has a process of its own, so that no framework's threads stand in another's way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.paired import Ratio, interleaved, ratio
from benchmarks.shapes import SHAPES, Shape, batch_of, open_ours, parameters_of

MODES = ("torch-eager", "torch-compiled", "jax")
PAGE = Path(__file__).parents[1] / "docs" / "measured" / "speed.md"
BEGIN, END = "<!-- step_time -->\n", "<!-- /step_time -->"
LOSSES_AGREE = 2e-6
"""The relative difference of the losses of three steps, above which contenders do not compute the same mathematics."""

Step = Callable[[], Any]


def contenders(mode: str, shape: Shape) -> dict[str, Step]:
    """Return one training step of each contender, which runs to its end and returns the loss; each has its own
    state."""
    batch = batch_of(shape)
    given = {k: v[None] for k, v in batch.items()}
    name, compiled = ("jax", None) if mode == "jax" else ("torch", mode == "torch-compiled")
    backend = open_ours(name, shape, compile=compiled)
    held = [backend.init_state()]
    params = parameters_of(backend, held[0])

    def ours() -> float:
        held[0], result = backend.step(held[0], given, step=1, scale=1.0)
        if mode == "jax":
            import jax

            jax.block_until_ready(held[0])
        return float(result.loss)

    run: dict[str, Step] = {"ours": ours}
    if mode == "jax":
        from benchmarks import bare, hand_jax

        run["hand"] = hand_jax.hand_written(shape, params, batch)
        run["hand, XLA defaults"] = hand_jax.hand_written(shape, params, batch, defaults=True)
        run["bare"] = bare.with_jax(shape)
        return run
    from benchmarks import bare, hand_torch

    if compiled:
        run["hand, by parts"] = hand_torch.hand_written(shape, params, batch, compile="parts")
        run["hand, whole"] = hand_torch.hand_written(shape, params, batch, compile="whole")
    else:
        run["hand"] = hand_torch.hand_written(shape, params, batch)
    if not shape.packed:
        run["transformers"] = hand_torch.transformers_llama(shape, params, batch, compile=bool(compiled))
    run["bare"] = bare.with_torch(shape)
    return run


def measure(mode: str, shape: Shape, rounds: int) -> dict[str, Any]:
    """Return median seconds, and the fields of the ratio of each to ours. Raises RuntimeError if losses differ."""
    if mode != "jax":
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
    run = contenders(mode, shape)
    losses = {name: [step() for _ in range(3)] for name, step in run.items() if name != "bare"}
    apart = max(abs(a - b) / b for other in losses.values() for a, b in zip(other, losses["ours"], strict=True))
    if apart > LOSSES_AGREE:
        raise RuntimeError(f"{mode}, {shape.name}: losses differ by {apart:.1e}: {losses}")
    interleaved(run, rounds=2)
    seconds = interleaved(run, rounds=rounds)
    return {
        "seconds": {name: median(taken) for name, taken in seconds.items()},
        "ratios": {n: dataclasses.asdict(ratio(seconds["ours"], t)) for n, t in seconds.items() if n != "ours"},
        "losses_apart": apart,
    }


def count(mode: str, shape: Shape) -> dict[str, tuple[int, float]]:
    """Return (operations that run a kernel, FLOPs of matrix products and attention) of one step, by contender."""
    if mode == "jax":
        from benchmarks import counts_hlo, hand_jax

        batch = batch_of(shape)
        backend: Any = open_ours("jax", shape)
        given = backend._put({k: v[None] for k, v in batch.items()}, 1)
        state = backend.init_state()
        params = parameters_of(backend, state)
        texts = {
            "ours": backend._steps.lower(state, given, np.int32(1), np.float32(1)).compile().as_text(),
            "hand": hand_jax.hand_written_hlo(shape, params, batch),
            "hand, XLA defaults": hand_jax.hand_written_hlo(shape, params, batch, defaults=True),
        }
        found = {name: counts_hlo.count(text) for name, text in texts.items()}
        return {name: (c.total, c.matmul_flops) for name, c in found.items()}
    from benchmarks import counts_torch

    if mode == "torch-compiled":
        counts_torch.profile_kernels()
    look = counts_torch.count_compiled if mode == "torch-compiled" else counts_torch.count_eager
    each = {}
    for name, step in contenders(mode, shape).items():
        if name != "bare":
            step()
            step()
            counted = look(step)
            each[name] = (counted.total, counted.matmul_flops + counted.attention_flops)
    return each


# ---- one process per mode and shape, and the table


def apart(task: str, mode: str, shape: str, *options: str) -> Any:
    """Run `measure` or `count` in a fresh process: to count, kernels are compiled with names for the profiler."""
    command = [sys.executable, "-m", "benchmarks.step_time", "--task", task, mode, shape, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


HEADER = (
    "| shape | mode | against | tokens/s, ours over theirs: median [95 % interval] | tokens/s, ours and theirs "
    "| operations | GFLOPs |\n|---|---|---|---|---|---|---|"
)


def rows(mode: str, shape: Shape, measured: dict[str, Any], counted: dict[str, Any]) -> list[str]:
    found = []
    for other, numbers in measured["ratios"].items():
        speeds = " and ".join(f"{shape.tokens / measured['seconds'][n]:,.0f}" for n in ("ours", other))
        operations = flops = ""
        if other in counted:
            operations = f"{counted['ours'][0]:,} and {counted[other][0]:,}"
            flops = f"{counted['ours'][1] / 1e9:.2f} and {counted[other][1] / 1e9:.2f}"
        line = f"| {shape.name} | {mode} | {other} | {Ratio(**numbers)} | {speeds} | {operations} | {flops} |"
        found.append(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default=",".join(MODES), help="of " + ", ".join(MODES))
    parser.add_argument("--shapes", default="tiny-lm,22m", help="of " + ", ".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="put the table into docs/measured/speed.md")
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--task", nargs=3, metavar=("TASK", "MODE", "SHAPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task, mode, name = args.task
        shape = replace(SHAPES[name], layers=args.layers or SHAPES[name].layers)
        print(json.dumps(measure(mode, shape, args.rounds) if task == "measure" else count(mode, shape)))
        return
    began = time.perf_counter()
    print(HEADER, flush=True)
    lines, losses_apart = [HEADER], 0.0
    for shape in args.shapes.split(","):
        for mode in args.modes.split(","):
            measured = apart("measure", mode, shape, "--rounds", str(args.rounds))
            counted = apart("count", mode, shape)
            losses_apart = max(losses_apart, measured["losses_apart"])
            lines += (new := rows(mode, SHAPES[shape], measured, counted))
            print("\n".join(new), flush=True)
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "jax", "optax", "transformers"))
    cores = os.cpu_count()
    lines += [
        "",
        f"{cores}-core {platform.machine()} VM, no accelerator; float32, {cores} threads; {versions}; "
        f"{args.rounds} paired rounds in {(time.perf_counter() - began) / 60:.0f} minutes. First losses within "
        f"{losses_apart:.1e} of ours.",
        "",
        *(f"- {name}: {SHAPES[name].about}" for name in args.shapes.split(",")),
    ]
    print("\n".join(lines[-2 - args.shapes.count(",") - 1 :]))
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        PAGE.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
