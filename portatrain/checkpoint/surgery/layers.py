"""Add layers: each is a copy of the layer below it that adds nothing to the residual stream (Wu et al. 2024, LLaMA Pro,
arXiv:2401.02415, section 3.2).

New layers are spread evenly: 2 new ones among 4 come after the second and the fourth. In a new layer everything that
writes into the residual stream is zero: weights that contract other axes into `embed`, and what starts at zero with the
axis `embed` last, such as biases. So `x + part(norm(x))`, and `x + norm(part(x))`, return x. Zero weights get a
gradient, so the layer learns from the first step on. Slots of new layers start at zero.
"""

from __future__ import annotations

import numpy as np

from portatrain.checkpoint.surgery.edits import Edit, Surgery, along, grown
from portatrain.model.module import Constant, Definition, TensorInfo


def layers(before: Definition, after: Definition) -> Surgery:
    """Return the surgery to a model with more layers in its Stacks."""
    was = before.params | before.states
    return Surgery(
        edits={
            info.name: _edit(info, was[info.name].shape[info.axes.index("layers")])
            for info in grown("layers", ("layers",), before, after)
        }
    )


def places(was: int, now: int) -> list[tuple[int, bool]]:
    """Return, for each of `now` layers, (the old layer of which it is a copy; whether it is new)."""
    new = [(i + 1) * was // (now - was) - 1 for i in range(now - was)]
    found = [(at, True) for at in (max(0, n) for n in new)] + [(at, False) for at in range(was)]
    return sorted(found)  # False before True: a copy comes after its layer


def writes(info: TensorInfo) -> bool:
    """Return True if a tensor of a layer adds to the residual stream by itself."""
    return info.axes[-1] == "embed" and (info.fan_in_axes > 0 or info.init == Constant(value=0.0))


def _edit(info: TensorInfo, was: int) -> Edit:
    axis = info.axes.index("layers")
    found = places(was, info.shape[axis])
    source, new = [at for at, _ in found], np.array([fresh for _, fresh in found])

    def zeroed(array: np.ndarray) -> np.ndarray:
        made = np.take(array, source, axis)
        made[along(axis, new)] = 0
        return made

    return Edit(
        of=(info.name,),
        make=zeroed if info.role == "params" and writes(info) else lambda array: np.take(array, source, axis),
        slots=lambda slot, degree: zeroed(slot),
    )
