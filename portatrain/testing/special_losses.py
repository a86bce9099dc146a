"""The special points of the losses; `special_cases.py` has all of them together."""

from __future__ import annotations

from typing import Any

import numpy as np

from portatrain.testing.special_case import INF, Special, f32, i32

Array = np.ndarray


def loss_specials() -> list[Special]:
    """Return the cases of `cross_entropy` and `loss`."""

    def loss(ops: Any, x: Array, table: Array, targets: Array, mask: Array, **options: Any) -> tuple:
        found = ops.cross_entropy(x, table, targets, mask=ops.stop_gradient(mask), **options)
        return found.sum, found.weight_B, found.loss_B

    zeros, table, targets = f32(np.zeros((2, 3, 4))), f32(np.ones((5, 4))), i32([[0, 4, 2], [1, 1, 0]])
    given = {
        "equal logits": (zeros + 1, table, targets, f32(np.ones((2, 3)))),
        "nothing counts": (zeros + 1, table, targets, f32(np.zeros((2, 3)))),
        "large logits": (zeros + 100, f32(np.arange(20).reshape(5, 4)), targets, f32(np.ones((2, 3)))),
    }
    return [
        *(
            Special(
                method="cross_entropy",
                what=what,
                fn=lambda ops, x, t, y, m: loss(ops, x, t, y, m),
                args=args,
                gradients=lambda x, t, y, m, g: _loss_gradients(x, t, y, m, g),
            )
            for what, args in given.items()
        ),
        Special(
            method="cross_entropy",
            what="no positions",
            fn=lambda ops, x, t, y, m: loss(ops, x, t, y, m),
            args=(f32(np.zeros((2, 0, 4))), table, i32(np.zeros((2, 0))), f32(np.zeros((2, 0)))),
        ),
        Special(
            method="loss",
            what="infinities",
            fn=lambda ops, each, w: (lambda x: (x.sum, x.weight_B, x.loss_B))(ops.loss(each, ops.stop_gradient(w))),
            args=(f32([INF, 1.0, 0.0]), f32([0.0, 1.0, 2.0])),
            gradients=lambda each, w, g: (g * np.ones(3), np.zeros(3)),
        ),
    ]


def _loss_gradients(x: Array, table: Array, targets: Array, mask: Array, g: Array) -> tuple[Array, ...]:
    logits = x @ table.T
    e = np.exp(logits - logits.max(-1, keepdims=True))
    slope = (e / e.sum(-1, keepdims=True) - (targets[..., None] == np.arange(len(table)))) * mask[..., None] * g
    return slope @ table, np.einsum("bsv,bse->ve", slope, x), np.zeros_like(mask)
