"""Measure the time from the start of a process to its first step after a resume, without and with compiled programs.

    python -m benchmarks.restart --backend jax torch --repeats 3

Each resume is a process of its own on a copy of one run, which was saved after two steps. A cold one has an empty
folder for compiled programs, a warm one the folder that the cold one filled. Cold and warm alternate. On torch the
blocks are compiled, as they are on a GPU; on a CPU this is not the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.system import environment
from portatrain.training.start_times import PARTS

SHAPES = {
    "tiny-lm": (),
    # As in benchmarks/shapes.py.
    "22m": (
        *("model.vocab=4096", "model.embed=512", "model.layers=7", "model.heads=8", "model.kv_heads=4"),
        "model.mlp=1408",
    ),
}
OTHERS = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "TORCHINDUCTOR_CACHE_DIR")


def recipe(shape: str, seq_len: int, batch: int) -> Recipe:
    """Return the recipe of the runs. These three are the `sizes` of the other functions."""
    changes = (
        *(f"data.seq_len={seq_len}", f"batch={batch}", "accumulation=1", "steps=100", "schedule.warmup=0"),
        *("eval_every=none", "hooks=()"),
    )
    return apply_overrides(load_recipe("tiny-lm"), [*SHAPES[shape], *changes])


def attempt(backend: str, sizes: tuple[str, int, int], run: Path, stop_at: int) -> None:
    """Train `run` to `stop_at` in this process."""
    from portatrain.training.trainer import train

    if backend == "torch":
        import torch

        from portatrain.backends.torch import one_device

        row = dataclasses.replace(one_device.row_of(torch.device("cpu")), compiles=True)
        one_device.row_of = lambda device: row
    train(recipe(*sizes), RunDir(run), backend=backend, stop_at=stop_at)


def in_a_process(backend: str, sizes: tuple[str, int, int], run: Path, stop_at: int, cache: Path) -> dict[str, Any]:
    """Train `run` to `stop_at` in a process of its own; return its event `first_step_done`."""
    env = {name: value for name, value in os.environ.items() if name not in OTHERS}
    env |= {environment.COMPILE_CACHE.name: str(cache), "JAX_PLATFORMS": "cpu"}
    call = f"attempt({backend!r}, {sizes!r}, Path({str(run)!r}), {stop_at})"
    code = f"from pathlib import Path\nfrom benchmarks.restart import attempt\n{call}"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=sys.stderr)
    return RunDir(run).events(Kind.FIRST_STEP)[-1]


def measure(backend: str, sizes: tuple[str, int, int], repeats: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the events of the cold and of the warm resumes."""
    saved = folder / "saved"
    in_a_process(backend, sizes, saved, 2, folder / "first-cache")
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for number in range(repeats):
        cache = folder / f"cache-{number}"
        for kind in found:
            run = folder / "resumed"
            shutil.copytree(saved, run)
            found[kind].append(in_a_process(backend, sizes, run, 3, cache))
            shutil.rmtree(run)
    return found


def median(events: list[dict[str, Any]], part: str | None = None) -> float:
    """Return the median of a part of the events, or of the whole."""
    return statistics.median(e["total_s"] if part is None else e["parts"].get(part, 0.0) for e in events)


def table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Return the medians as Markdown."""
    shown = [part for part in PARTS if any(part in e["parts"] for kinds in found.values() for e in kinds["cold"])]
    head = ["backend", "cache", "first step after", *(part.replace("_", " ") for part in shown), "compiled", "reused"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for backend, kinds in found.items():
        for kind, events in kinds.items():
            cells = [backend, kind, f"{median(events):.1f} s", *(f"{median(events, part):.1f}" for part in shown)]
            cells += [str(events[-1][key]) for key in ("programs_compiled", "programs_reused")]
            lines.append(f"| {' | '.join(cells)} |")
    for backend, kinds in found.items():
        whole = median(kinds["cold"]) / median(kinds["warm"])
        compiles = median(kinds["cold"], "compile") / median(kinds["warm"], "compile")
        each = [c["total_s"] / w["total_s"] for c, w in zip(kinds["cold"], kinds["warm"], strict=True)]
        lines.append(
            f"\n{backend}: the first step comes {whole:.1f} times sooner with a warm cache (pairs: "
            f"{', '.join(f'{ratio:.1f}' for ratio in each)}); compiling takes {compiles:.1f} times less."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["jax", "torch"], choices=["jax", "torch"])
    parser.add_argument("--shape", default="22m", choices=list(SHAPES))
    parser.add_argument(
        "--seq-len",
        type=int,
        default=32,
        help="tokens a sample (default: 32, because the continuity check evaluates 64 samples, which takes a CPU long)",
    )
    parser.add_argument("--batch", type=int, default=8, help="samples a step (default: 8)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all events to this file")
    args = parser.parse_args()
    sizes = (args.shape, args.seq_len, args.batch)
    found = {}
    for backend in args.backend:
        with tempfile.TemporaryDirectory(prefix="restart-") as folder:
            found[backend] = measure(backend, sizes, args.repeats, Path(folder))
    where = f"{os.cpu_count()} x {platform.machine()}"
    print(f"{args.shape}, {args.batch} x {args.seq_len} tokens a step, {where}, medians of {args.repeats}\n")
    print(table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
