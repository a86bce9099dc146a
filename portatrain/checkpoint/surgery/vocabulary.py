"""Grow the vocabulary: new rows of every table are the mean of the rows that are there (Hewitt 2021, "Initializing new
word embeddings for pretrained language models").

The logits of the old ids stay. The logit of a new id is the mean of all old logits, and the exponential of a mean is at
most the mean of the exponentials: so the loss on old ids rises by at most ln(new size / old size), without a softcap.
Slots of new rows start at zero.
"""

from __future__ import annotations

import numpy as np

from portatrain.checkpoint.surgery.edits import Edit, Surgery, grown
from portatrain.model.module import Definition


def vocabulary(before: Definition, after: Definition) -> Surgery:
    """Return the surgery to a model with more ids (axis `vocab`)."""
    return Surgery(
        edits={
            info.name: _edit(info.name, info.axes.index("vocab"), info.shape[info.axes.index("vocab")])
            for info in grown("vocabulary", ("vocab",), before, after)
        }
    )


def _edit(name: str, axis: int, size: int) -> Edit:
    def make(table: np.ndarray) -> np.ndarray:
        mean = table.mean(axis, keepdims=True)
        return np.concatenate([table, np.repeat(mean, size - table.shape[axis], axis)], axis)

    def slots(slot: np.ndarray, degree: int) -> np.ndarray:
        more = [(0, size - n if at == axis else 0) for at, n in enumerate(slot.shape)]
        return np.pad(slot, more)

    return Edit(of=(name,), make=make, slots=slots)
