"""Clipping by the norm over all gradients, computed on logical tensors."""

from __future__ import annotations

from collections.abc import Mapping

from portatrain.errors import UserError
from portatrain.optim.base import Array, Xp


def global_norm(xp: Xp, grads: Mapping[str, Array]) -> Array:
    """The 2-norm, 0-d, of all gradients as one vector.

    The squares of each logical tensor are summed, then the tensors in the order of their names, so
    that no mesh, layer grouping or framework changes the order between tensors. A square above
    3.4e38 (an element above 1.8e19) makes the norm infinite, and the step then counts as not finite.
    """
    if not grads:
        raise UserError(
            "the gradient norm",
            expected="at least one tensor that trains",
            got="none",
            do="Free a parameter from the frozen ones.",
        )
    total: Array = None
    for name in sorted(grads):
        square = xp.sum(grads[name] * grads[name])
        total = square if total is None else total + square
    return xp.sqrt(total)


def clip_scale(xp: Xp, norm: Array, max_norm: float) -> Array:
    """What to multiply every gradient by, 0-d: ``min(1, max_norm / norm)``.

    Exactly 1 up to ``max_norm``, zero included, with no epsilon (torch adds 1e-6 to the norm);
    NaN for a NaN norm.
    """
    return max_norm / xp.maximum(norm, max_norm)
