"""The table of special points: every operation at its kinks, ties, infinities, zeros, tiny numbers and empty axes.

A test holds it to `Ops`: each public operation has cases here, or a reason in `WITHOUT`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.testing.special_arrays import ARRAY_SLOPES, array_specials
from portatrain.testing.special_case import EMPTY, INF, NAN, Special, elementwise, f32, i32, one_or_more, points
from portatrain.testing.special_losses import loss_specials

Array = np.ndarray

WITHOUT = {
    "name": "It is the identity.",
    "shard": "It is the identity.",
    "stack": "It runs a block; it computes nothing.",
    "across_samples": "It hands arrays to a function of the model; it computes nothing.",
    "experts": "It hands rows to a function of the model; sums of finite numbers have no kink.",
    "grouped_matmul": "It is a matmul; the kernel court tries its kernels on hard cases.",
    "grouped_bias": "It is an addition.",
    "aux": "It records a value and returns none.",
    "tally": "It records a value and returns none.",
    "update": "It belongs to after_step, which has no gradient.",
}
"""Operations without special points, with the reason."""


# ---- elementwise: the derivatives, with their conventions


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def _silu_slope(x: Array) -> Array:
    s = _sigmoid(x)
    return np.where(np.isinf(x), NAN, s * (1 + x * (1 - s)))


def _gelu_slope(x: Array) -> Array:
    cdf = 0.5 * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2))
    return np.where(np.isinf(x), NAN, cdf + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))


def _gelu_tanh_slope(x: Array) -> Array:
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
    return np.where(np.isinf(x), NAN, slope)


Row = tuple[str, Callable[..., Any], Callable[[Array], Array], Callable[[Array], Array] | None]

SLOPES: dict[str, Row] = {
    "silu": ("silu", lambda ops, x: ops.silu(x), _silu_slope, one_or_more),
    "gelu": ("gelu", lambda ops, x: ops.gelu(x), _gelu_slope, one_or_more),
    "gelu approximate": ("gelu", lambda ops, x: ops.gelu(x, approximate=True), _gelu_tanh_slope, one_or_more),
    "relu": ("relu", lambda ops, x: ops.relu(x), lambda x: np.where(x <= 0, 0.0, 1.0), None),
    "sigmoid": ("sigmoid", lambda ops, x: ops.sigmoid(x), lambda x: _sigmoid(x) * _sigmoid(-x), np.ones_like),
    "tanh": ("tanh", lambda ops, x: ops.tanh(x), lambda x: 1 / np.cosh(x) ** 2, np.ones_like),
    "exp": ("exp", lambda ops, x: ops.exp(x), np.exp, None),
    "log": ("log", lambda ops, x: ops.log(x), lambda x: 1 / x, None),
    "stop_gradient": ("stop_gradient", lambda ops, x: ops.stop_gradient(x), np.zeros_like, None),
    "weight": ("weight", lambda ops, x: ops.weight(x) * 1.0, np.ones_like, None),
    "cast": ("cast", lambda ops, x: ops.cast(x, "float32"), np.ones_like, None),
}
ALL_SLOPES = {**SLOPES, **ARRAY_SLOPES}
"""By name: the operation, a call of it, its derivative with its convention at kinks, and the size of the terms that
cancel in it."""


def _elementwise() -> list[Special]:
    made = []
    for name, (method, fn, slope, terms) in SLOPES.items():
        made.append(elementwise(method, f"{name} at points", fn, points(), slope, terms))
        made.append(Special(method=method, what=f"{name} of nothing", fn=fn, args=(EMPTY,)))
    return made


# ---- operations with parameters


def _with_parameters() -> list[Special]:
    zeros, scale = f32(np.zeros((2, 3))), f32([1.0, -2.0, 0.5])
    large, tiny = f32([[1e9, -1e9, 2e9]]), f32([[1e-30, -2e-30, 0.0]])
    return [
        Special(
            method="einsum",
            what="a contraction of nothing",
            fn=lambda ops, x, w: ops.einsum("bse,em->bsm", x, w),
            args=(f32(np.zeros((2, 3, 0))), f32(np.zeros((0, 4)))),
        ),
        Special(
            method="einsum",
            what="no positions",
            fn=lambda ops, x, w: ops.einsum("bse,em->bsm", x, w),
            args=(EMPTY, f32(np.ones((3, 4)))),
        ),
        Special(
            method="einsum",
            what="zeros",
            fn=lambda ops, x, w: ops.einsum("be,em->bm", x, w),
            args=(zeros, f32(np.zeros((3, 2)))),
        ),
        Special(
            method="embed",
            what="no ids",
            fn=lambda ops, t, i: ops.embed(t, i),
            args=(f32(np.ones((4, 3))), i32(np.zeros((2, 0)))),
        ),
        Special(
            method="embed",
            what="one id many times",
            fn=lambda ops, t, i: ops.embed(t, i),
            args=(f32(np.ones((4, 3))), i32([[3] * 7, [0] * 7])),
        ),
        Special(method="bias", what="no positions", fn=lambda ops, x, p: ops.bias(x, p), args=(EMPTY, scale)),
        Special(method="bias", what="zeros", fn=lambda ops, x, p: ops.bias(x, p), args=(zeros, f32(np.zeros(3)))),
        *(
            Special(method=name, what=what, fn=lambda ops, x, s, name=name: getattr(ops, name)(x, s), args=(x, scale))
            for name in ("rms_norm", "layer_norm")
            for what, x in (("zero vectors", zeros), ("equal elements", zeros + 2.0), ("no positions", EMPTY))
        ),
        *(
            Special(method=name, what=what, fn=lambda ops, x, name=name: getattr(ops, name)(x), args=(x,))
            for name in ("rms_norm", "layer_norm")
            for what, x in (("large", large), ("tiny", tiny))
        ),
    ]


# ---- positions and attention


def _positions() -> list[Special]:
    none = i32(np.zeros((2, 0)))
    return [
        Special(
            method="rope_table",
            what="position 0",
            fn=lambda ops, p: ops.rope_table(p, 4),
            args=(i32([0]),),
            gradients=None,
        ),
        Special(
            method="rope_table",
            what="no positions",
            fn=lambda ops, p: ops.rope_table(p, 4),
            args=(none,),
            gradients=None,
        ),
        Special(
            method="rope",
            what="no positions",
            fn=lambda ops, x, p: ops.rope(x, ops.rope_table(p, 4)),
            args=(f32(np.zeros((2, 0, 3, 4))), none),
        ),
        Special(
            method="rope",
            what="zero vectors",
            fn=lambda ops, x, p: ops.rope(x, ops.rope_table(p, 4)),
            args=(f32(np.zeros((1, 2, 1, 4))), i32([[0, 7]])),
        ),
    ]


def _attention() -> list[Special]:
    def qkv(s: int, t: int) -> tuple[Array, ...]:
        rng = np.random.default_rng(s + t)
        return tuple(f32(rng.normal(size=(1, n, 2, 2))) for n in (s, t, t))

    zeros = tuple(0 * x for x in qkv(3, 3))
    return [
        Special(
            method="attention",
            what="equal scores",
            fn=lambda ops, *qkv: ops.attention(*qkv),
            args=(*zeros[:2], qkv(3, 3)[2]),
        ),
        Special(method="attention", what="one position", fn=lambda ops, *qkv: ops.attention(*qkv), args=qkv(1, 1)),
        Special(method="attention", what="no positions", fn=lambda ops, *qkv: ops.attention(*qkv), args=qkv(0, 0)),
        Special(
            method="attention",
            what="no queries",
            fn=lambda ops, *qkv: ops.attention(*qkv, causal=False),
            args=qkv(0, 2),
        ),
        Special(
            method="attention",
            what="queries that see nothing",
            fn=lambda ops, q, k, v, p, t: ops.attention(q, k, v, positions=(p, t)),
            args=(*qkv(2, 2), i32([0, 5]), i32([3, 4])),
        ),
        Special(
            method="attention", what="large scores", fn=lambda ops, *qkv: ops.attention(*qkv, scale=1e4), args=qkv(3, 3)
        ),
    ]


# ---- shapes, choices, integers


def _dropout() -> list[Special]:
    context = Context(sample=np.arange(2), training=True)
    return [
        Special(
            method="dropout",
            what="nothing",
            fn=lambda ops, x: ops.dropout(x, 0.5, site=1),
            args=(EMPTY,),
            context=context,
        ),
        Special(
            method="dropout",
            what="infinities",
            fn=lambda ops, x: ops.dropout(x, 0.5, site=1),
            args=(f32([[INF, -INF, NAN, 0, 1e-40, INF]] * 2),),
            gradients=None,
            context=context,
        ),
    ]


TIES = f32([[1.0, 3.0, 3.0, 1.0], [0.0, -0.0, 0.0, -0.0], [INF, 1.0, INF, -INF], [2.0, 2.0, 2.0, 2.0]])
MASKED = f32([[0.0, -INF, 1.0], [-INF, -INF, 5.0], [1e4, -1e4, 1e4]])


def _softmax_gradient(x: Array, g: Array) -> tuple[Array]:
    e = np.exp(x - x.max(-1, keepdims=True))
    y = e / e.sum(-1, keepdims=True)
    return (y * (g - (y * g).sum(-1, keepdims=True)),)


def _top_k_gradient(x: Array, g: Array) -> tuple[Array]:
    found = np.zeros_like(x)
    np.put_along_axis(found, np.argsort(-x, axis=-1, kind="stable")[..., : g.shape[-1]], g, -1)
    return (found,)


def _choices() -> list[Special]:
    table = points()[None]
    chosen = np.tile(np.array([True, False]), table.size)[: table.size][None]
    return [
        Special(
            method="softmax",
            what="masked and tied",
            fn=lambda ops, x: ops.softmax(x),
            args=(MASKED,),
            gradients=_softmax_gradient,
        ),
        Special(
            method="softmax",
            what="infinities and NaN",
            fn=lambda ops, x: ops.softmax(x),
            args=(f32([[INF, 1.0, 0.0], [-INF, -INF, -INF], [NAN, 0.0, 1.0]]),),
            gradients=None,
        ),
        Special(method="softmax", what="one element", fn=lambda ops, x: ops.softmax(x), args=(f32([[3.0], [0.0]]),)),
        Special(method="softmax", what="no rows", fn=lambda ops, x: ops.softmax(x), args=(EMPTY,)),
        Special(method="softmax", what="an empty axis", fn=lambda ops, x: ops.softmax(x, axis=1), args=(EMPTY,)),
        Special(
            method="where",
            what="infinities in what is not chosen",
            fn=lambda ops, c, x, y: ops.where(c, x, y),
            args=(chosen, table, table[:, ::-1].copy()),
            gradients=lambda c, x, y, g: (np.where(c, g, 0.0), np.where(c, 0.0, g)),
        ),
        Special(
            method="where",
            what="nothing",
            fn=lambda ops, c, x: ops.where(c, x, 0.0),
            args=(np.zeros((2, 0, 3), bool), EMPTY),
        ),
        Special(
            method="concat",
            what="with nothing",
            fn=lambda ops, x, y: ops.concat([x, y], axis=1),
            args=(EMPTY, f32(np.ones((2, 1, 3)))),
        ),
        Special(
            method="top_k",
            what="ties and infinities",
            fn=lambda ops, x: ops.top_k(x, 3),
            args=(TIES,),
            gradients=_top_k_gradient,
        ),
        Special(
            method="top_k",
            what="NaN",
            fn=lambda ops, x: ops.top_k(x, 3)[1],
            args=(f32([[1.0, NAN, INF, -INF], [NAN, 2.0, NAN, 3.0]]),),
            gradients=None,
        ),
        Special(method="top_k", what="none of four", fn=lambda ops, x: ops.top_k(x, 0), args=(TIES,), gradients=None),
        Special(method="top_k", what="no rows", fn=lambda ops, x: ops.top_k(x, 2), args=(EMPTY,), gradients=None),
        Special(
            method="write",
            what="nothing",
            fn=lambda ops, cache, value, at: ops.write(cache, value, at),
            args=(f32(np.ones((2, 4, 3))), EMPTY, i32(2)),
        ),
    ]


def _integers() -> list[Special]:
    none = i32(np.zeros((2, 0)))
    return [
        Special(
            method="cast",
            what="floats to bool",
            fn=lambda ops, x: ops.cast(ops.cast(x, "bool"), "int32"),
            args=(f32([0.0, -0.0, 1e-30, -2.0, INF, NAN]),),
            gradients=None,
        ),
        Special(
            method="cast",
            what="floats to int32",
            fn=lambda ops, x: ops.cast(x, "int32"),
            args=(f32([0.0, -0.0, 0.9, -0.9, 1.5, -1.5, 2**24]),),
            gradients=None,
        ),
        Special(method="arange", what="nothing", fn=lambda ops, x: ops.arange(0), args=(f32([0]),), gradients=None),
        Special(method="one_hot", what="no ids", fn=lambda ops, i: ops.one_hot(i, 3), args=(none,), gradients=None),
        Special(
            method="one_hot",
            what="ids outside",
            fn=lambda ops, i: ops.one_hot(i, 3),
            args=(i32([[-1, 3, 2]]),),
            gradients=None,
        ),
    ]


# ---- reductions and losses


def _reductions() -> list[Special]:
    axes = ("batch", "seq", "embed")
    return [
        Special(
            method=name,
            what=what,
            fn=lambda ops, x, name=name: getattr(ops, name)(x, axes, over=("seq",)),
            args=(x,),
            gradients=None if what != "zeros" else "differences",
        )
        for name in ("sum", "mean")
        for what, x in (
            ("an empty axis", EMPTY),
            ("zeros", f32(np.zeros((2, 2, 3)))),
            ("infinities", f32([[[INF, INF, 1.0], [INF, -INF, NAN]]])),
        )
    ]


SPECIALS: tuple[Special, ...] = (
    *_elementwise(),
    *_with_parameters(),
    *_positions(),
    *_attention(),
    *_dropout(),
    *_choices(),
    *_integers(),
    *_reductions(),
    *loss_specials(),
    *array_specials(),
)
