"""Measure the training loop's time around a step and before the first step, at a tiny size, at which it is visible.

    python -m benchmarks.trainer_overhead

Prints, per backend, the median over the steps of: the step itself, to the end of its work; all else between two steps
(data, schedule, metrics, their files and the hooks); and the seconds to make the state and to compile the first step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.shapes import ADAMW, SHAPES
from portatrain.backends.base import missing
from portatrain.data import TextFiles
from portatrain.optim.schedules import Constant
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.metrics import StepRecord
from portatrain.training.trainer import Trainer, TrainOptions

FIRST = 20
"""The number of steps that are left out: compilation, and caches that fill once."""


class Keeps:
    """Keep the records of the steps, as a sink."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self.records.append(record)

    def start(self, *_: Any) -> None: ...
    def eval(self, *_: Any) -> None: ...
    def event(self, *_: Any, **__: Any) -> None: ...
    def end(self, *_: Any) -> None: ...


def recipe(steps: int) -> Recipe:
    from dataclasses import replace

    text = str(Path(__file__).parents[1] / "portatrain")
    shape = replace(SHAPES["toy"], vocab=256)
    return Recipe(
        name="overhead",
        model=shape.config,
        data=TextFiles(paths=text, seq_len=shape.seq),
        optimizer=ADAMW,
        schedule=Constant(),
        steps=steps,
        batch=shape.batch,
    )


def measure(backend: str, steps: int) -> tuple[float, float, float, float]:
    """Return (seconds of a step, of all around it, to make a state, to run the first step)."""
    kept = Keeps()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe(steps), RunDir(folder), TrainOptions(backend=backend, sinks=[kept]))
        inside: list[float] = []
        run_step, make = trainer.backend.step, trainer.backend.init_state
        made_s: list[float] = []

        def timed_step(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            state, result = run_step(*args, **options)
            float(result.loss), float(result.grad_norm)
            inside.append(time.perf_counter() - began)
            return state, result

        def timed_make() -> Any:
            began = time.perf_counter()
            state = make()
            made_s.append(time.perf_counter() - began)
            return state

        trainer.backend.step, trainer.backend.init_state = timed_step, timed_make  # type: ignore[method-assign]
        trainer.run()
    around = [r.step_s - inner for r, inner in zip(kept.records, inside, strict=True)]
    return median(inside[FIRST:]), median(around[FIRST:]), made_s[0], inside[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=320)
    steps = parser.parse_args().steps
    print("| backend | step, ms | around it, ms | state made, s | first step, s |")
    print("|---|---|---|---|---|")
    for backend in ("jax", "torch"):
        if not missing(backend):
            step_s, around_s, made_s, first_s = measure(backend, steps)
            print(
                f"| {backend} | {step_s * 1e3:.2f} | {around_s * 1e3:.2f} | {made_s:.2f} | {first_s:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
