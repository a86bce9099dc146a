"""Cases of the losses. Legend as in `portatrain.model.ops`."""

from __future__ import annotations

from typing import Any

import numpy as np

from portatrain.testing.case import Args, Case, Rng, normal, with_ints

_TARGETS = [[0, 6, 3, 3, 1], [2, 2, 5, 0, 6]]
_MASKS = {
    "": None,
    ", mask": [[1, 1, 0, 0.5, 2], [0, 0, 1, 1, 0.25]],
    ", a sample masked out": [[0, 0, 0, 0, 0], [1, 1, 1, 0, 1]],
    ", all masked out": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
}
_CROSS_ENTROPY: dict[str, dict[str, float]] = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"softcap": 0.8},
    "z-loss and softcap": {"z_loss": 0.1, "softcap": 0.8},
}


def _parts(loss: Any) -> tuple[Any, Any, Any]:
    return loss.sum, loss.weight_B, loss.loss_B


def cross_entropy_case(what: str, b: int, s: int, e: int, v: int, *, scale: float = 1.0, **options: Any) -> Case:
    """Return the case of cross-entropy of random x (B, S, E), table (V, E) and targets."""

    def args(rng: Rng) -> Args:
        x, table = normal((b, s, e), (v, e))(rng)
        return scale * x, table, rng.integers(0, v, (b, s)).astype(np.int32)

    return Case(
        name=f"cross_entropy {what}",
        fn=lambda ops, x, table, targets: _parts(ops.cross_entropy(x, table, targets, **options)),
        args=args,
        first_only=True,
    )


def loss_cases() -> list[Case]:
    cases = []
    for what, options in _CROSS_ENTROPY.items():
        for name, mask in _MASKS.items():

            def fn(ops: Any, x: Any, table: Any, targets: Any, *mask: Any, o: dict = options) -> Any:
                return _parts(ops.cross_entropy(x, table, targets, mask=mask[0] if mask else None, **o))

            def args(rng: Rng, mask: Any = mask) -> Args:
                given = with_ints((2, 5, 4), (7, 4), ints=[_TARGETS])(rng)
                return given if mask is None else (*given, np.array(mask, np.float32))

            # The weights are part of the definition of a batch: no gradient reaches them.
            constant = () if mask is None else (3,)
            cases.append(Case(name=f"cross_entropy {what}{name}", fn=fn, args=args, first_only=True, constant=constant))
        cases.append(
            Case(
                name=f"cross_entropy {what}, one target a sample",
                fn=lambda ops, x, table, targets, o=options: _parts(ops.cross_entropy(x, table, targets, **o)),
                args=with_ints((3, 4), (7, 4), ints=[[0, 6, 3]]),
                first_only=True,
            )
        )
    cases.append(
        Case(
            name="cross_entropy of float32 features",  # a mean over the sequence, for instance
            fn=lambda ops, x, table, targets: _parts(ops.cross_entropy(ops.cast(x, "float32"), table, targets)),
            args=with_ints((3, 4), (7, 4), ints=[[0, 6, 3]]),
            first_only=True,
        )
    )
    cases.append(cross_entropy_case("of large logits", 2, 3, 4, 7, scale=40.0))
    cases.append(
        Case(
            name="cross_entropy with a mask, one target a sample",
            fn=lambda ops, x, table, mask, targets: _parts(ops.cross_entropy(x, table, targets, mask=mask)),
            args=lambda rng: (
                *normal((3, 4), (7, 4))(rng),
                np.array([1, 0, 0.5], np.float32),
                np.array([0, 6, 3], np.int32),
            ),
            first_only=True,
            constant=(2,),
        )
    )
    cases.append(
        Case(
            name="loss",
            fn=lambda ops, x_B, weight_B: _parts(ops.loss(x_B * x_B, weight_B)),
            args=normal((5,), (5,)),
            first_only=True,
        )
    )
    return [*cases, *_across_samples()]


def _across_samples() -> list[Case]:
    """Comparisons with parameters of their own, over the whole batch and in groups."""

    def compared(ops: Any, x_BE: Any, y_BE: Any, scale_E: Any, weight_B: Any, *, group: int | None) -> tuple:
        def contrast(x_GNE: Any, y_GNE: Any, weight_GN: Any, there_GN: Any) -> Any:
            x_GNE = x_GNE * ops.weight(scale_E)
            scores_GNM = ops.einsum("gne,gme->gnm", x_GNE, y_GNE, dtype="float32")
            own_GN = ops.einsum("gne,gne->gn", x_GNE, y_GNE, dtype="float32")
            return (ops.logsumexp(scores_GNM) - own_GN) * ops.cast(there_GN, "float32") * weight_GN, weight_GN

        return _parts(ops.across_samples(contrast, x_BE, y_BE, weight_B, group=group))

    return [
        Case(
            name=f"across_samples, {'all' if group is None else f'groups of {group}'}",
            fn=lambda ops, *xs, group=group: compared(ops, *xs, group=group),
            args=normal((6, 4), (6, 4), (4,), (6,), scale=0.7),
            first_only=True,
        )
        for group in (None, 3, 2)
    ]
