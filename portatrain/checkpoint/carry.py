"""Carry the state of a checkpoint over to a changed recipe: which tensors are kept, mapped, rounded or fresh.

parameters, states  kept; factors of LoRA that are new start as in a new run
averages            kept; a new one starts at its parameter
slots               by the rule below; those of a parameter that was not trained before start at zero
dtype               another precision converts: to bfloat16 by rounding to the nearest, to float32 exactly

The rule for slots is all or nothing, because there is one count of applied steps, from which rules correct the bias of
their slots. If the optimizer's class stays, every slot and the count stay, whatever its numbers are. If the class
changes and every slot of the new one means the same as that of the old one (`Rule.meaning`), slots are mapped and the
count stays. Otherwise all
slots are zero, and the count starts at 0, as in a new run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints_format import Reader
from checkpoints_format.dtypes import NUMPY
from portatrain.backends.program import Program
from portatrain.backends.state import COUNT, StateTensor, full_name, initial_box, inventory
from portatrain.checkpoint.format_layout import check_tiles, format_layout
from portatrain.errors import UserError
from portatrain.model.lora import is_factor
from portatrain.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Carry:
    """What becomes of the tensors of a checkpoint under a changed recipe, by full names.

    Attributes:
        scaled: a slot that is mapped -> the factor.
        fresh: tensors that the checkpoint lacks or that do not fit, and start as in a new run.
        kept: tensors of which every bit stays.
        dropped: tensors of the checkpoint that the recipe has no use for.
        optimizer: 'kept', 'mapped' or 'fresh'.
    """

    scaled: Mapping[str, float]
    fresh: frozenset[str]
    kept: frozenset[str]
    dropped: tuple[str, ...]
    optimizer: str
    tensors: Mapping[str, StateTensor]
    seed: int

    def reading(self, read: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        """Return a `read` for `Backend.restore_state` that gives the carried state; `read` gives the checkpoint's."""

        def carried(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
            full = full_name(role, name)
            if full == COUNT:
                return np.zeros(shape, np.int32) if full in self.fresh else read(role, name, offset, shape)
            tensor = self.tensors[full]
            dtype = NUMPY[tensor.info.dtype]
            if full not in self.fresh:
                found = read(role, name, offset, shape)
                if (factor := self.scaled.get(full)) is not None:
                    found = np.asarray(found, np.float32) * np.float32(factor)
                return found.astype(dtype, copy=False)
            if role == "ema":
                return carried("params", name, offset, shape).astype(dtype, copy=False)
            return initial_box(tensor.info, self.seed, offset, shape)

        return carried

    def as_json(self) -> dict[str, Any]:
        """Return what changed in the state, in short lists, for the record."""
        dropped, fresh = sorted(self.dropped), sorted(self.fresh)
        return {"optimizer": self.optimizer, "fresh": len(fresh), "dropped": len(dropped), "examples": fresh[:4]}


def carry(reader: Reader, program: Program, before: Recipe) -> Carry:
    """Return what becomes of an open checkpoint under `program`; `before` is the recipe that it was saved under.

    Raises:
        UserError: a parameter or a state is missing, or has another shape.
    """
    there = {t.name: t for t in reader.layout.tensors}
    tensors = {full_name(*held.key): held for held in inventory(program)}
    layout = {t.name: t for t in format_layout(program).tensors}
    check_tiles(reader)
    _check(reader, there, layout)
    fits = {name for name in layout if name in there and there[name].shape == layout[name].shape}
    slots = {name: held for name, held in tensors.items() if held.slot is not None}
    trained = {name: held for name, held in slots.items() if before.trains(held.info.name)}
    scaled, optimizer = _mapped(trained, fits, program, before)
    fresh = {name for name in layout if name not in fits or (name in slots and name not in trained)}
    if optimizer == "fresh":
        fresh |= {*slots, COUNT}
    kept = {name for name in fits - fresh if name not in scaled and there[name].dtype == layout[name].dtype}
    return Carry(
        scaled=scaled,
        fresh=frozenset(fresh),
        kept=frozenset(kept),
        dropped=tuple(name for name in there if name not in layout or name in fresh),
        optimizer=optimizer,
        tensors=tensors,
        seed=program.seed,
    )


def _mapped(
    trained: Mapping[str, StateTensor], fits: set[str], program: Program, before: Recipe
) -> tuple[dict[str, float], str]:
    """Return the factors of slots that are mapped, and 'kept', 'mapped' or 'fresh'. `trained`: the slots of the
    parameters that were trained before."""
    new, was = program.optimizer, before.optimizer
    if type(new) is type(was):  # slots that were not there, as of SGD that gets a momentum, start at zero
        return {}, "kept"
    scaled: dict[str, float] = {}
    for name, held in trained.items():
        now, then = (rule.rule_for(held.info).meaning(str(held.slot)) for rule in (new, was))
        if name not in fits or now is None or then is None or now[0] != then[0]:
            return {}, "fresh"
        if (factor := then[1] / now[1]) != 1.0:
            scaled[name] = factor
    return scaled, "mapped"


def _check(reader: Reader, there: Mapping[str, Any], layout: Mapping[str, Any]) -> None:
    wanted = [n for n in layout if n.startswith(("params/", "state/"))]
    missing = [n for n in wanted if n not in there and not is_factor(n)]
    other = [
        f"{n} ({list(there[n].shape)} for {list(layout[n].shape)})"
        for n in wanted
        if n in there and there[n].shape != layout[n].shape
    ]
    gone = [n for n in there if n.startswith(("params/", "state/")) and n not in layout]
    if missing or other or gone:
        found = [("different", other), ("not in it", missing), ("not the model's", gone)]
        raise UserError(
            reader.store.describe("COMMIT"),
            expected="the parameters and states of this model",
            got="; ".join(f"{what}: {', '.join(names[:4])}" for what, names in found if names),
            do="Sizes of a model cannot change in a run or a fork: begin a new run with them.",
        )
