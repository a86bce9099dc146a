"""Train a hybrid of gated delta nets and attention on meshes of jax and torch, and move it between them.

    python -m benchmarks.resume_hybrid                 # some minutes
    portatrain train benchmarks/resume_hybrid.py       # the run

Printed: for each setup the largest relative difference of twelve losses from those of one jax device; then, of a run
that moves from jax over tensor to torch over fsdp and to one jax device, the verdict at each move, the same difference,
and whether the whole state comes back bit for bit. With a value out of bounds the exit code is 1.

A small hybrid is ill-conditioned: parameters that change by half a unit in the last place move its first gradient by
2e-5. So the bound of losses is 1e-6, or four times the drift of one jax device that begins with such parameters, if
that is larger, as in `benchmarks.generated_parity.held`. The drift is printed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generated_parity.held import AMPLIFIED
from benchmarks.resume_matrix import BOUND, losses
from benchmarks.resume_mixture import move, show, wrong
from portatrain.backends.base import backend_class
from portatrain.backends.program import make_program
from portatrain.data import Stdlib
from portatrain.optim import AdamW
from portatrain.optim.schedules import Constant
from portatrain.recipe import Recipe
from portatrain.testing import parity
from recipes.models.olmo_hybrid import OlmoHybridConfig

SETUPS = (("torch", ""), ("torch", "fsdp=2"), ("torch", "tensor=2"), ("jax", "fsdp=2"), ("jax", "tensor=2"))
LEGS = (("jax", "tensor=2"), ("torch", "fsdp=2"), ("jax", ""))
STEPS = 12
FILE = str(Path(__file__).resolve())


def recipe() -> Recipe:
    """Return the recipe of the run."""
    return Recipe(
        name="resume-hybrid",
        model=OlmoHybridConfig(
            **{"vocab": 256, "embed": 32, "layers": 4, "heads": 4, "kv_heads": 2, "mlp": 64, "chunk": 16},
            **{"key_heads": 2, "value_heads": 4, "key_size": 8, "value_size": 12},
        ),
        data=Stdlib(seq_len=64, validation=0.03),
        optimizer=AdamW(lr=3e-4, b2=0.95, weight_decay=0.1),
        schedule=Constant(warmup=2),
        steps=STEPS,
        batch=8,
        accumulation=2,
        ema_decay=0.9,
        checkpoint_keep=99,
    )


def curves(scratch: Path) -> dict[str, float]:
    """Return the largest relative difference of a loss from one jax device, for each setup."""
    baseline = losses(scratch, "whole", "jax", "", recipe=FILE, given=())
    found = {}
    for number, (kind, mesh) in enumerate(SETUPS):
        curve = losses(scratch, f"setup-{number}", kind, mesh, recipe=FILE, given=())
        assert len(curve) == len(baseline) == STEPS
        found[f"{kind} {mesh or 'one device'}"] = max(abs(a - b) / a for a, b in zip(baseline, curve, strict=True))
    return found


def bound() -> tuple[float, float]:
    """Return (the bound of losses, the drift of one jax device that begins with parameters rounded otherwise)."""
    import jax

    made = recipe()
    backend: Any = backend_class("jax")(make_program(made))
    curves = []
    for rounded in (False, True):
        state, rng, curve = backend.init_state(), np.random.default_rng(0), []
        if rounded:
            for name, value in state["params"].items():
                moved = np.asarray(value) * (1 + rng.choice((-1.0, 1.0), value.shape) * 2.0**-24)
                state["params"][name] = jax.device_put(moved.astype(np.float32), value.sharding)
        for step, batch in enumerate(parity.batches(made, STEPS), start=1):
            state, result = backend.step(state, batch, step=step, scale=made.schedule(step, STEPS))
            curve.append(float(result.loss))
        curves.append(curve)
    drift = max(abs(a - b) / a for a, b in zip(*curves, strict=True))
    return max(BOUND, AMPLIFIED * drift), drift


def main() -> int:
    """Print what was found; return the exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        most, drift = bound()
        found = curves(Path(scratch))
        row = move(Path(scratch) / "moves", FILE, LEGS, STEPS // len(LEGS))
    for setup, worst in found.items():
        print(f"{setup}: {worst:.1e}")
    show(row, LEGS)
    print(f"one jax device, parameters rounded otherwise: {drift:.1e}; bound: {most:.1e}")
    return int(wrong(row, LEGS, most) or any(not worst <= most for worst in found.values()))


if __name__ == "__main__":
    sys.exit(main())
