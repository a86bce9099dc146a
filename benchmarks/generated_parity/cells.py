"""Cells of a parity check that are generated: models, options, meshes and backends, as a function of a seed."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from portatrain.recipe import Recipe, apply_overrides, load_recipe

MESHES = {
    1: ("",),
    2: ("fsdp=2", "replica=2", "tensor=2", "context=2"),
    4: ("fsdp=4", "replica=2,fsdp=2", "fsdp=2,tensor=2", "context=2,tensor=2", "fsdp=2,context=2"),
}
RULES = ("AdamW", "AdamW", "AdamW", "SGD", "Lion")
STEPS = 20
PLACES = 5
"""Cells of one model in `placed`."""
BACKENDS = ("jax", "torch")


@dataclass(frozen=True)
class Cell:
    """A model with its options, and where it runs."""

    backend: str
    devices: int
    mesh: str
    overrides: tuple[str, ...]

    def recipe(self) -> Recipe:
        return apply_overrides(load_recipe("tiny-lm"), self.overrides)

    def __str__(self) -> str:
        return f"{self.backend} {self.mesh or 'one device'}: {' '.join(self.overrides)}"


def generated(seed: int, count: int, *, devices: tuple[int, ...] = (1, 2, 4)) -> list[Cell]:
    """Sizes are multiples of what every mesh divides by."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        heads = rng.choice((4, 8))
        n = rng.choice(devices)
        overrides = {
            "model.layers": rng.choice((1, 2, 3, 6)),
            "model.embed": rng.choice((16, 32, 64, 96)),
            "model.heads": heads,
            "model.kv_heads": rng.choice((heads, heads // 2, 4)),
            "model.head_dim": rng.choice((4, 8, 16, 32)),
            "model.mlp": rng.choice((32, 64, 192, 256)),
            "model.qk_norm": rng.choice((False, False, True)),
            "model.tied": rng.choice((True, False)),
            "model.dropout": rng.choice((0.0, 0.1)),
            "model.softcap": rng.choice(("none", "none", "20.0")),
            "model.z_loss": rng.choice((0.0, 0.0, 1e-3)),
            "data.seq_len": rng.choice((16, 32, 64, 128)),
            "batch": rng.choice((16, 32)),
            "accumulation": rng.choice((1, 1, 2, 4)),
            "optimizer": rng.choice(RULES),
            "clip_norm": "none",
            "seed": rng.randrange(1000),
            "steps": STEPS,
            "schedule.warmup": 5,
            "eval_every": "none",
            "hooks": "()",
        }
        found.append(
            Cell(
                backend=rng.choice(BACKENDS),
                devices=n,
                mesh=rng.choice(MESHES[n]),
                overrides=tuple(f"{k}={v}" for k, v in overrides.items()),
            )
        )
    return found


def placed(seed: int, count: int) -> list[Cell]:
    """Return cells of which every `PLACES` are one model in several places: torch on one device, which is what the
    losses of the others are compared with, one on jax and the rest on torch, on meshes that differ.

    The reference in float64 and the baseline are made once for a model, and jax compiles for minutes what torch
    computes in seconds.
    """
    rng = random.Random(f"places {seed}")
    meshes = [(n, mesh) for n in MESHES for mesh in MESHES[n]]
    found: list[Cell] = []
    for model in generated(seed, -(-count // PLACES), devices=(1,)):
        jax = rng.choice(meshes)
        others = rng.sample([m for m in meshes if m[1]], PLACES - 2)
        for backend, (devices, mesh) in (("torch", (1, "")), ("jax", jax), *(("torch", m) for m in others)):
            found.append(dataclasses.replace(model, backend=backend, devices=devices, mesh=mesh))
    return found[:count]
