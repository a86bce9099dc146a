"""Gradient clipping by the global norm, computed on logical tensors."""

from __future__ import annotations

from collections.abc import Mapping

from portatrain.errors import UserError
from portatrain.optim.base import Array, ArrayNamespace


def global_norm(xp: ArrayNamespace, grads: Mapping[str, Array]) -> Array:
    """Return sqrt(sum of g^2 over all gradients), () float32.

    Each logical tensor is summed first, then the tensors in the order of their names. The order between tensors is
    therefore the same for every mesh, layer grouping and framework. An element above 1.8e19 has a square above the
    range of float32: the norm is then infinite, and the trainer skips the step as not finite.

    Raises:
        UserError: ``grads`` is empty.
    """
    if not grads:
        raise UserError(
            "the gradient norm",
            expected="at least one trainable parameter",
            got="none",
            do="Remove a pattern from frozen, or add one to trainable.",
        )
    total: Array = None
    for name in sorted(grads):
        square = xp.sum(grads[name] * grads[name])
        total = square if total is None else total + square
    return xp.sqrt(total)


def clip_scale(xp: ArrayNamespace, norm: Array, max_norm: float) -> Array:
    """Return the factor for every gradient, ``min(1, max_norm / norm)``, () float32.

    It is exactly 1 for a norm from 0 to ``max_norm``, without an epsilon (torch adds 1e-6 to the norm), and NaN for a
    NaN norm.
    """

    return max_norm / xp.maximum(norm, max_norm)
