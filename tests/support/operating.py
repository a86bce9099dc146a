"""A state of random numbers for a small model, and surgery on it in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from checkpoints_format.dtypes import NUMPY
from portatrain.backends import reference
from portatrain.backends.program import Program, make_program
from portatrain.backends.state import COUNT, full_name, inventory
from portatrain.checkpoint.surgery import Operated, Proof, Surgery, chosen, prove
from portatrain.data import Stdlib
from portatrain.model.lora import LoRA
from portatrain.model.module import Definition
from portatrain.optim import AdamW, Constant, Rule
from portatrain.recipe import Recipe

SEQ = 8


def recipe_of(model: Any, *, lora: LoRA | None = None, optimizer: Rule | None = None, **more: Any) -> Recipe:
    return Recipe(
        name="small",
        model=model,
        data=Stdlib(seq_len=SEQ),
        optimizer=optimizer or AdamW(lr=0.01),
        schedule=Constant(),
        steps=10,
        batch=3,
        lora=lora,
        trainable=("*",) if lora else None,
        ema_decay=0.9,
        **more,
    )


def random_state(program: Program) -> dict[str, np.ndarray]:
    """Return random values of every tensor, in the dtypes of a checkpoint: no bias is zero, no scale is one."""
    rng, found = np.random.default_rng(0), {}
    for held in inventory(program):
        std = max(0.3, 0.5 * getattr(held.info.init, "std", 0.0))
        values = rng.normal(0, std, held.info.shape)
        values = np.abs(values) if held.slot == "v" else values
        found[full_name(*held.key)] = values.astype(NUMPY[held.info.dtype])
    return {**found, COUNT: np.int32(7)}


def operated(before: Recipe, after: Recipe, surgery: str | Surgery) -> tuple[Operated, dict[str, np.ndarray]]:
    """Return the state after a surgery, and the one before it."""
    was, now = make_program(before), make_program(after)
    state = random_state(was)
    if isinstance(surgery, str):
        surgery = chosen(surgery)(was.definition, now.definition)
    return Operated(state.__getitem__, {n: a.shape for n, a in state.items()}, was, now, surgery), state


def rows() -> dict[str, np.ndarray]:
    """Return random tokens."""
    ids = np.random.default_rng(1).integers(0, 20, (3, SEQ + 1))
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": np.ones((3, SEQ))}


def slope(model: Definition, params: dict[str, np.ndarray], name: str, at: tuple[int, ...]) -> float:
    """Return the derivative of the summed loss on `rows` for one element of a parameter, by central differences."""
    found = []
    for h in (1e-5, -1e-5):
        moved = {n: np.array(p, np.float64) for n, p in params.items()}
        moved[name][at] += h
        found.append(float(reference.forward(model, moved, rows()).value.sum))
    return (found[0] - found[1]) / 2e-5


def proof(found: Operated) -> Proof:
    """Return the proof on random tokens."""
    before, after = found.before.definition, found.after.definition
    return prove(found, before, after, rows())
