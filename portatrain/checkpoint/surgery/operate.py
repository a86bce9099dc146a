"""Carry out a surgery on the state in a checkpoint, tensor by tensor.

parameters, states  kept bit for bit, or made as the surgery's `Edit` says
averages            kept, or made in the same way of averages; of what has none, of parameters
slots               kept with their tensor; of a made one mapped by its `Edit.slots`, if the slot has the tensor's shape
                    and is a mean of the gradient or of its square; else they start at zero
opt/count           kept
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints_format import Box
from checkpoints_format.dtypes import NUMPY
from portatrain.backends.program import Program
from portatrain.backends.state import COUNT, StateTensor, full_name, initial_box, inventory
from portatrain.checkpoint.surgery.edits import INITIAL, Edit, Surgery, named, tensors
from portatrain.errors import UserError

DEGREES = {"a moving mean of the gradient": 1, "a moving mean of the squared gradient": 2}
"""What a slot means (`Rule.meaning`) -> its degree in the gradient."""


class Operated:
    """The state after a surgery.

    Args:
        read: returns a whole tensor of the checkpoint, by full name.
        there: the shapes in the checkpoint, by full name.
        before, after: the programs of the models before and after the surgery, with one optimizer.
        surgery: what is done.

    Raises:
        UserError: the surgery leaves a tensor of the new model unmade, or makes one that no model has.
    """

    def __init__(
        self,
        read: Callable[[str], np.ndarray],
        there: Mapping[str, Sequence[int]],
        before: Program,
        after: Program,
        surgery: Surgery,
    ) -> None:
        self._read, self._there = read, {name: tuple(shape) for name, shape in there.items()}
        self.before, self.after, self.surgery = before, after, surgery
        self._held: dict[str, StateTensor] = {full_name(*t.key): t for t in inventory(after)}
        self._was = {full_name(*t.key): t for t in inventory(before)}
        self._last: tuple[str, np.ndarray] | None = None
        self._lock = threading.Lock()
        self._check()

    @property
    def names(self) -> list[str]:
        """The tensors of the new state, by full name, without the count of steps."""
        return list(self._held)

    def fate(self, full: str) -> str:
        """Return 'kept', 'made', 'mapped' (a slot) or 'fresh' (a slot that starts at zero, an average that starts at
        its parameter)."""
        held = self._held[full]
        edit = self.surgery.edits.get(held.info.name)
        if held.slot is None:
            if held.role == "ema" and not any(self._has("ema", n) for n in self._sources(held, edit)):
                return "fresh"
            return "kept" if edit is None else "made"
        if edit is None:
            return "kept" if self._there.get(full) == held.info.shape else "fresh"
        return "fresh" if self._degree(held, edit) is None else "mapped"

    def exact(self, full: str) -> np.ndarray:
        """Return a tensor of the new state before it is rounded to its dtype: of one that is kept, its bits."""
        held, fate = self._held[full], self.fate(full)
        edit = self.surgery.edits.get(held.info.name)
        if fate == "kept":
            return self._read(full)
        if held.slot is not None:
            if fate == "fresh" or edit is None or edit.slots is None:
                return np.zeros(held.info.shape, NUMPY[held.info.dtype])
            slot = self._source(held.role, self._sources(held, edit)[0], held)
            return self._shaped(full, edit.slots(slot, self._degree(held, edit) or 1), held)
        if edit is None:  # an average that starts at its parameter
            return self._source("params", held.info.name, held)
        return self._shaped(full, edit.make(*(self._source(held.role, name, held) for name in edit.of)), held)

    def stored(self, full: str) -> np.ndarray:
        """Return a tensor of the new state in the dtype in which a checkpoint keeps it."""
        return self.exact(full).astype(NUMPY[self._held[full].info.dtype], copy=False)

    def source(self, full: str) -> Callable[[Box], np.ndarray]:
        """Return the source of a tensor for a `Writer`: it gives boxes."""

        def box_of(box: Box) -> np.ndarray:
            with self._lock:
                if self._last is None or self._last[0] != full:
                    self._last = full, self._read(full) if full == COUNT else self.stored(full)
                array = self._last[1]
            return array[box.slices()] if box.shape else array

        return box_of

    def old(self, role: str = "params") -> dict[str, np.ndarray]:
        """Return the tensors of a role before the surgery, by name."""
        return {t.info.name: self._read(full) for full, t in self._was.items() if t.role == role}

    def new(self, role: str = "params", *, rounded: bool = False) -> dict[str, np.ndarray]:
        """Return the tensors of a role after the surgery, by name; `rounded`: as a checkpoint keeps them."""
        get = self.stored if rounded else self.exact
        return {t.info.name: get(full) for full, t in self._held.items() if t.role == role}

    def as_json(self) -> dict[str, Any]:
        """Return what became of tensors and slots, in numbers, with the names of those that are made."""
        found = {"tensors": Counter[str](), "averages": Counter[str](), "slots": Counter[str]()}
        for full, held in self._held.items():
            kind = "slots" if held.slot is not None else "averages" if held.role == "ema" else "tensors"
            found[kind][self.fate(full)] += 1
        gone = tensors(self.before.definition).keys() - tensors(self.after.definition).keys()
        return {
            **{kind: dict(sorted(count.items())) for kind, count in found.items() if count},
            "made": sorted(self.surgery.edits),
            "dropped": sorted(gone),
        }

    # ---- inside

    def _has(self, role: str, name: str) -> bool:
        return name != INITIAL and full_name(role, name) in self._there

    def _sources(self, held: StateTensor, edit: Edit | None) -> list[str]:
        return [held.info.name] if edit is None else [n for n in edit.of if n != INITIAL]

    def _source(self, role: str, name: str, held: StateTensor) -> np.ndarray:
        """Return an input of an edit, in float64 if it is floating."""
        if name == INITIAL:
            shape = held.info.shape
            found = initial_box(
                tensors(self.after.definition)[held.info.name], self.after.seed, (0,) * len(shape), shape
            )
        else:
            role = role if role != "ema" or self._has("ema", name) else "params"
            role = "state" if role == "params" and name in self.before.definition.states else role
            found = self._read(full_name(role, name))
        return found.astype(np.float64) if found.dtype.kind not in "iub" else found

    def _degree(self, held: StateTensor, edit: Edit) -> int | None:
        """Return the degree of a slot that the edit maps; None if it starts at zero."""
        of = self._sources(held, edit)
        if edit.slots is None or not of or not self._has(held.role, of[0]):
            return None
        old = tensors(self.before.definition)[of[0]]
        new = tensors(self.after.definition)[held.info.name]
        if self._there[full_name(held.role, of[0])] != old.shape or held.info.shape != new.shape:
            return None  # a slot of another shape, such as the factors of Adafactor
        rules = [self.after.optimizer.rule_for(info) for info in (old, new)]
        means = [rule.meaning(str(held.slot)) for rule in rules]
        if means[0] is None or means[0] != means[1]:
            return None
        return DEGREES.get(means[0][0])

    def _shaped(self, full: str, made: np.ndarray, held: StateTensor) -> np.ndarray:
        made = np.asarray(made)
        if made.shape != held.info.shape:
            raise UserError(
                f"surgery: {full}",
                expected=f"an array of shape {list(held.info.shape)}, as the new model has it",
                got=str(list(made.shape)),
                do="Correct `make` or `slots` of its Edit, or the size that --set gives.",
            )
        return made

    def _check(self) -> None:
        was, now, edits = tensors(self.before.definition), tensors(self.after.definition), self.surgery.edits
        if unknown := [n for n in edits if n not in now]:
            raise _wrong("edits of tensors that the new model has", unknown, "Correct the names in `edits`.")
        if unknown := [f"{of} (for {n})" for n, edit in edits.items() for of in edit.of if of not in (*was, INITIAL)]:
            raise _wrong("sources in the old model (`Edit.of`)", unknown, "Correct the names in `Edit.of`.")
        left = [
            f"{n} ({list(was[n].shape)} before, {list(t.shape)} after)" if n in was else f"{n} (new)"
            for n, t in now.items()
            if n not in edits and (n not in was or was[n].shape != t.shape)
        ]
        scaled = [
            f"{n} ({was[n].multiplier:g} before, {t.multiplier:g} after)"
            for n, t in now.items()
            if n in was and was[n].multiplier != t.multiplier
        ]
        if scaled:
            raise _wrong(
                "the multipliers of muP that the run has: with others the new model would compute something else",
                scaled,
                "Grow what they do not depend on (mlp, heads, layers, vocab), or begin a new run at that width.",
            )
        if left:
            raise _wrong(
                "every other tensor in both models, in one shape",
                left,
                "--set changes more of the model than this surgery makes: leave that out, or do it in a fork of the "
                "fork, with a surgery of its own.",
            )


def _wrong(expected: str, names: list[str], do: str) -> UserError:
    return UserError("surgery", expected=expected, got=named(names), do=do)
