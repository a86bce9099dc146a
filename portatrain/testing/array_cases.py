"""The cases of `portatrain.model.ops_arrays`, with random arguments; `cases.py` has all of them together.

Legend as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.testing.case import FP32, Args, Case, Rng, normal, with_ints

Fn = Callable[..., Any]


def _between(low: float, high: float) -> Callable[[Rng], Args]:
    return lambda rng: (rng.uniform(low, high, (3, 5)).astype(np.float32),)


def _apart(*shape: int) -> Callable[[Rng], Args]:
    """Numbers that are all different, so that no order hangs on a rounding."""
    return lambda rng: ((rng.permutation(int(np.prod(shape))).reshape(shape) / 8 - 2).astype(np.float32),)


def _elementwise() -> list[Case]:
    table: dict[str, tuple[Fn, Callable[[Rng], Args]]] = {
        "abs": (lambda ops, x: ops.abs(x), normal((3, 5))),
        "sign": (lambda ops, x: ops.sign(x) * x, normal((3, 5))),
        "floor": (lambda ops, x: ops.floor(x) * x, _between(1.2, 1.8)),
        "sqrt": (lambda ops, x: ops.sqrt(x), _between(0.5, 4)),
        "rsqrt": (lambda ops, x: ops.rsqrt(x), _between(0.5, 4)),
        "sin": (lambda ops, x: ops.sin(x), normal((3, 5))),
        "cos": (lambda ops, x: ops.cos(x), normal((3, 5))),
        "erf": (lambda ops, x: ops.erf(x), normal((3, 5))),
        "log1p": (lambda ops, x: ops.log1p(x), _between(-0.4, 4)),
        "expm1": (lambda ops, x: ops.expm1(x), normal((3, 5))),
        "softplus": (lambda ops, x: ops.softplus(x), normal((3, 5), scale=3.0)),
        "clip": (lambda ops, x: ops.clip(x, -0.5, 0.75), normal((3, 5))),
        "maximum": (lambda ops, x, y: ops.maximum(x, y), normal((3, 5), (5,))),
        "maximum with a number": (lambda ops, x: ops.maximum(x, 0.25), normal((3, 5))),
        "minimum": (lambda ops, x, y: ops.minimum(x, y), normal((3, 5), (3, 1))),
        "minimum with a number": (lambda ops, x: ops.minimum(x, 0.25), normal((3, 5))),
    }
    return [Case(name=name, fn=fn, args=args) for name, (fn, args) in table.items()]


def _reductions() -> list[Case]:
    names = ("max", "min", "logsumexp", "var", "std", "norm")
    cases = [
        Case(
            name=f"{name} over axis {axis}{', kept' if keep else ''}",
            fn=lambda ops, x, name=name, axis=axis, keep=keep: getattr(ops, name)(x, axis=axis, keepdims=keep),
            args=_apart(2, 3, 5) if name in ("max", "min") else normal((2, 3, 5)),
        )
        for name in names
        for axis, keep in ((-1, False), (1, True), ((1, 2), False))
    ]
    return [
        *cases,
        Case(name="log_softmax", fn=lambda ops, x: ops.log_softmax(x), args=normal((3, 5))),
        Case(name="log_softmax over axis 1", fn=lambda ops, x: ops.log_softmax(x, axis=1), args=normal((2, 4, 3))),
        Case(name="cumsum", fn=lambda ops, x: ops.cumsum(x, axis=1), args=normal((2, 7, 3))),
        Case(
            name="cumsum of integers",
            fn=lambda ops, i: ops.cumsum(i, axis=-1),
            args=with_ints(ints=[[[1, 5, -2], [0, 7, 7]]]),
            gradient=False,
        ),
        *(
            Case(
                name=f"{name} over axis {axis}",
                fn=lambda ops, x, name=name, axis=axis: getattr(ops, name)(x, axis=axis),
                args=_apart(2, 3, 5),
                gradient=False,
            )
            for name in ("argmax", "argmin")
            for axis in (-1, 1)
        ),
    ]


def _order() -> list[Case]:
    near = [[[2], [0], [6], [2]], [[1], [1], [3], [0]]]
    cases = [
        Case(
            name=f"{name}{' descending' if down else ''} over axis {axis}",
            fn=lambda ops, x, name=name, axis=axis, down=down: getattr(ops, name)(x, axis=axis, descending=down),
            args=_apart(2, 6, 3),
            gradient=name == "sort",
        )
        for name in ("sort", "argsort")
        for axis in (-1, 1)
        for down in (False, True)
    ]
    return [
        *cases,
        Case(
            name="take_along positions",
            fn=lambda ops, x, i: ops.take_along(x, i, axis=1),
            args=with_ints((2, 7, 3), ints=[near]),
        ),
        Case(
            name="take_along features",
            fn=lambda ops, x, i: ops.take_along(x, i, axis=-1),
            args=with_ints((2, 4, 7), ints=[near]),
        ),
        Case(
            name="scatter_add positions",
            fn=lambda ops, x, v, i: ops.scatter_add(x, i, v, axis=1),
            args=with_ints((2, 7, 3), (2, 4, 3), ints=[near]),
        ),
        Case(
            name="scatter_add features",
            fn=lambda ops, x, v, i: ops.scatter_add(x, i, v, axis=2),
            args=with_ints((2, 4, 7), (2, 4, 3), ints=[np.arange(24).reshape(2, 4, 3) % 5]),
        ),
    ]


def _shapes() -> list[Case]:
    table: dict[str, Fn] = {
        "transpose": lambda ops, x: ops.transpose(x, (0, 2, 1)),
        "flip": lambda ops, x: ops.flip(x, axis=1),
        "flip two axes": lambda ops, x: ops.flip(x, axis=(1, -1)),
        "roll": lambda ops, x: ops.roll(x, 2, axis=1),
        "roll back": lambda ops, x: ops.roll(x, -4, axis=-1),
        "pad": lambda ops, x: ops.pad(x, axis=1, before=2, after=1),
        "pad with a number": lambda ops, x: ops.pad(x, axis=-1, before=1, value=0.5),
        "join": lambda ops, x: ops.join([x, x * 2.0], axis=1),
        "join last": lambda ops, x: ops.join([x, x * 2.0, x], axis=-1),
        "split": lambda ops, x: ops.split(x, 2),
        "split by sizes": lambda ops, x: ops.split(x, (1, 3, 1), axis=1),
    }
    return [Case(name=name, fn=fn, args=normal((2, 5, 4))) for name, fn in table.items()]


def _images() -> list[Case]:
    lines: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
        ("same", {}, (3, 4, 6)),
        ("valid, stride 2", {"padding": "valid", "stride": 2}, (3, 4, 6)),
        ("same, stride 3", {"stride": 3}, (2, 4, 6)),
        ("causal, dilation 2", {"padding": "causal", "dilation": 2}, (3, 4, 6)),
        ("groups 2", {"groups": 2}, (3, 2, 6)),
        ("depthwise", {"groups": 4, "padding": "causal"}, (4, 1, 4)),
    ]
    planes: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
        ("same", {}, (3, 3, 2, 4)),
        ("valid, patches", {"padding": "valid", "stride": (2, 3)}, (2, 3, 2, 4)),
        ("same, stride 2", {"stride": 2}, (3, 2, 2, 4)),
        ("dilation, groups", {"dilation": (1, 2), "groups": 2}, (3, 2, 1, 4)),
    ]
    cases = [
        Case(
            name=f"conv {shape[0]}-dimensional, {what}",
            fn=lambda ops, x, k, options=options: ops.conv(x, k, **options),
            args=normal(shape, kernel),
        )
        for shape, table in (((2, 9, 4), lines), ((2, 6, 7, 2), planes))
        for what, options, kernel in table
    ]
    cases = [
        Case(name=c.name.replace("conv 2-dimensional", f"conv {i}"), fn=c.fn, args=c.args) for i, c in enumerate(cases)
    ]
    cases += [
        Case(
            name=f"pool {kind} of {size}, stride {stride}, {padding}, over {shape}",
            fn=lambda ops, x, kind=kind, size=size, stride=stride, padding=padding: ops.pool(
                x, size, kind=kind, stride=stride, padding=padding
            ),
            args=_apart(*shape),
        )
        for kind in ("max", "mean")
        for shape, size, stride, padding in (
            ((2, 7, 3), 2, None, "valid"),
            ((2, 7, 3), 3, 2, "same"),
            ((2, 5, 6, 2), (2, 3), None, "valid"),
            ((2, 5, 6, 2), 3, 1, "same"),
        )
    ]
    cases += [
        Case(
            name=f"resize {method} {shape} to {size}",
            fn=lambda ops, x, size=size, method=method: ops.resize(x, size, method=method),
            args=normal(shape),
        )
        for method in ("nearest", "linear")
        for shape, size in (((2, 5, 3), 8), ((2, 5, 3), 3), ((2, 3, 4, 2), (6, 5)))
    ]
    return cases


def _joined(ops: Any, a: Any, b: Any) -> Any:
    return a[0] * b[0], b[0] * a[1] + b[1]


def _scans() -> list[Case]:
    def rnn(ops: Any, h: Any, x: Any, w: Any) -> Any:
        def cell(h: Any, x: Any) -> Any:
            h = ops.tanh(ops.einsum("be,ef->bf", h, w) + x)
            return h, {"h": h, "square": h * h}

        last, ys = ops.scan(cell, h, x)
        return last, ys["h"], ys["square"]

    sizes = (1, 2, 3, 4, 5, 8, 11)
    return [
        Case(name="scan", fn=rnn, args=normal((2, 3), (2, 5, 3), (3, 3), scale=0.5), precisions=FP32),
        *(
            Case(
                name=f"associative_scan of {n}",
                fn=lambda ops, a, x: ops.associative_scan(lambda p, q: _joined(ops, p, q), (a, x)),
                args=normal((2, n, 3), (2, n, 3)),
                precisions=FP32,
            )
            for n in sizes
        ),
        Case(
            name="associative_scan over the last axis",
            fn=lambda ops, x: ops.associative_scan(lambda a, b: a + b, x, axis=-1),
            args=normal((2, 3, 6)),
            precisions=FP32,
        ),
    ]


_SAMPLES = np.array([0, 7, 2**31 + 5, 2**32 + 7], np.int64)


def _noise() -> list[Case]:
    return [
        Case(
            name=f"noise {kind}, {'training' if training else 'evaluation'}, draw {draw}",
            fn=lambda ops, x, kind=kind, draw=draw: ops.noise(3, 5, site=1234567890, kind=kind, draw=draw),
            args=normal((1,)),
            gradient=False,
            exact=kind == "uniform",
            context=Context(seed=2**40 + 3, step=9, sample=_SAMPLES, training=training),
        )
        for kind in ("normal", "uniform")
        for training, draw in ((True, 0), (False, 1))
    ]


def array_cases() -> list[Case]:
    return [*_elementwise(), *_reductions(), *_order(), *_shapes(), *_images(), *_scans(), *_noise()]
