"""What a surgery says: how each tensor of the new model is made, and whether the function of the model stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from portatrain.errors import UserError
from portatrain.model.module import Definition, TensorInfo

INITIAL = "(initial values)"
"""In `Edit.of`: the tensor as a new run begins with it, a function of seed, name and index."""

Slots = Callable[[np.ndarray, int], np.ndarray]
"""Returns a slot of the new tensor, given that of the first old tensor in `Edit.of`, and the degree of the slot: 1 for
a mean of the gradient, 2 for a mean of its square."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """How one parameter or state of the new model is made.

    Attributes:
        of: names of tensors of the old model, or `INITIAL`.
        make: gets these as whole arrays, floating ones in float64, and returns the new one, in the shape that the new
            model has. It is applied to parameters, and in the same way to their averages.
        slots: maps the slots of an optimizer. None: they start at zero.
    """

    of: tuple[str, ...]
    make: Callable[..., np.ndarray]
    slots: Slots | None = None

    def __post_init__(self) -> None:
        good = isinstance(self.of, tuple) and all(isinstance(name, str) for name in self.of)
        if not good or not callable(self.make) or not (self.slots is None or callable(self.slots)):
            raise UserError(
                "Edit",
                expected="of=(names of tensors,), make=a function, and slots=a function or None",
                got=f"of={self.of!r}, make={self.make!r}, slots={self.slots!r}",
                do='Write it as in Edit(of=("embed/table",), make=lambda table: table).',
            )


@dataclass(frozen=True, kw_only=True)
class Surgery:
    """What a surgery does to a model.

    Attributes:
        edits: name in the new model -> how it is made. A tensor without an edit is kept: it must be in the old model,
            in the same shape.
        changes: why the function of the model changes. '': it claims that it stays, which is proved.
    """

    edits: Mapping[str, Edit]
    changes: str = ""

    def __post_init__(self) -> None:
        other = [name for name, edit in self.edits.items() if not isinstance(edit, Edit)]
        if other or not isinstance(self.changes, str):
            raise UserError(
                "Surgery",
                expected="edits={name: Edit(...)}, and changes=a sentence or ''",
                got=f"something else for {named(other)}" if other else f"changes={self.changes!r}",
                do="docs/run/surgery.md has an example.",
            )


Transform = Callable[[Definition, Definition], Surgery]
"""A surgery: returns what is done to the tensors, given the models before and after it."""


def tensors(model: Definition) -> dict[str, TensorInfo]:
    """Return the parameters and states of a model, by name."""
    return {**model.params, **model.states}


def named(names: Iterable[str]) -> str:
    """Return names in short, for a message."""
    found = sorted(names)
    return f"{', '.join(found[:4])}{f' and {len(found) - 4} more' if len(found) > 4 else ''}"


def same_names(what: str, before: Definition, after: Definition) -> None:
    """Raise UserError unless both models have the same parameters and states."""
    was, now = tensors(before), tensors(after)
    if found := [*(f"new: {n}" for n in now if n not in was), *(f"gone: {n}" for n in was if n not in now)]:
        raise UserError(
            f"surgery {what}",
            expected="the same parameters and states before and after it, some of another size",
            got=named(found),
            do="Leave out the --set that adds or removes parts; a fork of the fork can do another surgery. Layers of "
            "several kinds keep their names if whole periods of them are added.",
        )


def grown(what: str, axes: Iterable[str], before: Definition, after: Definition) -> list[TensorInfo]:
    """Return the tensors of the new model that have more elements along `axes`.

    Raises:
        UserError: another axis differs, an axis shrinks, or none grows.
    """
    same_names(what, before, after)
    was, may, found = tensors(before), set(axes), []
    for name, info in tensors(after).items():
        old = was[name]
        if old.axes != info.axes:
            raise UserError(
                f"surgery {what}: {name}",
                expected=f"the axes {' '.join(old.axes)} in the new model too",
                got=" ".join(info.axes),
                do="Leave out the --set that changes them.",
            )
        for axis, n, m in zip(info.axes, old.shape, info.shape, strict=True):
            if n != m and (axis not in may or m < n):
                raise _axis(what, name, axis, n, m, may)
        if old.shape != info.shape:
            found.append(info)
    if not found:
        raise UserError(
            f"surgery {what}",
            expected=f"a larger size of {' or '.join(sorted(may))} in the new model",
            got="the same sizes",
            do="Give the new size with --set; docs/run/surgery.md has an example of every surgery.",
        )
    return found


def _axis(what: str, name: str, axis: str, was: int, now: int, may: set[str]) -> UserError:
    only = " and ".join(sorted(may))
    if axis in may:
        return UserError(
            f"surgery {what}: {name}",
            expected=f"at least the {was} that axis {axis} has",
            got=str(now),
            do="A surgery only lets sizes grow, since a smaller one would leave out what was trained.",
        )
    if axis == "head_dim":
        return UserError(
            f"surgery {what}: {name}",
            expected=f"the old head_dim of {was}: the scale head_dim^-0.5 of scores and the rotary frequencies "
            "theta^(-2i / head_dim) follow from it, so no weights give the old scores at every distance",
            got=f"head_dim {was} before, {now} after",
            do=f"Set head_dim={was}, if the model has that field: its default is embed / heads. More heads are another "
            "surgery (width).",
        )
    return UserError(
        f"surgery {what}: {name}",
        expected=f"another size of {only} alone",
        got=f"{axis} {was} before, {now} after",
        do=f"Keep {axis} as it is (another size of it does not keep the function, or is another surgery); a fork of "
        "the fork can do another surgery. A size that follows from one that you set, as head_dim from embed / heads, "
        "has a field of its own.",
    )


def contracted(info: TensorInfo, axis: int) -> bool:
    """Return True if the forward pass sums over this axis of a parameter."""
    return info.batch_dims <= axis < info.batch_dims + info.fan_in_axes


def along(axis: int, index: np.ndarray) -> tuple[slice | np.ndarray, ...]:
    """Return the index that takes `index` along `axis` of an array."""
    return (*(slice(None),) * axis, index)
