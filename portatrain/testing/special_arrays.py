"""The special points of `portatrain.model.ops_arrays`; `special_cases.py` has all of them together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.testing.special_case import EMPTY, INF, NAN, Special, f32, i32, one_or_more, points

Array = np.ndarray
Row = tuple[str, Callable[..., Any], Callable[[Array], Array], Callable[[Array], Array] | None]


def _between(x: Array) -> Array:
    return np.where((x >= -0.5) & (x <= 1.0), 1.0, 0.0)


def _sqrt_slope(x: Array) -> Array:
    return 0.5 / np.sqrt(x)


ARRAY_SLOPES: dict[str, Row] = {
    "abs": ("abs", lambda ops, x: ops.abs(x), np.sign, None),
    "sign": ("sign", lambda ops, x: ops.sign(x), np.zeros_like, None),
    "floor": ("floor", lambda ops, x: ops.floor(x), np.zeros_like, None),
    "sqrt": ("sqrt", lambda ops, x: ops.sqrt(x), _sqrt_slope, None),
    "rsqrt": ("rsqrt", lambda ops, x: ops.rsqrt(x), lambda x: -0.5 / np.sqrt(x) / x, None),
    "sin": ("sin", lambda ops, x: ops.sin(x), np.cos, one_or_more),
    "cos": ("cos", lambda ops, x: ops.cos(x), lambda x: -np.sin(x), one_or_more),
    "erf": ("erf", lambda ops, x: ops.erf(x), lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x), np.ones_like),
    "log1p": ("log1p", lambda ops, x: ops.log1p(x), lambda x: 1 / (1 + x), None),
    "expm1": ("expm1", lambda ops, x: ops.expm1(x), np.exp, np.ones_like),
    "softplus": ("softplus", lambda ops, x: ops.softplus(x), lambda x: np.exp(-np.logaddexp(0, -x)), one_or_more),
    "clip": ("clip", lambda ops, x: ops.clip(x, -0.5, 1.0), _between, None),
    "maximum": (
        "maximum",
        lambda ops, x: ops.maximum(x, 0.5),
        lambda x: np.where(x == 0.5, 0.5, np.where(x > 0.5, 1.0, 0.0)),
        None,
    ),
    "minimum": (
        "minimum",
        lambda ops, x: ops.minimum(x, 0.5),
        lambda x: np.where(x == 0.5, 0.5, np.where(x < 0.5, 1.0, 0.0)),
        None,
    ),
}
"""As `SLOPES` of special_cases.py."""

# Where a derivative is not defined, or depends on the sign of a zero, points are left out of it, not of the value.
NO_SLOPE = {
    "abs": lambda x: np.isnan(x),
    "sign": lambda x: np.isnan(x),
    "clip": lambda x: np.isnan(x),
    "maximum": lambda x: np.isnan(x),
    "minimum": lambda x: np.isnan(x),
    "rsqrt": lambda x: (x == 0) & np.signbit(x),  # infinite, of either sign
}


# ---- reductions

TIED = f32([[[1.0, 3.0, 3.0, 1.0], [0.0, -0.0, 0.0, -0.0], [2.0, 2.0, 2.0, 2.0], [-5.0, 1.0, INF, -INF]]])
DEAD = f32([[[-INF, -INF, -INF], [0.0, -INF, 0.0], [1e4, 1e4, -1e4], [30.0, 0.0, -0.0]]])
UNDEFINED = f32([[[NAN, 1.0, 2.0], [INF, 0.0, 1.0], [INF, -INF, 0.0]]])
FLAT = f32([[[2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1e-30, 1e-30, 1e-30], [1.0, 2.0, 4.0]]])


def _evenly(sign: float) -> Callable[[Array, Array], tuple[Array]]:
    def gradient(x: Array, g: Array) -> tuple[Array]:
        chosen = sign * x == (sign * x).max(-1, keepdims=True)
        return (chosen / chosen.sum(-1, keepdims=True) * g[..., None],)

    return gradient


def _softmax(x: Array) -> Array:
    top = x.max(-1, keepdims=True)
    e = np.exp(x - np.where(np.isinf(top), 0.0, top))
    total = e.sum(-1, keepdims=True)
    return e / np.where(total == 0, 1.0, total)


def _std_gradient(x: Array, g: Array) -> tuple[Array]:
    centred, std = x - x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    return (np.where(std == 0, 0.0, centred / np.where(std == 0, 1.0, std) / x.shape[-1]) * g[..., None],)


def _norm_gradient(x: Array, g: Array) -> tuple[Array]:
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    return (np.where(norm == 0, 0.0, x / np.where(norm == 0, 1.0, norm)) * g[..., None],)


def _reductions() -> list[Special]:
    no_rows = f32(np.zeros((2, 0, 3)))
    zero = f32([[[0.0, -0.0, 0.0], [3.0, 0.0, -4.0]]])
    made = [
        Special(method="max", what="ties", fn=lambda ops, x: ops.max(x), args=(TIED,), gradients=_evenly(1)),
        Special(method="min", what="ties", fn=lambda ops, x: ops.min(x), args=(TIED,), gradients=_evenly(-1)),
        Special(
            method="logsumexp",
            what="masked",
            fn=lambda ops, x: ops.logsumexp(x),
            args=(DEAD,),
            gradients=lambda x, g: (_softmax(x) * g[..., None],),
        ),
        Special(
            method="log_softmax",
            what="masked",
            fn=lambda ops, x: ops.log_softmax(x),
            args=(DEAD[:, 2:],),
            gradients=lambda x, g: (g - _softmax(x) * g.sum(-1, keepdims=True),),
            terms=lambda size: np.maximum(size.max(-1, keepdims=True), 1.0),
        ),
        Special(
            method="var",
            what="equal elements",
            fn=lambda ops, x: ops.var(x),
            args=(FLAT,),
            gradients=lambda x, g: (2 * (x - x.mean(-1, keepdims=True)) / x.shape[-1] * g[..., None],),
        ),
        Special(
            method="std", what="equal elements", fn=lambda ops, x: ops.std(x), args=(FLAT,), gradients=_std_gradient
        ),
        Special(
            method="norm", what="zero vectors", fn=lambda ops, x: ops.norm(x), args=(zero,), gradients=_norm_gradient
        ),
        Special(method="norm", what="of nothing", fn=lambda ops, x: ops.norm(x, axis=1), args=(no_rows,)),
        Special(method="cumsum", what="of nothing", fn=lambda ops, x: ops.cumsum(x, axis=1), args=(EMPTY,)),
        Special(
            method="cumsum",
            what="infinities",
            fn=lambda ops, x: ops.cumsum(x, axis=2),
            args=(UNDEFINED,),
            gradients=lambda x, g: (g[..., ::-1].cumsum(-1)[..., ::-1],),
        ),
        *(
            Special(method=n, what="ties", fn=lambda ops, x, n=n: getattr(ops, n)(x), args=(TIED,), gradients=None)
            for n in ("argmax", "argmin")
        ),
    ]
    for name in ("max", "min", "argmax", "argmin", "logsumexp", "log_softmax", "var", "std", "norm"):
        call = lambda ops, x, name=name: getattr(ops, name)(x)  # noqa: E731
        made.append(Special(method=name, what="NaN, infinities", fn=call, args=(UNDEFINED,), gradients=None))
        made.append(Special(method=name, what="no rows", fn=call, args=(no_rows,), gradients=None))
        made.append(Special(method=name, what="one element", fn=call, args=(f32([[[3.0], [0.0]]]),), gradients=None))
    return made


# ---- order, indices, shapes


def _order() -> list[Special]:
    made = []
    odd = f32([[[NAN, 1.0, INF, 1.0, -INF], [0.0, -0.0, 0.0, NAN, NAN]]])
    for down in (False, True):
        what = "descending" if down else "ascending"

        def gradient(x: Array, g: Array, down: bool = down) -> tuple[Array]:
            order = np.argsort(-x if down else x, -1, kind="stable")
            found = np.zeros_like(x)
            np.put_along_axis(found, order, g, -1)
            return (found,)

        sort = lambda ops, x, down=down: ops.sort(x, descending=down)  # noqa: E731
        argsort = lambda ops, x, down=down: ops.argsort(x, descending=down)  # noqa: E731
        made += [
            Special(method="sort", what=f"ties, {what}", fn=sort, args=(TIED,), gradients=gradient),
            Special(method="sort", what=f"NaN, {what}", fn=sort, args=(odd,), gradients=None),
            Special(method="argsort", what=f"ties, {what}", fn=argsort, args=(TIED,), gradients=None),
            Special(method="argsort", what=f"NaN and zeros, {what}", fn=argsort, args=(odd,), gradients=None),
            Special(method="sort", what=f"nothing, {what}", fn=sort, args=(f32(np.zeros((2, 3, 0))),)),
        ]
    outside = i32([[[-7], [0], [99], [2]]])
    return [
        *made,
        Special(
            method="take_along",
            what="indices outside",
            fn=lambda ops, x, i: ops.take_along(x, i, axis=1),
            args=(f32(np.arange(6).reshape(1, 3, 2)), outside),
        ),
        Special(
            method="take_along",
            what="no indices",
            fn=lambda ops, x, i: ops.take_along(x, i, axis=1),
            args=(f32(np.ones((2, 3, 2))), i32(np.zeros((2, 0, 1)))),
        ),
        Special(
            method="scatter_add",
            what="one place many times, and outside",
            fn=lambda ops, x, v, i: ops.scatter_add(x, i, v, axis=1),
            args=(f32(np.ones((1, 3, 2))), f32(np.arange(8).reshape(1, 4, 2)), outside),
        ),
        Special(
            method="scatter_add",
            what="nothing",
            fn=lambda ops, x, v, i: ops.scatter_add(x, i, v, axis=1),
            args=(f32(np.ones((2, 3, 2))), f32(np.zeros((2, 0, 2))), i32(np.zeros((2, 0, 1)))),
        ),
    ]


def _shapes() -> list[Special]:
    def one(method: str, fn: Callable[..., Any], x: Array = EMPTY, what: str = "nothing") -> Special:
        return Special(method=method, what=what, fn=fn, args=(x,), gradients="differences" if not x.size else None)

    ends = f32([[[INF, -INF, NAN, 0.0]]])
    return [
        one("transpose", lambda ops, x: ops.transpose(x, (0, 2, 1))),
        one("transpose", lambda ops, x: ops.transpose(x, (0, 2, 1)), ends, "infinities"),
        one("flip", lambda ops, x: ops.flip(x, axis=1)),
        one("flip", lambda ops, x: ops.flip(x, axis=2), ends, "infinities"),
        one("roll", lambda ops, x: ops.roll(x, 1, axis=1)),
        one("roll", lambda ops, x: ops.roll(x, 13, axis=2), ends, "farther than the axis is long"),
        one("pad", lambda ops, x: ops.pad(x, axis=1, before=1)),
        one("pad", lambda ops, x: ops.pad(x, axis=2, after=1, value=-INF), ends, "infinities"),
        one("join", lambda ops, x: ops.join([x, x], axis=1)),
        one("join", lambda ops, x: ops.join([x], axis=3), ends, "one array"),
        one("split", lambda ops, x: ops.split(x, 3)),
        one("split", lambda ops, x: ops.split(x, (0, 4)), ends, "a piece of nothing"),
    ]


# ---- images, scans, noise


def _max_pool_gradient(x: Array, g: Array) -> tuple[Array]:
    """Windows of 2 x 2 over (1, H, W, 1), their first largest element."""
    found = np.zeros_like(x)
    for i, j in np.ndindex(x.shape[1] // 2, x.shape[2] // 2):
        window = x[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 0]
        a, b = np.unravel_index(window.argmax(), window.shape)
        found[0, 2 * i + a, 2 * j + b, 0] += g[0, i, j, 0]
    return (found,)


def _images() -> list[Special]:
    tied = f32([[[1, 1, 0, 2], [1, 0, 2, 0], [5, 5, -1, -1], [5, 5, -1, -1]]])[..., None]
    none, kernel = f32(np.zeros((0, 4, 2))), f32(np.ones((3, 2, 3)))
    return [
        Special(
            method="pool",
            what="ties",
            fn=lambda ops, x: ops.pool(x, 2, kind="max"),
            args=(tied,),
            gradients=_max_pool_gradient,
        ),
        Special(
            method="pool",
            what="-infinity in padding and array",
            fn=lambda ops, x: ops.pool(x, 3, kind="max", stride=1, padding="same"),
            args=(f32([[-INF, -INF, -INF, 1.0]])[..., None],),
            gradients=None,
        ),
        Special(
            method="pool",
            what="mean of infinities",
            fn=lambda ops, x: ops.pool(x, 2, kind="mean"),
            args=(f32([[INF, 1.0, INF, -INF]])[..., None],),
            gradients=None,
        ),
        Special(method="conv", what="no samples", fn=lambda ops, x, k: ops.conv(x, k), args=(none, kernel)),
        Special(
            method="conv",
            what="zeros, shorter than the kernel",
            fn=lambda ops, x, k: ops.conv(x, k),
            args=(f32(np.zeros((1, 2, 2))), kernel),
        ),
        Special(
            method="resize",
            what="from one element",
            fn=lambda ops, x: ops.resize(x, 4, method="linear"),
            args=(f32([[[1.0, -2.0]]]),),
        ),
        Special(
            method="resize",
            what="to its own size",
            fn=lambda ops, x: ops.resize(x, 3, method="linear"),
            args=(f32([[[1.0], [0.0], [-2.0]]]),),
        ),
    ]


def _scans() -> list[Special]:
    add = lambda ops, x: ops.associative_scan(lambda a, b: a + b, x)  # noqa: E731
    ends = f32([[[INF], [1.0], [-INF], [NAN]]])
    return [
        Special(method="associative_scan", what="infinities", fn=add, args=(ends,), gradients=None),
        Special(method="associative_scan", what="no features", fn=add, args=(f32(np.zeros((2, 3, 0))),)),
        Special(
            method="scan",
            what="one position",
            fn=lambda ops, h, x: ops.scan(lambda h, x: (h + x, h * x), h, x),
            args=(f32([[1.0, 2.0]]), f32([[[3.0, 0.0]]])),
        ),
        Special(
            method="scan",
            what="no features",
            fn=lambda ops, h, x: ops.scan(lambda h, x: (h + x, h * x), h, x),
            args=(f32(np.zeros((2, 0))), f32(np.zeros((2, 3, 0)))),
        ),
        Special(
            method="noise",
            what="nothing",
            fn=lambda ops, x: ops.noise(0, 3, site=1) + x,
            args=(f32([0.0]),),
            context=Context(sample=np.arange(2), training=True),
        ),
        Special(
            method="noise",
            what="one a sample",
            fn=lambda ops, x: ops.noise(site=1, kind="uniform") + x,
            args=(f32([0.0]),),
            context=Context(sample=np.arange(2), training=True),
        ),
    ]


def array_specials() -> list[Special]:
    made = []
    for name, (method, fn, slope, terms) in ARRAY_SLOPES.items():
        at = points()
        undefined = NO_SLOPE.get(name)
        for what, x, smooth in (
            ("points", at if undefined is None else at[~undefined(at)], True),
            ("NaN", f32([NAN]), False),
        ):
            gradients = (lambda x, g, slope=slope: (g * slope(x),)) if smooth else None
            made.append(
                Special(
                    method=method,
                    what=f"{name} at {what}",
                    fn=fn,
                    args=(x,),
                    gradients=gradients,
                    terms=terms,
                    each=True,
                )
            )
        made.append(Special(method=method, what=f"{name} of nothing", fn=fn, args=(EMPTY,)))
    return [*made, *_reductions(), *_order(), *_shapes(), *_images(), *_scans()]
