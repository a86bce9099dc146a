"""Stretch rotary positions: the frequencies change, and no tensor does. The function changes at every position but the
first of a text (`portatrain/model/rope.py` has the scalings); by how much is measured.
"""

from __future__ import annotations

from portatrain.checkpoint.surgery.edits import Surgery, same_names, tensors
from portatrain.errors import UserError
from portatrain.model.module import Definition

WHY = "other rotary frequencies turn queries and keys by other angles"


def rope(before: Definition, after: Definition) -> Surgery:
    """Return the surgery to a model with other rotary frequencies."""
    same_names("rope", before, after)
    was = tensors(before)
    other = [
        f"{n} {list(was[n].shape)} before, {list(t.shape)} after"
        for n, t in tensors(after).items()
        if was[n].shape != t.shape
    ]
    if other:
        raise UserError(
            "surgery rope",
            expected="the same sizes before and after it: only frequencies change",
            got="; ".join(other[:4]),
            do="Set the scaling alone, such as --set model.rope_scaling=LinearScaling --set "
            "model.rope_scaling.factor=2; a fork of the fork can do another surgery.",
        )
    return Surgery(edits={}, changes=WHY)
