"""Measure the continuity check's bounds: a hundred honest moves, the mutants, and the smallest visible effect.

    python benchmarks/continuity.py            # some minutes on two cores

Trains tiny-lm and tiny-vit, in fp32 and bf16, on three backends and meshes, saves at four steps, and restores every
checkpoint on five. It does so without fingerprints, as for a checkpoint of an older release, so the other parts of the
check alone decide. Prints how far each figure of the check went beside its bound, then what the check says to
the mutants of portatrain.testing.mutants, then the smallest changes that it refuses. docs/measured/moves.md has what it
printed.
"""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import LocalStore, Reader
from portatrain.backends import rounding
from portatrain.backends.base import Backend, backend_class, simulate_devices
from portatrain.backends.program import make_program
from portatrain.checkpoint.saver import Checkpoints, reads
from portatrain.data import open_data
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.recipe.retention import Retention
from portatrain.system.processes import run_processes
from portatrain.testing import mutants, parity
from portatrain.training import continuity

LM = [
    "model.layers=3",
    "model.embed=64",
    "model.mlp=128",
    "model.dropout=0.1",
    "data.seq_len=64",
    "batch=8",
    "accumulation=2",
    "steps=40",
    "schedule.warmup=8",
    "eval_every=none",
    "hooks=()",
    "ema_decay=0.9",
]
VIT = ["model.layers=2", "model.embed=32", "batch=16", "steps=40", "schedule.warmup=8", "eval_every=none", "hooks=()"]
RECIPES = {"tiny-lm, AdamW": ("tiny-lm", LM), "tiny-vit, Muon": ("tiny-vit", VIT)}
PRECISIONS = ("fp32", "bf16", "bf16-state")
STEPS = (3, 9, 16, 25)
SOURCES = (("jax", ""), ("jax", "fsdp=2,tensor=2"), ("torch", ""))
TOGETHER = (("torch", "fsdp=2"), ("torch", "tensor=2"))
"""The targets of every checkpoint: each source's own kind, in this process, and these, in two processes."""


def recipe_of(name: str, precision: str) -> Recipe:
    shipped, sizes = RECIPES[name]
    return apply_overrides(load_recipe(shipped), [*sizes, f"precision={precision}"])


@functools.cache
def bounds_of(name: str, precision: str) -> continuity.Bounds:
    recipe = recipe_of(name, precision)
    sample = open_data(recipe.data, seed=recipe.seed).train.batch(0, 1)
    definition = recipe.describe()
    positions = rounding.positions_in(definition, sample) * recipe.batch
    return continuity.Bounds.of(definition, precision, positions)


@functools.cache
def backend_of(name: str, precision: str, kind: str, mesh: str) -> Backend:
    return backend_class(kind)(make_program(recipe_of(name, precision), mesh=mesh))


def leave(folder: Path) -> None:
    """Train and save into folder/NAME/PRECISION/SOURCE/step-NNNNNNNN."""
    for name in RECIPES:
        for precision in PRECISIONS:
            recipe = recipe_of(name, precision)
            data = open_data(recipe.data, seed=recipe.seed).train
            for number, (kind, mesh) in enumerate(SOURCES):
                backend = backend_of(name, precision, kind, mesh)
                checkpoints = Checkpoints(folder / name / precision / str(number), keep=Retention(last=9))
                state = backend.init_state()
                for step, batch in enumerate(parity.batches(recipe, max(STEPS)), start=1):
                    scale = recipe.lr_scale(step)
                    state, _ = backend.step(state, batch, step=step, scale=scale)
                    if step in STEPS:
                        meta = continuity.record(backend, state, recipe, data, step)
                        checkpoints.save(step, backend, state, meta)
                checkpoints.wait()


def arrive(folder: Path, targets: Iterable[tuple[str, str]]) -> list[tuple[str, dict[str, Any]]]:
    """Return the verdicts of all checkpoints on all targets."""
    found = []
    for name in RECIPES:
        for precision in PRECISIONS:
            recipe = recipe_of(name, precision)
            data = open_data(recipe.data, seed=recipe.seed).train
            for kind, mesh in targets:
                backend = backend_of(name, precision, kind, mesh)
                for path in sorted((folder / name / precision).glob("*/step-*")):
                    with LocalStore(path) as store:
                        reader = Reader(store)
                        state = backend.restore_state(reads(reader))
                        now = continuity.record(backend, state, recipe, data, reader.meta["step"])
                        found.append((precision, continuity.verdict(reader.meta, now, bounds_of(name, precision))))
                        if found[-1][1]["verdict"] != "continuous":
                            print(f"REFUSED: {name}, {path}, on {kind} {mesh}: {found[-1][1]}")
    return found


def worker(args: argparse.Namespace) -> int:
    found = arrive(Path(args.folder), TOGETHER)
    if os.environ["RANK"] == "0":
        Path(args.out).write_bytes(pickle.dumps(found))
    return 0


class Arrival:
    """Restore a checkpoint on torch with a change in memory."""

    def __init__(self, folder: Path, name: str, precision: str) -> None:
        self.recipe, self.bounds = recipe_of(name, precision), bounds_of(name, precision)
        self.data = open_data(self.recipe.data, seed=self.recipe.seed).train
        self.backend = backend_of(name, precision, "torch", "")
        with LocalStore(folder / name / precision / "0" / f"step-{max(STEPS):08d}") as store:
            reader = Reader(store)
            self.meta: dict[str, Any] = dict(reader.meta)
            self.values = {t.name: reader.read(t.name) for t in reader.layout.tensors}

    def verdict(self, values: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> dict[str, Any]:
        def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
            box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            return values[f"{role}/{name}" if name else role][box]

        state = self.backend.restore_state(read)
        now = continuity.record(self.backend, state, self.recipe, self.data, max(STEPS))
        return continuity.verdict(meta, now, self.bounds)


def try_mutants(folder: Path) -> None:
    print("\nMutants, on torch, of a checkpoint that jax left at step", max(STEPS))
    for name in RECIPES:
        for precision in PRECISIONS:
            arrival = Arrival(folder, name, precision)
            assert arrival.verdict(arrival.values, arrival.meta)["verdict"] == "continuous"
            for what, mutate in mutants.MUTANTS.items():
                values = {n: a.copy() for n, a in arrival.values.items()}
                meta = {k: dict(v) if isinstance(v, Mapping) else v for k, v in arrival.meta.items()}
                mutate(values, meta, arrival.recipe)
                found = arrival.verdict(values, meta)
                by = [*found["differs"], *(f"{k} {found[f'{k}_difference']:.1e}" for k in found["failed"])]
                print(f"  {name:16} {precision}  {what:28} {found['verdict']:10} {', '.join(by)}")


def smallest(folder: Path) -> None:
    print("\nThe smallest change that is refused (powers of two; tiny-lm, AdamW)")
    for precision in PRECISIONS:
        arrival = Arrival(folder, "tiny-lm, AdamW", precision)
        for what, change in mutants.effects().items():

            def seen(size: float, arrival: Arrival = arrival, change: Any = change) -> bool:
                values = {n: a.copy() for n, a in arrival.values.items()}
                change(values, size)
                return arrival.verdict(values, arrival.meta)["verdict"] == "broken"

            least = mutants.smallest(seen)
            print(f"  {precision}  {what:68} {'not seen at 2' if least is None else f'x = {least:.1e}'}")


def main() -> None:
    began_s = time.perf_counter()
    simulate_devices("jax", 4)
    with tempfile.TemporaryDirectory(prefix="continuity-") as scratch:
        folder = Path(scratch) / "left"
        leave(folder)
        found = arrive(folder, SOURCES)
        out = Path(scratch) / "found"
        run_processes(2, "benchmarks.continuity:worker", {"folder": str(folder), "out": str(out)})
        found += pickle.loads(out.read_bytes())
        verdicts = [v["verdict"] for _, v in found]
        print(f"Honest moves: {len(found)}, accepted: {verdicts.count('continuous')}")
        print(f"  {'':5} {'figure':8} {'largest':>9} {'bound':>9}  bound/largest")
        for precision in PRECISIONS:
            mine = [v for p, v in found if p == precision]
            for k in ("loss", "mean", "state", "grad", "update"):
                at = max(mine, key=lambda v: v[f"{k}_difference"] / v[f"{k}_bound"])
                worst, bound = at[f"{k}_difference"], at[f"{k}_bound"]
                print(f"  {precision:5} {k:8} {worst:9.1e} {bound:9.1e}  {bound / worst:6.1f}")
        try_mutants(folder)
        smallest(folder)
    print(f"\n{time.perf_counter() - began_s:.0f} s")


if __name__ == "__main__":
    main()
