"""The oracle of the optimizer rules: the papers' equations in NumPy float64, one slice at a time.

It shares only the rules' fields with portatrain.optim, so that each can reveal the other's mistakes. It loops over
layers and experts, computes powers instead of expm1, and forms each matrix and its second moment completely. It is slow
and meant to be read beside the papers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from portatrain.optim import SGD, Adafactor, AdamW, Info, Lion, Muon, Rule

Float = NDArray[np.float64]
State = dict[str, Float]


def init(rule: Rule, info: Info) -> State:
    """Return the initial slots of ``rule`` for a tensor: zeros, float64."""
    shape, batch = info.shape, info.batch_dims
    inner = shape[batch:]
    if isinstance(rule, Adafactor):
        rows = info.fan_in_axes if info.fan_in_axes > 0 else 1
        if math.prod(inner[:rows]) > 1 and math.prod(inner[rows:]) > 1:
            row, col = shape[: batch + rows], shape[:batch] + inner[rows:]
            return {"v_row": np.zeros(row), "v_col": np.zeros(col)}
        return {"v": np.zeros(shape)}
    if isinstance(rule, SGD):
        return {"m": np.zeros(shape)} if rule.momentum > 0 else {}
    if isinstance(rule, AdamW) or (isinstance(rule, Muon) and not _muon_takes(info)):
        return {"m": np.zeros(shape), "v": np.zeros(shape)}
    if isinstance(rule, Lion | Muon):
        return {"m": np.zeros(shape)}
    raise TypeError(f"the reference has no equations for {type(rule).__name__}")


def step(
    rule: Rule,
    info: Info,
    *,
    param: Float,
    grad: Float,
    slots: Mapping[str, Float],
    scale: float,
    count: int,
    decay: bool,
) -> tuple[Float, State]:
    """Return the new parameter and the new slots, float64, after step ``count``, counted from 1.

    The arguments are those of ``Rule.update``. Each slice of the batch axes is computed on its own.
    """
    new_param = np.array(param, np.float64)
    new_slots = {name: np.array(value, np.float64) for name, value in slots.items()}
    for index in np.ndindex(*info.shape[: info.batch_dims]):
        p, g = new_param[index], np.asarray(grad, np.float64)[index]
        s = {name: value[index] for name, value in new_slots.items()}
        acting = rule.adamw if isinstance(rule, Muon) and not _muon_takes(info) else rule
        base = acting.lr * float(scale)
        eta = base * getattr(info, "lr", 1.0)
        if isinstance(acting, AdamW):
            out, s = _adamw(acting, p, g, s, eta, count)
        elif isinstance(acting, Lion):
            out, s = _lion(acting, p, g, s, eta)
        elif isinstance(acting, SGD):
            out, s = _sgd(acting, p, g, s, eta)
        elif isinstance(acting, Adafactor):
            out, s = _adafactor(acting, p, g, s, eta, count, info.fan_in_axes)
        elif isinstance(acting, Muon):
            out, s = _muon(acting, p, g, s, eta, info.fan_in_axes)
        else:
            raise TypeError(f"the reference has no equations for {type(acting).__name__}")
        # Decoupled decay uses the old parameter, changes neither gradient nor slots, and is alike for all tensors.
        new_param[index] = out - (base * acting.weight_decay * p if decay else 0.0)
        for name, value in s.items():
            new_slots[name][index] = value
    return new_param, new_slots


def global_norm(grads: Mapping[str, Float]) -> float:
    """Return sqrt(sum of g^2 over all gradients), with a correctly rounded sum (math.fsum)."""
    return math.sqrt(math.fsum(float(x) ** 2 for name in sorted(grads) for x in np.ravel(grads[name])))


def _adamw(rule: AdamW, p: Float, g: Float, s: State, eta: float, t: int) -> tuple[Float, State]:
    """arXiv:1711.05101, algorithm 2, lines 6 to 12."""
    m = rule.b1 * s["m"] + (1 - rule.b1) * g
    v = rule.b2 * s["v"] + (1 - rule.b2) * g**2
    m_hat = m / (1 - rule.b1**t)
    v_hat = v / (1 - rule.b2**t)
    return p - eta * m_hat / (np.sqrt(v_hat) + rule.eps), {"m": m, "v": v}


def _lion(rule: Lion, p: Float, g: Float, s: State, eta: float) -> tuple[Float, State]:
    """arXiv:2302.06675, algorithm 2."""
    c = rule.b1 * s["m"] + (1 - rule.b1) * g
    return p - eta * np.sign(c), {"m": rule.b2 * s["m"] + (1 - rule.b2) * g}


def _sgd(rule: SGD, p: Float, g: Float, s: State, eta: float) -> tuple[Float, State]:
    """Sutskever et al. 2013, equations 1 to 4, with the velocity of opposite sign and without eta in it."""
    if not rule.momentum:
        return p - eta * g, {}
    velocity = rule.momentum * s["m"] + g
    ahead = g + rule.momentum * velocity if rule.nesterov else velocity
    return p - eta * ahead, {"m": velocity}


def _adafactor(rule: Adafactor, p: Float, g: Float, s: State, eta: float, t: int, inputs: int) -> tuple[Float, State]:
    """arXiv:1804.04235, algorithms 4 (matrices) and 5 (vectors), with the beta2 of section 7.2."""
    beta2 = 1 - float(t) ** -rule.decay_rate
    squares = g**2 + rule.eps1
    if "v" in s:
        v = beta2 * s["v"] + (1 - beta2) * squares
        out: State = {"v": v}
    else:
        rows = inputs if inputs > 0 else 1
        n, m = math.prod(g.shape[:rows]), math.prod(g.shape[rows:])
        table = squares.reshape(n, m)
        # The slots are means; R and C of the algorithm are sums, over m columns and over n rows.
        big_r = beta2 * (m * s["v_row"].reshape(n)) + (1 - beta2) * table.sum(axis=1)
        big_c = beta2 * (n * s["v_col"].reshape(m)) + (1 - beta2) * table.sum(axis=0)
        v = (np.outer(big_r, big_c) / big_r.sum()).reshape(g.shape)
        out = {"v_row": (big_r / m).reshape(g.shape[:rows]), "v_col": (big_c / n).reshape(g.shape[rows:])}
    u = g / np.sqrt(v)
    u = u / max(1.0, float(np.sqrt(np.mean(u**2))) / rule.clip)
    alpha = eta * max(rule.eps2, float(np.sqrt(np.mean(p**2)))) if rule.relative else eta
    return p - alpha * u, out


def _muon(rule: Muon, p: Float, g: Float, s: State, eta: float, inputs: int) -> tuple[Float, State]:
    """Jordan et al. 2024. The odd polynomial changes only the singular values, so it is applied to the SVD:
    X = U S V^T  ->  U f(S) V^T, f(x) = a x + b x^3 + c x^5."""

    m = rule.momentum * s["m"] + (1 - rule.momentum) * g
    n = (1 - rule.momentum) * g + rule.momentum * m if rule.nesterov else m
    d_in, d_out = math.prod(g.shape[:inputs]), math.prod(g.shape[inputs:])
    u, sigma, vt = np.linalg.svd(n.reshape(d_in, d_out), full_matrices=False)
    sigma = sigma / max(float(np.sqrt(np.sum(sigma**2))), rule.eps)
    for a, b, c in rule.coefficients:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    shape_factor = math.sqrt(max(1.0, d_out / d_in))
    return p - eta * shape_factor * ((u * sigma) @ vt).reshape(g.shape), {"m": m}


def _muon_takes(info: Info) -> bool:
    outputs = len(info.shape) - info.batch_dims - info.fan_in_axes
    return info.fan_in_axes > 0 and outputs > 0 and not any(axis == "vocab" for axis in info.axes)
