"""The table of cases: every operation with its options, at small shapes whose sizes all differ.

Legend as in `portatrain.model.ops`: B batch, S queries, T keys, E embed, H heads, K kv_heads, D head_dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.model.rope import DynamicScaling, LinearScaling, LongScaling, RopeScaling, Scaling, YarnScaling
from portatrain.testing.array_cases import array_cases
from portatrain.testing.attention_cases import attention_cases
from portatrain.testing.case import FP32, Args, Case, Rng, normal, with_ints
from portatrain.testing.expert_cases import expert_cases
from portatrain.testing.loss_cases import loss_cases

# ---- contractions

_EINSUMS: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = (
    ("bse,ehd->bshd", ((2, 5, 6), (6, 3, 4))),
    ("bshd,hde->bse", ((2, 5, 3, 4), (3, 4, 6))),
    ("bse,ve->bsv", ((2, 5, 6), (7, 6))),
    ("be,ec->bc", ((3, 6), (6, 4))),
    ("brxcyk,xyke->brce", ((2, 3, 2, 4, 2, 1), (2, 2, 1, 5))),
    ("bse,er,rf->bsf", ((2, 5, 6), (6, 2), (2, 7))),
    ("bsxc,bse->xbce", ((2, 5, 3, 4), (2, 5, 6))),
    ("xbce,xem->xbcm", ((3, 2, 4, 6), (3, 6, 5))),
    ("bsxc,xbce->bse", ((2, 5, 3, 4), (3, 2, 4, 6))),
    ("bse,e->bs", ((2, 5, 6), (6,))),
    ("bse,e->bse", ((2, 5, 6), (6,))),
    ("b,s->bs", ((3,), (4,))),
    ("bse->esb", ((2, 5, 6),)),
    ("bse->be", ((2, 5, 6),)),
    ("ab,ab->", ((4, 7), (4, 7))),
    ("bhst,bthd->bshd", ((2, 3, 5, 7), (2, 7, 3, 4))),
)


def _near_one(ops: Any, x: Any, y: Any) -> Any:
    """The product of x and y, by way of 1 + x / 1024: operands rounded to bfloat16 would lose it."""
    one = ops.cast(x, "float32") * 0.0 + 1.0
    products = [ops.einsum("bij,bjk->bik", a, y, dtype="exact") for a in (one + x / 1024, one)]
    return 1024 * (products[0] - products[1])


def _einsum_cases() -> list[Case]:
    cases = [
        Case(name=f"einsum {spec}", fn=lambda ops, *xs, spec=spec: ops.einsum(spec, *xs), args=normal(*shapes))
        for spec, shapes in _EINSUMS
    ]
    cases.append(
        Case(
            name="einsum into float32",
            fn=lambda ops, x, w: ops.einsum("bse,ex->bsx", x, w, dtype="float32"),
            args=normal((2, 5, 6), (6, 4)),
        )
    )
    cases.append(
        Case(
            name="einsum of exact operands",
            fn=lambda ops, x, y: ops.einsum("bij,bjk->bik", x, y, dtype="exact"),
            args=normal((2, 5, 6), (2, 6, 4)),
            precisions=FP32,
        )
    )
    cases.append(
        Case(
            name="einsum of exact operands that bfloat16 does not hold",
            fn=_near_one,
            args=normal((2, 5, 6), (2, 6, 4)),
            precisions=("bf16",),
        )
    )
    cases.append(
        Case(
            name="einsum of 1024 terms",
            fn=lambda ops, x, w: ops.einsum("bse,em->bsm", x, w),
            args=normal((1, 3, 1024), (1024, 4), scale=1 / 32),
        )
    )
    return cases


def _embed_cases() -> list[Case]:
    return [
        Case(
            name=f"embed ids of shape {np.shape(ids)}",
            fn=lambda ops, table, ids: ops.embed(table, ids),
            args=with_ints((7, 4), ints=[ids]),
        )
        for ids in ([0, 6, 3], [[1, 1, 1, 5], [6, 0, 1, 2]])
    ]


def _bias_cases() -> list[Case]:
    return [
        Case(name=f"bias of shape {sizes[1]} on {sizes[0]}", fn=lambda ops, x, p: ops.bias(x, p), args=normal(*sizes))
        for sizes in (((2, 5, 3, 4), (3, 4)), ((2, 3, 5, 6), (6,)), ((4, 6), (6,)), ((8, 512, 6), (6,)))
    ]


# ---- norms and positions


def _shifted(rng: Rng) -> Args:
    """Return normal values with a mean of a hundred times their deviation."""
    x = rng.normal(size=(2, 4, 6)) + 100.0
    return x.astype(np.float32), *normal((6,), (6,))(rng)


def _norm_cases() -> list[Case]:
    sizes = normal((2, 5, 6), (6,), (6,))
    return [
        Case(name="rms_norm", fn=lambda ops, x, s, b: ops.rms_norm(x, s), args=sizes),
        Case(name="rms_norm without scale", fn=lambda ops, x: ops.rms_norm(x), args=normal((2, 3, 4, 6))),
        Case(name="rms_norm eps=0.5", fn=lambda ops, x, s, b: ops.rms_norm(x, s, eps=0.5), args=sizes),
        Case(name="rms_norm, tiny rows", fn=lambda ops, x: ops.rms_norm(x), args=normal((3, 6), scale=1e-4)),
        Case(name="layer_norm", fn=lambda ops, x, s, b: ops.layer_norm(x, s, b), args=sizes),
        Case(name="layer_norm without bias", fn=lambda ops, x, s, b: ops.layer_norm(x, s), args=sizes),
        Case(name="layer_norm bare", fn=lambda ops, x: ops.layer_norm(x), args=normal((3, 6))),
        Case(name="layer_norm eps=0.5", fn=lambda ops, x, s, b: ops.layer_norm(x, s, b, eps=0.5), args=sizes),
        Case(
            name="layer_norm, large mean",
            fn=lambda ops, x, s, b: ops.layer_norm(x, s, b),
            args=_shifted,
            precisions=FP32,
        ),
    ]


_POSITIONS = {
    "(S,)": [0, 1, 2, 3, 4],
    "(B, S)": [[0, 1, 2, 0, 1], [3, 4, 5, 6, 0]],
    "far": [[0, 511, 4095, 8191, 131071], [1, 2, 3, 100000, 65536]],
}


# A scaling that depends on the length of the text takes that of the array: 5 positions, more than `original`.
_SCALINGS: dict[str, Scaling] = {
    "stretched": RopeScaling(factor=8.0),
    "linear": LinearScaling(factor=4.0),
    "dynamic": DynamicScaling(factor=4.0, original=3),
    "yarn": YarnScaling(factor=4.0, original=4096),
    "longrope": LongScaling(short=(1.0,) * 8, long=tuple(1.0 + i for i in range(8)), original=4, attention_factor=1.2),
}


def _rope_cases() -> list[Case]:
    cases = []
    for what, positions in _POSITIONS.items():
        for theta in (10000.0, 500000.0):
            cases.append(
                Case(
                    name=f"rope_table positions {what}, theta {theta:g}",
                    fn=lambda ops, p, theta=theta: ops.rope_table(p, 8, theta=theta),
                    args=with_ints(ints=[positions]),
                    gradient=False,
                )
            )
        for how, scaling in _SCALINGS.items():
            cases.append(
                Case(
                    name=f"rope_table positions {what}, {how}",
                    fn=lambda ops, p, scaling=scaling: ops.rope_table(p, 16, scaling=scaling),
                    args=with_ints(ints=[positions]),
                    gradient=False,
                )
            )
        cases.append(
            Case(
                name=f"rope positions {what}",
                fn=lambda ops, x, p: ops.rope(x, ops.rope_table(p, 6)),
                args=with_ints((2, 5, 3, 6), ints=[positions]),
            )
        )
    return cases


# ---- elementwise and shape

_SAMPLES = np.array([0, 7, 2**31 + 5, 2**32 + 7], np.int64)


def _dropout_cases() -> list[Case]:
    cases = []
    for rate, seed, step, shape in (
        (0.1, 0, 1, (4, 50)),
        (0.5, 2**63 - 1, 1000, (4, 3, 5)),
        (0.9, 2**31, 2**30, (4, 2, 3, 4)),
    ):
        cases.append(
            Case(
                name=f"dropout {rate}, seed {seed}, step {step}",
                fn=lambda ops, x, rate=rate: ops.dropout(x, rate, site=1234567890),
                args=normal(shape),
                context=Context(seed=seed, step=step, sample=_SAMPLES, training=True),
            )
        )
    training = Context(sample=_SAMPLES, training=True)
    ones = normal((4, 1000), scale=0.0)
    return [
        *cases,
        Case(
            name="dropout's choice, bit for bit",
            fn=lambda ops, x: ops.cast(ops.dropout(x + 1.0, 0.25, site=3) > 0.5, "int32"),
            args=ones,
            gradient=False,
            context=training,
        ),
        Case(
            name="dropout while not training",
            fn=lambda ops, x: ops.dropout(x, 0.5, site=3),
            args=normal((4, 9)),
            exact=True,
            context=Context(sample=_SAMPLES),
        ),
        Case(
            name="dropout of rate 0",
            fn=lambda ops, x: ops.dropout(x, 0.0, site=3),
            args=normal((4, 9)),
            exact=True,
            context=training,
        ),
    ]


def _wide(rng: Rng) -> Args:
    x = np.concatenate([np.linspace(-8, 8, 33) + 0.01, [-100.0, -30.0, 30.0, 100.0]])
    return (x.astype(np.float32),)


def _positive(rng: Rng) -> Args:
    return (np.exp(rng.normal(size=(3, 5))).astype(np.float32),)


def _elementwise_cases() -> list[Case]:
    by_name: dict[str, Callable[..., Any]] = {
        "silu": lambda ops, x: ops.silu(x),
        "gelu": lambda ops, x: ops.gelu(x),
        "gelu approximate": lambda ops, x: ops.gelu(x, approximate=True),
        "relu": lambda ops, x: ops.relu(x),
        "sigmoid": lambda ops, x: ops.sigmoid(x),
        "tanh": lambda ops, x: ops.tanh(x),
    }
    small = normal((3, 5))
    return [
        *(Case(name=name, fn=fn, args=_wide) for name, fn in by_name.items()),
        Case(name="exp", fn=lambda ops, x: ops.exp(x), args=small),
        Case(name="log", fn=lambda ops, x: ops.log(x), args=_positive),
        Case(name="softmax", fn=lambda ops, x: ops.softmax(x), args=small),
        Case(name="softmax axis=1", fn=lambda ops, x: ops.softmax(x, axis=1), args=normal((2, 4, 3))),
        Case(
            name="softmax of large values",
            fn=lambda ops, x: ops.softmax(x),
            args=normal((3, 5), scale=1000.0),
            precisions=FP32,
        ),
        Case(
            name="arithmetic, comparison, indexing, reshape",
            fn=lambda ops, x, y: ops.where(x > y, (x - 0.5) ** 2 / (y * y + 2.0), -x)[:, 1:, None].reshape(-1, 8),
            args=normal((2, 5, 4), (2, 5, 4)),
        ),
        Case(name="where with numbers", fn=lambda ops, x: ops.where(x > 0, x, -1.0), args=small),
        Case(name="where, broadcast", fn=lambda ops, x, y: ops.where(y > 0, x, y), args=normal((3, 5), (5,))),
        Case(name="concat", fn=lambda ops, x, y: ops.concat([x, y], axis=1), args=normal((2, 3, 4), (2, 5, 4))),
        Case(
            name="concat of three, last axis",
            fn=lambda ops, x, y: ops.concat((x, y, x), axis=-1),
            args=normal((2, 3), (2, 1)),
        ),
        Case(name="weight", fn=lambda ops, x: ops.weight(x) * 2.0, args=small),
        Case(name="name", fn=lambda ops, x: ops.name(x, "x"), args=small, exact=True),
        Case(name="shard", fn=lambda ops, x: ops.shard(x, "batch", None), args=small, exact=True),
        Case(
            name="stop_gradient",
            fn=lambda ops, x, y: x * ops.stop_gradient(y),
            args=normal((3, 5), (3, 5)),
            constant=(1,),
        ),
    ]


def _integer_cases() -> list[Case]:
    ids = [[0, 3, 2], [4, 4, 1]]
    return [
        Case(name="cast to int32", fn=lambda ops, x: ops.cast(x > 0, "int32"), args=normal((3, 5)), gradient=False),
        Case(name="cast to bool", fn=lambda ops, i: ops.cast(i, "bool"), args=with_ints(ints=[ids]), gradient=False),
        Case(
            name="cast to float32",
            fn=lambda ops, i: ops.cast(i, "float32") * 0.5,
            args=with_ints(ints=[ids]),
            gradient=False,
            exact=True,
        ),
        Case(name="arange", fn=lambda ops, x: ops.arange(5), args=normal((1,)), gradient=False),
        Case(
            name="one_hot", fn=lambda ops, i: ops.one_hot(i, 5), args=with_ints(ints=[ids]), gradient=False, exact=True
        ),
        Case(
            name="top_k",
            fn=lambda ops, x: ops.top_k(x, 3),
            args=normal((2, 4, 9)),
            gradient=False,
            exact=True,
            precisions=FP32,
        ),
        Case(name="gradient of top_k", fn=lambda ops, x: ops.top_k(x, 3)[0], args=normal((2, 4, 9)), precisions=FP32),
        Case(
            name="top_k of ties",
            fn=lambda ops, i: ops.top_k(ops.cast(i, "float32"), 4),
            args=with_ints(ints=[[[1, 3, 3, 1, 3, 2, 2, 1], [0, 0, 0, 0, 0, 0, 0, 0]]]),
            gradient=False,
            exact=True,
        ),
        Case(
            name="top_k of many ties",
            fn=lambda ops, i: ops.top_k(ops.cast(i % 3, "float32"), 40)[1],
            args=with_ints(ints=[np.arange(300)[None]]),
            gradient=False,
        ),
        *(
            Case(
                name=f"write at {at}",
                fn=lambda ops, cache, value, at: ops.write(cache, value, at),
                args=with_ints((2, 6, 3, 2), (2, 2, 3, 2), ints=[at]),
            )
            for at in (0, 2, 4)
        ),
        Case(
            name="step, layer and sample",
            fn=lambda ops, i: (ops.step + i, ops.layer + i, ops.sample[:, 0] + i, ops.sample[:, 1] + i),
            args=with_ints(ints=[1]),
            gradient=False,
            context=Context(step=17, sample=_SAMPLES),
        ),
    ]


# ---- reductions


def _reduction_cases() -> list[Case]:
    axes = ("batch", "seq", "embed")
    cases = []
    for over in (("batch",), ("seq",), ("batch", "seq"), ("embed", "seq"), ("batch", "seq", "embed")):
        for name in ("sum", "mean"):
            cases.append(
                Case(
                    name=f"{name} over {', '.join(over)}",
                    fn=lambda ops, x, name=name, over=over: getattr(ops, name)(x, axes, over=over),
                    args=normal((2, 5, 3)),
                )
            )
    cases.append(
        Case(
            name="sum with an unnamed axis",
            fn=lambda ops, x: ops.sum(x, ("batch", "seq", None), over=("seq",)),
            args=normal((2, 5, 3)),
        )
    )
    return cases


CASES: tuple[Case, ...] = (
    *_einsum_cases(),
    *_embed_cases(),
    *_bias_cases(),
    *_norm_cases(),
    *_rope_cases(),
    *attention_cases(),
    *expert_cases(),
    *_dropout_cases(),
    *_elementwise_cases(),
    *_integer_cases(),
    *_reduction_cases(),
    *loss_cases(),
    *array_cases(),
)
"""Every case, in the order of `portatrain.model.ops`."""
