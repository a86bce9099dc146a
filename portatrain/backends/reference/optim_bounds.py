"""Bounds for the difference between two float32 evaluations of one optimizer step, derived from rounding errors.

The two evaluations start from the same float32 inputs. They may order sums, fuse multiply-adds and share subexpressions
in any way. u = 2**-24 is the unit roundoff of float32. docs/understand/optimizers.md derives them, to first order
in u:

* AdamW, Lion, SGD: 4 ulp of the largest operand, for each element. An ulp of x is 2**-23 |x|; the terms of a sum and
  the sum itself are operands.
* Adafactor: the relative errors of all operations are added, and doubled for two evaluations. All sums have positive
  terms, so a sum of n terms adds at most n - 1 errors.
* Muon: the rounding errors of each Newton-Schulz step are multiplied by the exact derivative of the later steps, which
  is diagonal in the singular vectors. The bound is for the Frobenius norm of a slice's difference, at 4 standard
  deviations if rounding errors are independent. A bound for the worst case is so loose that wrong rules would pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portatrain.backends.reference import optim as reference
from portatrain.optim import SGD, Adafactor, AdamW, Info, Lion, Muon, Rule, lr_factor

Float = NDArray[np.float64]

U = 2.0**-24
ULP = 2.0**-23  # relative to the number
SIGMAS = 4.0  # standard deviations allowed for the random part of Muon's error
POW = 8.0  # error of a power, in u: 4 ulp, which libm, XLA and SLEEF do not exceed


def allowed(
    rule: Rule,
    info: Info,
    *,
    param: Float,
    grad: Float,
    slots: Mapping[str, Float],
    scale: float,
    count: int,
    decay: bool,
) -> tuple[Float, dict[str, Float]]:
    """Return the largest difference allowed in each element of the new parameter, and of the new slots.

    The arguments are those of ``reference.step``, with values that float32 can represent. For a parameter under Muon,
    each slice has one number, a bound for the Frobenius norm of the slice's difference and so for each element.
    """
    bounds = np.zeros(info.shape), {name: np.zeros(np.shape(value)) for name, value in slots.items()}
    acting = rule.rule_for(info)
    factor = lr_factor(info)
    lr = acting.lr * scale * factor
    wd = acting.weight_decay / factor if decay else 0.0
    for index in np.ndindex(*info.shape[: info.batch_dims]):
        p, g = (np.asarray(x, np.float64)[index] for x in (param, grad))
        s = {name: np.asarray(value, np.float64)[index] for name, value in slots.items()}
        if isinstance(acting, Adafactor):
            step, b = _adafactor(acting, info, p, g, s, count)
        elif isinstance(acting, Muon):
            step, b = _muon(acting, info, p, g, s)
        else:
            operand, operands = _operands(acting, g, s, count)
            largest = np.maximum(np.abs(p), lr * np.maximum(operand, wd * np.abs(p)))
            step, b = None, {name: 4 * ULP * value for name, value in operands.items()}
            bounds[0][index] = 4 * ULP * largest
        if step is not None:
            direction, error = step
            # The 5 errors: lr as float32, lr * scale, the product, two sums. Decay adds 2: wd as float32, a product.
            rounding = U * (lr * (5 * np.abs(direction) + 7 * wd * np.abs(p)) + np.abs(p))
            if isinstance(acting, Muon):
                rounding = np.asarray(np.linalg.norm(rounding))
            bounds[0][index] = 2 * (lr * error + rounding)
        for name, value in b.items():
            bounds[1][name][index] = value
    return bounds


def ratio(
    rule: Rule,
    info: Info,
    first: tuple[Float, Mapping[str, Float]],
    second: tuple[Float, Mapping[str, Float]],
    **start: Any,
) -> float:
    """Return the largest difference between two results, each (new parameter, new slots), relative to the bound.

    The results agree if it is at most 1. ``start`` are the keyword arguments of ``allowed``.
    """
    bound, slot_bounds = allowed(rule, info, **start)
    difference = np.abs(np.asarray(first[0], np.float64) - second[0])
    if isinstance(rule.rule_for(info), Muon):
        axes = tuple(range(info.batch_dims, len(info.shape)))
        difference = np.sqrt(np.sum(difference**2, axis=axes, keepdims=True)) + np.zeros(info.shape)
    pairs = [(difference, bound)]
    pairs += [(np.abs(np.asarray(first[1][k], np.float64) - second[1][k]), slot_bounds[k]) for k in slot_bounds]
    smallest = float(np.finfo(np.float32).tiny)
    return max(float(np.max(x / np.maximum(most, smallest))) for x, most in pairs)


def _operands(rule: Rule, g: Float, s: Mapping[str, Float], t: int) -> tuple[Float, dict[str, Float]]:
    """Return the largest operand in computing step / lr, and in computing each slot, of an elementwise rule."""

    def largest(*terms: Float) -> Float:  # of the terms of a sum and the sum itself, the next operand
        return np.maximum(np.max(np.abs(terms), axis=0), np.abs(np.sum(terms, axis=0)))

    if isinstance(rule, AdamW):
        m = largest(rule.b1 * s["m"], (1 - rule.b1) * g)
        v = rule.b2 * s["v"] + (1 - rule.b2) * g**2
        return m / (1 - rule.b1**t) / (np.sqrt(v / (1 - rule.b2**t)) + rule.eps), {"m": m, "v": v}
    if isinstance(rule, Lion):
        return np.ones_like(g), {"m": largest(rule.b2 * s["m"], (1 - rule.b2) * g)}
    if isinstance(rule, SGD):
        if not rule.momentum:
            return np.abs(g), {}
        m = largest(rule.momentum * s["m"], g)
        ahead = largest(g, rule.momentum * (rule.momentum * s["m"] + g)) if rule.nesterov else m
        return np.maximum(m, ahead), {"m": m}
    raise TypeError(f"no bound is derived for {type(rule).__name__}")


def _adafactor(
    rule: Adafactor, info: Info, p: Float, g: Float, s: Mapping[str, Float], t: int
) -> tuple[tuple[Float, Float], dict[str, Float]]:
    """Return ((direction, its error), bounds of the slots) of one slice. Names e_* count errors of size u."""

    def mean(n: int) -> float:  # n - 1 sums, and a division or a product with a rounded 1/n
        return n + 1.0

    new = float(t) ** -rule.decay_rate
    e_new = POW + rule.decay_rate * math.log(t) if t > 1 else 0.0  # the exponent is rounded too
    e_old = 1.0 + e_new * new / (1 - new) if t > 1 else 0.0
    e_square = 2.0

    def average(e_mean: float) -> float:  # old * slot + new * mean, all of it positive
        return max(e_old + 1, e_new + e_square + e_mean + 1) + 1

    exact = Adafactor(
        lr=1.0, decay_rate=rule.decay_rate, clip=rule.clip, eps1=rule.eps1, eps2=rule.eps2, relative=rule.relative
    )
    slice_info = _slice(info)
    after, new_slots = reference.step(exact, slice_info, param=p, grad=g, slots=s, scale=1.0, count=t, decay=False)
    direction = p - after
    if "v" in s:
        e_slots = {"v": average(0.0)}
        e_u = 0.5 * e_slots["v"] + 2  # a root, a division
    else:
        n_in, n_out = new_slots["v_row"].size, new_slots["v_col"].size
        e_slots = {"v_row": average(mean(n_out)), "v_col": average(mean(n_in))}
        e_row_factor = 0.5 * (2 * e_slots["v_row"] + mean(n_in)) + 3
        e_col_factor = 0.5 * e_slots["v_col"] + 2
        e_u = e_row_factor + e_col_factor + 2
    e_rms = 0.5 * mean(g.size) + 1.5  # for exact numbers; squaring doubles an error, the root halves it
    e_direction = e_u + (e_u + e_rms + 1) + 1
    if rule.relative:
        e_direction += e_rms + 1
    differences = {name: 2 * e * U * np.abs(new_slots[name]) for name, e in e_slots.items()}
    return (direction, e_direction * U * np.abs(direction)), differences


def _muon(
    rule: Muon, info: Info, p: Float, g: Float, s: Mapping[str, Float]
) -> tuple[tuple[Float, Float], dict[str, Float]]:
    """Return ((direction, Frobenius norm of its error), bound of the slot) of one slice."""
    mu = rule.momentum
    size_m = mu * np.abs(s["m"]) + (1 - mu) * np.abs(g)
    size_n = (1 - mu) * np.abs(g) + mu * size_m if rule.nesterov else size_m
    m = mu * s["m"] + (1 - mu) * g
    n = (1 - mu) * g + mu * m if rule.nesterov else m
    matrix = n.reshape(math.prod(g.shape[: info.fan_in_axes]), -1)
    factor = math.sqrt(max(1.0, matrix.shape[1] / matrix.shape[0]))
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    short, long = matrix.shape
    norm = max(float(np.linalg.norm(matrix)), rule.eps)
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    x = np.asarray(sigma / norm, np.float64)

    iterates, rounding = [x], []
    for quintic in rule.coefficients:
        rounding.append(_newton_schulz_rounding((left * x) @ right, x, quintic))
        a, b, c = quintic
        x = a * x + b * x**3 + c * x**5
        iterates.append(x)

    # From the last step to the first: the factors by which later steps multiply the errors of each step. In the bases
    # of the singular vectors, entry (i, j) of a perturbation is multiplied by divided differences of the quintic: at
    # s_i and s_j for the symmetric half, at s_i and -s_j for the antisymmetric half, at s_i and 0 beyond the square.
    gain = np.ones((short, 2 * short + 1))
    random, steady = 0.0, 2 * U * float(np.linalg.norm(x))  # reshape factor as float32, times lr
    for k in reversed(range(len(rule.coefficients))):
        most = float(gain.max())
        mean_square = (0.5 * np.sum(gain[:, :-1] ** 2) + (long - short) * np.sum(gain[:, -1] ** 2)) / (short * long)
        random = math.hypot(random, math.sqrt(mean_square) * rounding[k][0])
        steady += most * rounding[k][1]
        a, b, c = rule.coefficients[k]
        i, j = iterates[k][:, None], np.concatenate([iterates[k], -iterates[k], [0.0]])[None, :]
        gain = gain * np.abs(a + b * (i**2 + i * j + j**2) + c * (i**4 + i**3 * j + i**2 * j**2 + i * j**3 + j**4))
    # n: constants as float32, products and sums, 3 errors for m and 3 more. An error in its norm scales all elements.
    steady += float(gain.max()) * 6 * U * float(np.linalg.norm(size_n)) / norm
    along = float(np.linalg.norm(np.diagonal(gain) * iterates[0]))
    steady += (SIGMAS * 0.5 * math.sqrt(g.size) + 2) * U * along

    after, _ = reference.step(
        Muon(lr=1.0, momentum=mu, nesterov=rule.nesterov, coefficients=rule.coefficients, eps=rule.eps),
        _slice(info),
        param=p,
        grad=g,
        slots=s,
        scale=1.0,
        count=1,
        decay=False,
    )
    return (p - after, np.asarray(factor * (SIGMAS * random + steady))), {"m": 2 * 3 * U * size_m}


def _newton_schulz_rounding(x: Float, sigma: Float, quintic: tuple[float, float, float]) -> tuple[float, float]:
    """Return the Frobenius norms of the rounding errors in a X + (b G + c G G) X, G = X X^T: (random, systematic part).

    Random part: an element of A B with inner length k has a standard deviation of at most sqrt(k) u (|A| |B|) (Higham &
    Mary 2019). Systematic part: a, b, c as float32, and elementwise products and sums, 3 errors each.
    """
    a, b, c = quintic
    short, long = x.shape
    gram = x @ x.T
    gram2 = gram @ gram
    poly = b * gram + c * gram2
    spectral = float(np.max(sigma))

    def product(left: Float, right: Float, inner: int) -> float:
        return math.sqrt(inner) * float(np.linalg.norm(np.abs(left) @ np.abs(right)))

    of_poly = math.hypot(
        (abs(b) + 2 * abs(c) * spectral**2) * product(x, x.T, long), abs(c) * product(gram, gram, short)
    )
    random = math.hypot(spectral * of_poly, product(poly, x, short))
    steady = 3 * spectral * float(np.linalg.norm(np.abs(b * gram) + np.abs(c * gram2)))
    steady += 3 * abs(a) * float(np.linalg.norm(x)) + float(np.linalg.norm(poly @ x))
    return U * random, U * steady


class _Slice:
    """The `Info` of one slice of the batch axes of a tensor."""

    def __init__(self, info: Info) -> None:
        self.name, self.batch_dims, self.fan_in_axes = info.name, 0, info.fan_in_axes
        self.shape, self.axes = info.shape[info.batch_dims :], info.axes[info.batch_dims :]


def _slice(info: Info) -> Info:
    return _Slice(info)
