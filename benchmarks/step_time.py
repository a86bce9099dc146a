"""The training step of the lowered decoder beside others of the same shapes and mathematics, in paired rounds.

    python -m benchmarks.step_time                        # everything; --write puts the table into docs/speed.md
    python -m benchmarks.step_time --modes jax --shapes toy --rounds 10

Contenders: `ours` (Backend.step: forward, backward, clip, AdamW), `hand` (the best native style of the framework: see
hand_torch.py and hand_jax.py), `transformers` (LlamaForCausalLM with the same optimizer; torch only), `bare` (nothing
but the step's matrix products and attention). Every round runs each once in an order drawn anew; the ratio is ours
over theirs in tokens a second: the median of the rounds' ratios with its 95 % interval by order statistics.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paired import Ratio, interleaved, ratio
from benchmarks.shapes import SHAPES, Shape, batch_of, open_ours, parameters_of

MODES = ("torch-eager", "torch-compiled", "jax")
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
Step = Callable[[], object]


def contenders(mode: str, shape: Shape) -> dict[str, Step]:
    """One training step of each, by name; each keeps a state of its own, from the same parameters."""
    batch = batch_of(shape)
    given = {k: np.ascontiguousarray(v)[None] for k, v in batch.items()}
    name, compiled = ("jax", None) if mode == "jax" else ("torch", mode == "torch-compiled")
    backend = open_ours(name, shape, compile=compiled)
    held = [backend.init_state()]
    params = parameters_of(backend, held[0])

    def ours() -> float:
        held[0], result = backend.step(held[0], given, step=1, scale=1.0)
        wait(held[0])
        return float(result.loss)

    def wait(state: Any) -> None:
        if mode == "jax":
            import jax

            jax.block_until_ready(state)

    run: dict[str, Step] = {"ours": ours}
    if mode == "jax":
        from benchmarks import bare, hand_jax

        run["hand"] = hand_jax.hand_written(shape, params, batch)
        run["bare"] = bare.with_jax(shape)
        return run
    from benchmarks import bare, hand_torch

    run["hand"] = hand_torch.hand_written(shape, params, batch, compile=bool(compiled))
    if not shape.packed:
        run["transformers"] = hand_torch.transformers_llama(shape, params, batch, compile=bool(compiled))
    run["bare"] = bare.with_torch(shape)
    return run


def measure(
    mode: str, shape: Shape, rounds: int
) -> tuple[dict[str, Ratio], dict[str, float], dict[str, float]]:
    """(ratios, median seconds, losses of the first step) by contender."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    run = contenders(mode, shape)
    losses = {name: float(step()) for name, step in run.items() if name != "bare"}  # type: ignore[arg-type]
    interleaved(run, rounds=2)
    seconds = interleaved(run, rounds=rounds)
    ratios = {name: ratio(seconds["ours"], taken) for name, taken in seconds.items() if name != "ours"}
    return ratios, {name: float(np.median(taken)) for name, taken in seconds.items()}, losses


def counts(mode: str, shape: Shape) -> dict[str, tuple[int, float]]:
    """(operations that run a kernel, FLOPs of matrix products and attention) of one step, by contender."""
    if mode == "jax":
        from benchmarks import counts_hlo, hand_jax

        batch = batch_of(shape)
        backend: Any = open_ours("jax", shape)
        given = backend._put({k: np.ascontiguousarray(v)[None] for k, v in batch.items()}, 1)
        state = backend.init_state()
        texts = {
            "ours": backend._steps.lower(state, given, np.int32(1), np.float32(1)).compile().as_text(),
            "hand": hand_jax.hand_written_hlo(shape, parameters_of(backend, state), batch),
        }
        found = {name: counts_hlo.count(text) for name, text in texts.items()}
        return {name: (c.total, c.matmul_flops) for name, c in found.items()}
    from benchmarks import counts_torch

    if mode == "torch-compiled":
        counts_torch.profile_kernels()
    run = contenders(mode, shape)
    look = counts_torch.count_compiled if mode == "torch-compiled" else counts_torch.count_eager
    each = {}
    for name, step in run.items():
        step()
        step()
        if name != "bare":
            c = look(step)
            each[name] = (c.total, c.matmul_flops + c.attention_flops)
    return each


def _counted_apart(mode: str, shape: str) -> dict[str, tuple[int, float]]:
    """`counts` in a process of its own: naming kernels to the profiler changes what is compiled."""
    command = [sys.executable, "-m", "benchmarks.step_time", "--count", mode, shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {k: (v[0], v[1]) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}


def report(modes: list[str], shapes: list[str], rounds: int) -> list[str]:
    import jax
    import torch

    lines = [
        f"Machine: {os.cpu_count()}-core {platform.machine()} VM, no accelerator; torch {torch.__version__}, "
        f"jax {jax.__version__}, float32, {rounds} paired rounds.",
        "",
        "| mode | shape | against | ratio of tokens/s, ours over theirs | operations: ours / theirs | GFLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for shape_name in shapes:
        shape = SHAPES[shape_name]
        for mode in modes:
            ratios, seconds, losses = measure(mode, shape, rounds)
            counted = _counted_apart(mode, shape_name)
            spread = max(losses.values()) - min(losses.values())
            print(f"{mode} {shape_name}: seconds {seconds}, losses within {spread:.1e}", flush=True)
            for other, found in ratios.items():
                ops = f"{counted['ours'][0]} / {counted[other][0]}" if other in counted else ""
                flops = (
                    f"{counted['ours'][1] / 1e9:.2f} / {counted[other][1] / 1e9:.2f}"
                    if other in counted
                    else ""
                )
                lines.append(f"| {mode} | {shape_name} | {other} | {found} | {ops} | {flops} |")
                print(lines[-1], flush=True)
    lines += ["", *(f"- `{name}`: {SHAPES[name].about}" for name in shapes)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--shapes", default="tiny-lm,22m")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="put the table into docs/speed.md")
    parser.add_argument("--count", nargs=2, metavar=("MODE", "SHAPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        print(json.dumps(counts(args.count[0], SHAPES[args.count[1]])))
        return
    lines = report(args.modes.split(","), args.shapes.split(","), args.rounds)
    print("\n".join(lines))
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        head, _, rest = text.partition("<!-- step_time -->\n")
        tail = rest.partition("<!-- /step_time -->")[2]
        PAGE.write_text(
            head + "<!-- step_time -->\n" + "\n".join(lines) + "\n<!-- /step_time -->" + tail,
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
