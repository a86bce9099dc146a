"""The exact values, gradients and bounds of a grouped matmul, in float64. N rows, X experts, E and F sizes."""

from __future__ import annotations

import numpy as np

from portatrain.testing.kernels.bounds import Array, Due, Operands, due, narrow


def grouped_matmul(operands: Operands, indices: Operands, options: Operands, dtype: str) -> list[Due]:
    """Return what is due: the result, and the gradients of x and w."""
    x, w, g = operands.values()
    ends = np.cumsum(indices["sizes_X"])
    groups = [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def rows(x: Array, w: Array) -> Array:
        out = np.zeros((len(x), w.shape[2]))
        for of, weight in zip(groups, w, strict=True):
            out[of] = x[of] @ weight
        return out

    def weights(x: Array, g: Array) -> Array:
        return np.stack([x[of].T @ g[of] for of in groups]) if groups else np.zeros_like(w)

    wT = np.swapaxes(w, 1, 2)
    longest = max((of.stop - of.start for of in groups), default=0)
    parts = (
        ("result", rows, (x, w), w.shape[1]),
        ("gradient of x", rows, (g, wT), w.shape[2]),
        ("gradient of w", weights, (x, g), longest),
    )
    found = []
    for operand, function, (a, b), terms in parts:
        size = max(float(np.abs(a).max(initial=0.0)), float(np.abs(b).max(initial=0.0)))
        deviation = narrow(dtype, terms) * function(np.abs(a), np.abs(b))
        found.append(due(operand, function(a, b), deviation, dtype, terms, size))
    return found
