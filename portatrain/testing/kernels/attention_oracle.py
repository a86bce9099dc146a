"""The exact values, gradients and bounds of attention, in float64. Legend as in `portatrain.model.ops`.

Scores, weights and their errors exist as (B, H, S, T), for each head of the queries. `s` is a standard deviation in
the sense of `bounds.py`: s_p that of p.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from portatrain.model.attention_rules import slopes_of
from portatrain.testing.kernels.bounds import Array, Due, Operands, due, narrow, wide


def visible(s: int, t: int, indices: Operands, options: Operands) -> tuple[Array, Array]:
    """Return (B or 1, S, T): whether a query sees a key, and how many positions it is behind it."""
    at_q, at_k = indices.get("positions") or (np.arange(s), np.arange(t))
    behind = at_q[..., :, None].astype(np.int64) - at_k[..., None, :].astype(np.int64)
    behind = behind if behind.ndim == 3 else behind[None]
    seen = behind >= 0 if options.get("causal", True) else np.ones_like(behind, bool)
    if (window := options.get("window")) is not None:
        seen = seen & (np.abs(behind) < window)
    if (prefix := indices.get("prefix")) is not None:
        seen = seen | (prefix != 0)[:, None, :]
    if (segments := indices.get("segment_ids")) is not None:
        of_q, of_k = segments if isinstance(segments, tuple) else (segments, segments)
        seen = seen & (of_q[:, :, None] == of_k[:, None, :])
    return seen, behind


def attention(operands: Operands, indices: Operands, options: Operands, dtype: str) -> list[Due]:
    """Return what is due: the result, and the gradients of q, k, v and, if there are any, sinks."""
    q, k, v, g = (np.swapaxes(operands[name], 1, 2) for name in "qkvg")  # (B, H, S, D) and (B, K, T, D)
    (h, s, d), (kv_heads, t) = q.shape[1:], k.shape[1:3]
    k, v = (np.repeat(x, h // kv_heads, axis=1) for x in (k, v))
    scale = options.get("scale") or d**-0.5
    seen, behind = visible(s, t, indices, options)
    seen, behind = seen[:, None], behind[:, None]  # of all heads
    longest = int(seen.sum(-1).max(initial=0))
    e_t, e_v, e_d = narrow(dtype, longest), narrow(dtype, v.shape[-1]), narrow(dtype, d)
    # Scores. Operands multiplied by a scale that is no power of two may be rounded to the dtype again.
    e_qk = wide(d) if math.frexp(scale)[0] == 0.5 else e_d
    kT = np.swapaxes(k, -1, -2)
    raw, size = scale * (q @ kT), scale * (np.abs(q) @ np.abs(kT))
    s_score, slope, s_slope = e_qk * size, 1.0, 0.0
    if (cap := options.get("softcap")) is not None:
        bent = np.tanh(raw / cap)
        raw, slope = cap * bent, 1 - bent**2
        s_slope = 2 / cap * np.abs(bent) * slope * s_score + wide(0)
        s_score = slope * s_score + wide(0) * np.abs(raw)
        size = np.abs(raw)
    if (slopes := slopes_of(options.get("alibi", False), h)) is not None:
        bias = np.abs(behind) * np.asarray(slopes)[:, None, None]
        raw, size = raw - bias, size + bias
    score = np.where(seen, raw, -np.inf)
    sink = np.full((h, 1, 1), -np.inf) if (sinks := operands.get("sinks")) is None else sinks[:, None, None]
    top = np.maximum(score.max(-1, keepdims=True, initial=-np.inf), sink)
    top = np.where(np.isfinite(top), top, 0.0)
    s_score = s_score + wide(0) * (size + np.abs(top))  # the bias, and the distance from the largest score
    s_score = np.where(seen, s_score, 0.0)
    # Weights. s_r is relative to p; the exponential and the sum of a row are in float32.
    p = np.exp(score - top)
    beside = np.exp(sink - top)
    total = p.sum(-1, keepdims=True) + beside
    total = np.where(total == 0, 1.0, total)
    p, p_sink = p / total, beside / total
    s_sink = wide(0) * (np.abs(sink) + np.abs(top)) if sinks is not None else 0.0
    own = (p * s_score) ** 2
    row = own.sum(-1, keepdims=True) + (p_sink * s_sink) ** 2
    s_r = np.sqrt(np.maximum(row - own, 0.0) + ((1 - p) * s_score) ** 2) + wide(longest)
    out = p @ v
    s_out = (p * (s_r + e_t)) @ np.abs(v)
    # The backward pass. G = 1: the gradients of a kv head are summed over its queries' heads at the end.
    pT = np.swapaxes(p, -1, -2)
    dv, s_dv = pT @ g, np.swapaxes(p * (s_r + e_t), -1, -2) @ np.abs(g)
    vT = np.swapaxes(v, -1, -2)
    dp, dp_size = g @ vT, np.abs(g) @ np.abs(vT)
    delta, delta_size = (p * dp).sum(-1, keepdims=True), (p * dp_size).sum(-1, keepdims=True)
    s_delta = (p * (s_r * np.abs(dp) + e_v * dp_size)).sum(-1, keepdims=True) + e_t * delta_size
    ds = p * (dp - delta)
    s_ds = p * (s_r * np.abs(dp - delta) + e_v * dp_size + s_delta)
    s_ds = slope * s_ds + s_slope * np.abs(ds)
    ds, s_ds = scale * slope * ds, scale * s_ds
    dq, s_dq = ds @ k, (s_ds + e_t * np.abs(ds)) @ np.abs(k)
    dk, s_dk = np.swapaxes(ds, -1, -2) @ q, np.swapaxes(s_ds + e_t * np.abs(ds), -1, -2) @ np.abs(q)
    # The gradients of a kv head are sums over the queries that see a key, and over G heads, each rounded to the dtype.
    e_s = narrow(dtype, int(seen.sum(-2).max(initial=0)) * (h // kv_heads))
    s_dk = s_dk + e_s * (np.swapaxes(np.abs(ds), -1, -2) @ np.abs(q))
    s_dv = s_dv + e_s * (pT @ np.abs(g))

    def back(x: Array) -> Array:
        return np.swapaxes(x, 1, 2)

    def of_kv(x: Array) -> Array:
        return back(x.reshape(len(x), kv_heads, h // kv_heads, *x.shape[2:]).sum(2))

    # A sink has no value, so its score's gradient is -p_sink delta in each row that sees a key.
    s_r_sink = np.sqrt(row + s_sink**2) + wide(longest)
    dsinks = (-p_sink * delta).sum((0, 2, 3))
    e_sinks = narrow(dtype, delta.shape[0] * s)
    s_dsinks = (p_sink * ((s_r_sink + e_sinks) * np.abs(delta) + s_delta)).sum((0, 2, 3))
    largest = math.prod(max(1.0, float(np.abs(x).max(initial=0.0))) for x in (g, v)) * max(1.0, abs(scale))
    of_q, of_k = (largest * max(1.0, float(np.abs(x).max(initial=0.0))) for x in (k, q))
    heads = h // kv_heads

    def said(operand: str, value: Any, deviation: Any, terms: int, size: float) -> Due:
        return due(operand, value, deviation, dtype, terms, size)

    found = [
        said("result", back(out), back(s_out), t, float(np.abs(v).max(initial=0.0))),
        said("gradient of q", back(dq), back(s_dq), t * v.shape[-1], of_q),
        said("gradient of k", of_kv(dk), of_kv(s_dk), s * heads * v.shape[-1], of_k),
        said("gradient of v", of_kv(dv), of_kv(s_dv), s * heads, float(np.abs(g).max(initial=0.0))),
    ]
    if sinks is not None:
        found.append(said("gradient of sinks", dsinks, s_dsinks, len(q) * s * t * v.shape[-1], largest))
    return found
