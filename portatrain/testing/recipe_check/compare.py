"""Compare what two backends, meshes or numbers of microbatches give, and name what differs.

A bound is a part of what is compared plus a multiple of its sensitivity: the change of the baseline when every
parameter moves by its last bit. So a model whose gradient is a difference of large numbers is not blamed for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from portatrain.testing.recipe_check.measured import Arrays, Measured
from portatrain.testing.recipe_check.report import Finding

LOSS = 1e-5
"""Relative difference of a loss or a State; fp32 with other orders of sums gives a tenth of it."""
GRADIENT = 2e-5
"""Difference of a gradient's element over the largest element of that tensor; fp32's floor is 3e-6."""
LEAST = 1e-6
"""Elements below this part of the largest element of all gradients are rounding."""
UPDATE = 0.02
"""Difference of a parameter's update over the update, in 2-norms: rules that take a sign or a root of a gradient turn
elements around that are nothing but rounding."""
LATER = 1e-4
"""Relative difference of the loss of the second step, which has such an update behind it."""
SENSITIVITY = 8.0
MANY = 3
"""Parameters that a finding names."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The largest changes of the baseline, by point, when parameters move by their last bit."""

    loss: Mapping[str, float]
    gradients: Mapping[str, Mapping[str, float]]
    evaluated: Mapping[str, float]
    """By the name of what an evaluation gives."""


def sensitivity(one: Measured, near: Measured) -> Sensitivity:
    return Sensitivity(
        loss={point: abs(one.loss[point] - near.loss[point]) for point in one.loss},
        gradients={
            point: {n: largest(g - near.gradients[point][n]) for n, g in gradients.items()}
            for point, gradients in one.gradients.items()
        },
        evaluated={key: largest(a.astype(np.float64) - near.evaluated[key]) for key, a in one.evaluated.items()},
    )


def largest(array: np.ndarray) -> float:
    """Return the largest absolute value of an array; infinity if one is not finite."""
    value = float(np.abs(array.astype(np.float64)).max(initial=0.0))
    return value if np.isfinite(value) else np.inf


def differences(
    one: Measured,
    other: Measured,
    near: Sensitivity,
    *,
    names: tuple[str, str],
    rule: str,
    start: Mapping[str, np.ndarray],
) -> list[Finding]:
    """Return what differs between two measurements, the first cause first. What `other` lacks is not compared.

    Args:
        names: of the two, in words.
        rule: the name of the optimizer rule.
        start: the parameters from which steps were taken.
    """
    gradients = list(_gradients(one, other, near, names))
    if gradients:
        return gradients
    found = list(_evaluated(one, other, near, names)) if other.evaluated else []
    if found or not other.losses:
        return found
    if found := list(_states(one, other, names)):
        return found
    return [*_rule(one, other, names, rule, start), *_later(one, other, near, names)]


def _gradients(one: Measured, other: Measured, near: Sensitivity, names: tuple[str, str]) -> Iterator[Finding]:
    for point, gradients in one.gradients.items():
        a, b = one.loss[point], other.loss[point]
        bad = []
        floor = LEAST * max((largest(g) for g in gradients.values()), default=0.0)
        for name, gradient in gradients.items():
            there = other.gradients[point].get(name)
            if there is None or there.shape != gradient.shape:
                bad.append((np.inf, name, gradient, np.zeros_like(gradient)))
                continue
            allowed = GRADIENT * largest(gradient) + SENSITIVITY * near.gradients[point].get(name, 0.0) + floor
            error = largest(gradient.astype(np.float64) - there)
            if not error <= allowed:
                bad.append((error / max(allowed, 1e-300), name, gradient, there))
        same_loss = abs(a - b) <= LOSS * abs(a) + SENSITIVITY * near.loss[point]
        if same_loss and not bad:
            continue
        bad.sort(key=lambda row: -row[0])
        where = "the parameters of a fresh run" if point == "initial" else "parameters that are moved off their start"
        if not same_loss:
            yield Finding(
                what="the loss of the first step",
                said=f"expected the same number, got {a:.8g} with {names[0]} and {b:.8g} with {names[1]}, at {where}",
                do="An operation, or a value that the model takes from the batch or the device, is not the same there.",
            )
        elif bad:
            more = f" and {len(bad) - MANY} more" if len(bad) > MANY else ""
            _, name, mine, theirs = bad[0]
            at = np.unravel_index(int(np.argmax(np.abs(mine.astype(np.float64) - theirs))), mine.shape)
            yield Finding(
                what=f"the gradient of {', '.join(row[1] for row in bad[:MANY])}{more}",
                said=f"expected the same gradients, got {mine[at]:.7g} with {names[0]} and {theirs[at]:.7g} with "
                f"{names[1]} in {name}{[int(i) for i in at]}, at {where}, with equal losses",
                do="An operation on the way to it has another derivative there, at a kink, a tie or a zero.",
            )
        return


def _evaluated(one: Measured, other: Measured, near: Sensitivity, names: tuple[str, str]) -> Iterator[Finding]:
    for key in sorted(one.evaluated.keys() | other.evaluated.keys()):
        a, b = one.evaluated.get(key), other.evaluated.get(key)
        if not _close(a, b, LOSS, SENSITIVITY * near.evaluated.get(key, 0.0)):
            yield Finding(
                what=f"evaluation, {key}",
                said=f"expected the same values without training, got {_shown(a)} with {names[0]} and {_shown(b)} with "
                f"{names[1]}",
                do="Look at what the model does if ops.training is False.",
            )
    a, b = one.predicted, other.predicted
    if a is not None and b is not None and not _close(a, b, 10 * LOSS):
        yield Finding(
            what="predict",
            said=f"expected the same values, got {_shown(a)} with {names[0]} and {_shown(b)} with {names[1]}",
            do="Look at what the model's predict does that __call__ does not.",
        )


def _states(one: Measured, other: Measured, names: tuple[str, str]) -> Iterator[Finding]:
    for name in sorted(one.after):
        a, b = one.after[name], other.after.get(name)
        if name.startswith("state/") and not _close(a, b, LOSS):
            yield Finding(
                what=f"State {name.removeprefix('state/')}",
                said=f"expected the same values after a step, got {_shown(a)} with {names[0]} and {_shown(b)} with "
                f"{names[1]}",
                do="ops.tally takes sums over the samples, by ops.sum with over=('batch', ...), and no means: it is "
                "called for every microbatch. after_step computes from States alone.",
            )


def _rule(
    one: Measured, other: Measured, names: tuple[str, str], rule: str, start: Mapping[str, np.ndarray]
) -> Iterator[Finding]:
    gradients = one.gradients[list(one.gradients)[-1]]
    floor = 10 * LEAST * max((largest(g) for g in gradients.values()), default=0.0)
    bad = []
    for name, gradient in gradients.items():
        a, b = (m.after.get(f"params/{name}") for m in (one, other))
        if a is None or b is None or largest(gradient) <= floor:
            continue
        moved = a.astype(np.float64) - start[name]
        apart = float(np.linalg.norm(a.astype(np.float64) - b))
        if not apart <= UPDATE * float(np.linalg.norm(moved)) + 1e-6 * float(np.linalg.norm(start[name])):
            bad.append(name)
    if bad:
        more = f" and {len(bad) - MANY} more" if len(bad) > MANY else ""
        yield Finding(
            what=f"rule {rule}",
            said=f"expected the same update from the same gradients, got others with {names[0]} and {names[1]} for "
            f"{', '.join(bad[:MANY])}{more}",
            do="A rule computes with xp and its arguments alone, and takes shapes from info: an array may be a part.",
        )


def _later(one: Measured, other: Measured, near: Sensitivity, names: tuple[str, str]) -> Iterator[Finding]:
    for step, (a, b) in enumerate(zip(one.losses[1:], other.losses[1:], strict=True), start=2):
        if not abs(a - b) <= LATER * abs(a) + SENSITIVITY * max(near.loss.values()):
            yield Finding(
                what=f"the loss of step {step}",
                said=f"expected the same number after the same first step, got {a:.8g} with {names[0]} and {b:.8g} "
                f"with {names[1]}",
                do="Something is kept from step to step that is no parameter, State or slot, or a Python number "
                "changes from step to step: ops.step is an array.",
            )
            return


def _close(a: np.ndarray | None, b: np.ndarray | None, bound: float, moved: float = 0.0) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    return largest(a.astype(np.float64) - b) <= bound * max(largest(a), 1e-30) + moved or np.array_equal(
        a, b, equal_nan=True
    )


def _shown(array: np.ndarray | None) -> str:
    if array is None:
        return "nothing"
    values = ", ".join(f"{value:.6g}" for value in array.ravel()[:4].tolist())
    return f"[{values}{', ...' if array.size > 4 else ''}]"


def unreached(measured: Measured) -> list[str]:
    """Return the parameters of which every element of the gradient is zero, at every point."""
    points = list(measured.gradients.values())
    return [name for name in points[0] if not any(largest(point[name]) for point in points)]


def same_state(saved: Arrays, back: Arrays, names: tuple[str, str]) -> Iterator[Finding]:
    """Compare a restored state with the saved one, bit for bit."""
    for name in sorted(saved.keys() | back.keys()):
        a, b = saved.get(name), back.get(name)
        if a is None or b is None or not np.array_equal(a, b, equal_nan=True):
            yield Finding(
                what=name,
                said=f"expected the saved values, bit for bit, got others: {_shown(a)} by {names[0]}, {_shown(b)} by "
                f"{names[1]}",
                do="Please report this: no model can cause it by ordinary means.",
            )
            return
