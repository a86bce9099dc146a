"""Move a mixture of experts from jax over the expert axis to torch over fsdp, then to jax on one device.

    python -m benchmarks.resume_mixture                 # two minutes
    portatrain train benchmarks/resume_mixture.py       # the run that moves

A small DeepSeek-V3: latent attention, a dense layer, a layer of eight experts with a sigmoid router in groups, whose
balance and load are States, and a shared expert; with AdamW, accumulation 2 and averages. Printed: the verdict at each
move, the largest relative difference of the losses from those of the run that never moved (jax, one device), and
whether the whole state that the first third saved comes back to its mesh from the last bit for bit. With a value out of
bounds the exit code is 1.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.resume_matrix import BOUND, Row, carry, losses, same, train
from portatrain.data import Stdlib
from portatrain.optim import AdamW
from portatrain.optim.schedules import Constant
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from recipes.models.deepseek_v3 import DeepseekV3Config

LEGS = (("jax", "expert=4"), ("torch", "fsdp=3"), ("jax", ""))
"""Backend and mesh of each third of the run."""
STEP, STEPS = 3, 9
FILE = str(Path(__file__).resolve())
Legs = tuple[tuple[str, str], ...]


def recipe() -> Recipe:
    """Return the recipe of the run that moves."""
    model = DeepseekV3Config(
        vocab=256,
        embed=24,
        layers=2,
        heads=3,
        mlp=48,
        q_rank=12,
        kv_rank=12,
        nope_dim=8,
        rope_dim=4,
        value_dim=8,
        dense_layers=1,
        experts=8,
        chosen=2,
        expert_mlp=12,
        groups=4,
        chosen_groups=2,
        weight_scale=2.5,
        balance_rate=0.01,
    )
    return Recipe(
        name="resume-mixture",
        model=model,
        data=Stdlib(seq_len=32, validation=0.03),
        optimizer=AdamW(lr=3e-3, b2=0.95, weight_decay=0.1),
        schedule=Constant(warmup=2),
        steps=STEPS,
        batch=24,
        accumulation=2,
        ema_decay=0.9,
        checkpoint_keep=99,
    )


def move(scratch: Path, file: str = FILE, legs: Legs = LEGS, step: int = STEP) -> Row:
    """Return what the moves found, of the recipe of a file that goes on after every `step` steps on the next of `legs`:
    verdicts, worst, back; or failed."""
    scratch.mkdir(exist_ok=True)
    baseline = losses(scratch, "whole", "jax", "", recipe=file, given=())
    at = scratch / "moved"
    for number, (kind, mesh) in enumerate(legs, start=1):
        last = number == len(legs)
        stop = () if last else ("--stop-at", str(number * step))
        code, error = train(at, kind, mesh, *stop, recipe=file, given=())
        if code != (0 if last else 85):
            return {"failed": f"leg {number}, {kind} {mesh}: {error}"}
    curve = [row["loss"] for row in RunDir(at).curve()]
    first = at / "checkpoints" / f"step-{step:08d}"
    source = first
    for number, (kind, mesh) in enumerate((*legs[1:], legs[0])):
        target = scratch / f"carried-{number}"
        if error := carry(source, target, kind, mesh, recipe=file, given=()):
            return {"failed": f"carried to {kind} {mesh}: {error}"}
        source = target / first.name
    return {
        "verdicts": [event["verdict"] for event in RunDir(at).events("resumed")],
        "worst": max(abs(a - b) / a for a, b in zip(baseline, curve, strict=True)),
        "back": same(first, source),
    }


def wrong(row: Row, legs: Legs = LEGS, bound: float = BOUND) -> bool:
    """Return whether a value is out of bounds; ``bound``: that of the losses."""
    moves = len(legs) - 1
    return (
        "failed" in row
        or row["verdicts"] != ["continuous"] * moves
        or not row["worst"] <= bound
        or row["back"] != "same bits"
    )


def show(row: Row, legs: Legs = LEGS) -> None:
    """Print what the moves found."""
    print(" -> ".join(f"{kind} {mesh or 'one device'}" for kind, mesh in legs))
    if "failed" in row:
        print(row["failed"])
    else:
        print(f"verdicts: {', '.join(row['verdicts'])}; losses: {row['worst']:.1e}; there and back: {row['back']}")


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        row = move(Path(scratch))
    show(row)
    return int(wrong(row))


if __name__ == "__main__":
    sys.exit(main())
