"""Cases of attention in all combinations of its options. Legend as in `portatrain.model.ops`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from portatrain.testing.case import FP32, Case, normal, with_ints

_SEGMENTS = [[1, 1, 2, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]
_SCATTERED = [[0, 1, 0, 1, 2, 2, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]]
_QUERY_SEGMENTS = [[1, 2, 0], [3, 1, 4]]
_KEY_SEGMENTS = [[1, 1, 2, 2, 0, 0, 2], [1, 1, 2, 2, 3, 3, 3]]

_ATTENTION: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window=3": {"window": 3},
    "window=1": {"window": 1},
    "window=99": {"window": 99},
    "full, window=3": {"causal": False, "window": 3},
    "softcap": {"softcap": 0.7},
    "full, softcap": {"causal": False, "softcap": 0.7},
    "scale": {"scale": 0.9},
    "window=2, softcap, scale": {"window": 2, "softcap": 1.5, "scale": 0.9},
    "alibi": {"alibi": True},
    "full, alibi of given slopes": {"causal": False, "alibi": (0.5, 0.1, 1.0, 0.0)},
    "window=3, alibi, softcap": {"window": 3, "alibi": True, "softcap": 0.7},
}

_PREFIXES = [[1, 1, 0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
_PREFIX: dict[str, dict[str, Any]] = {
    "causal": {},
    "window=2": {"window": 2},
    "alibi": {"alibi": True},
    "softcap": {"softcap": 0.7},
}


@functools.cache  # the same objects, so that the oracle answers each once a process (`oracle.answers`)
def attention_cases() -> tuple[Case, ...]:
    cases = []

    def add(what: str, fn: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], ints: list[Any]) -> None:
        cases.append(Case(name=f"attention {what}", fn=fn, args=with_ints(*shapes, ints=ints)))

    for what, options in _ATTENTION.items():
        q, kv = (2, 8, 4, 6), (2, 8, 2, 6)
        add(what, lambda ops, q, k, v, o=options: ops.attention(q, k, v, **o), (q, kv, kv), [])
        for name, segments in (("segments", _SEGMENTS), ("scattered segments", _SCATTERED)):
            add(
                f"{what}, {name}",
                lambda ops, q, k, v, ids, o=options: ops.attention(q, k, v, segment_ids=ids, **o),
                (q, kv, kv),
                [segments],
            )
    for heads, kv_heads in ((3, 3), (3, 1), (6, 3), (1, 1)):
        q, kv = (2, 5, heads, 4), (2, 5, kv_heads, 4)
        add(f"heads {heads}:{kv_heads}", lambda ops, q, k, v: ops.attention(q, k, v), (q, kv, kv), [])
    # A cache: 3 queries at given positions over 7 keys, the last of which are not written yet.
    q, kv = (2, 3, 4, 6), (2, 7, 2, 6)
    for what, at_q, at_k in (
        ("positions (S,)", [2, 3, 4], [0, 1, 2, 3, 4, 5, 6]),
        ("positions (B, S)", [[2, 3, 4], [0, 1, 2]], [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]]),
        ("positions that see nothing", [[0, 1, 2], [9, 0, 9]], [[5, 6, 7, 8, 9, 10, 2], [1, 2, 3, 4, 5, 6, 7]]),
    ):
        for name, options in (("", {}), (", window=2", {"window": 2}), (", softcap", {"softcap": 0.7})):
            add(
                what + name,
                lambda ops, q, k, v, at_q, at_k, o=options: ops.attention(q, k, v, positions=(at_q, at_k), **o),
                (q, kv, kv),
                [at_q, at_k],
            )
    add(
        "positions (B, S), alibi",
        lambda ops, q, k, v, at_q, at_k: ops.attention(q, k, v, positions=(at_q, at_k), alibi=True),
        (q, kv, kv),
        [[[2, 3, 4], [0, 1, 2]], [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]]],
    )
    for what, options in _PREFIX.items():
        q8, kv8 = (2, 8, 4, 6), (2, 8, 2, 6)
        add(
            f"prefix, {what}",
            lambda ops, q, k, v, p, o=options: ops.attention(q, k, v, prefix=p, **o),
            (q8, kv8, kv8),
            [_PREFIXES],
        )
        add(
            f"prefix, {what}, segments",
            lambda ops, q, k, v, p, ids, o=options: ops.attention(q, k, v, prefix=p, segment_ids=ids, **o),
            (q8, kv8, kv8),
            [_PREFIXES, _SEGMENTS],
        )
    add(
        "positions and pairs of segments",
        lambda ops, q, k, v, at_q, at_k, of_q, of_k: ops.attention(
            q, k, v, positions=(at_q, at_k), segment_ids=(of_q, of_k)
        ),
        (q, kv, kv),
        [[4, 5, 6], [0, 1, 2, 3, 4, 5, 6], _QUERY_SEGMENTS, _KEY_SEGMENTS],
    )
    for what, options in (("full", {"causal": False}), ("full, softcap", {"causal": False, "softcap": 0.7})):
        add(
            f"{what}, pairs of segments, one of which sees nothing",
            lambda ops, q, k, v, of_q, of_k, o=options: ops.attention(q, k, v, segment_ids=(of_q, of_k), **o),
            (q, kv, kv),
            [_QUERY_SEGMENTS, _KEY_SEGMENTS],
        )
    add("full, more keys", lambda ops, q, k, v: ops.attention(q, k, v, causal=False), (q, kv, kv), [])
    add("causal, more keys", lambda ops, q, k, v: ops.attention(q, k, v), (q, kv, kv), [])
    cases += _with_sinks() + _with_other_values()
    cases.append(
        Case(
            name="attention, large scores",
            fn=lambda ops, q, k, v: ops.attention(q, k, v),
            args=normal((2, 5, 2, 6), (2, 5, 1, 6), (2, 5, 1, 6), scale=12.0),
            # One weight is nearly 1: the gradients of q and k are differences of nearly equal terms in any
            # backward pass, so they have no digits to compare.
            gradient=False,
            precisions=FP32,
        )
    )
    return tuple(cases)


def _with_sinks() -> list[Case]:
    """Return cases with a learned score of each head, also where a query sees nothing."""

    def case(
        what: str, options: dict[str, Any], *shapes: tuple[int, ...], ints: list[Any], given: tuple[str, ...]
    ) -> Case:
        def args(rng: Any) -> Any:
            q, k, v, *more = with_ints(*shapes, ints=ints)(rng)
            return (q, k, v, 2.0 * rng.normal(size=shapes[0][2]).astype("float32"), *more)

        def fn(ops: Any, q: Any, k: Any, v: Any, sinks: Any, *more: Any) -> Any:
            pairs = {"positions": more[:2], "pair": more[:2]}
            rules = {name.replace("pair", "segment_ids"): pairs.get(name, more[0]) for name in given}
            return ops.attention(q, k, v, sinks=sinks, **rules, **options)

        return Case(name=f"attention sinks{what}", fn=fn, args=args)

    q, kv = (2, 8, 4, 6), (2, 8, 2, 6)
    short, long = (2, 3, 4, 6), (2, 7, 2, 6)
    capped = {"causal": False, "softcap": 0.7, "scale": 0.9}
    nothing = [[[0, 1, 2], [9, 0, 9]], [[5, 6, 7, 8, 9, 10, 2], [1, 2, 3, 4, 5, 6, 7]]]
    windowed = {"window": 3, "alibi": True}
    return [
        case("", {}, q, kv, kv, ints=[], given=()),
        case(", full, softcap, scale", capped, q, kv, kv, ints=[], given=()),
        case(
            ", window=3, alibi, segments, wide values",
            windowed,
            *(q, kv, (2, 8, 2, 10)),
            ints=[_SEGMENTS],
            given=("segment_ids",),
        ),
        case(", positions that see nothing", {}, short, long, long, ints=nothing, given=("positions",)),
        case(
            ", full, segments that see nothing",
            {"causal": False},
            *(short, long, long),
            ints=[_QUERY_SEGMENTS, _KEY_SEGMENTS],
            given=("pair",),
        ),
    ]


def _with_other_values() -> list[Case]:
    """Return cases with value heads that are smaller or larger than key heads."""
    q, kv = (2, 8, 4, 6), (2, 8, 2, 6)
    capped, wide = {"softcap": 0.7}, {"causal": False, "window": 3}
    positions = [[[0, 1, 2], [9, 0, 9]], [[5, 6, 7, 8, 9, 10, 2]] * 2]
    made = [
        Case(
            name=f"attention values of size {size}{what}",
            fn=lambda ops, q, k, v, o=options: ops.attention(q, k, v, **o),
            args=normal(q, kv, (2, 8, 2, size)),
        )
        for size, what, options in ((2, "", {}), (10, ", softcap", capped), (10, ", full, window=3", wide))
    ]
    made.append(
        Case(
            name="attention values of size 2, positions that see nothing",
            fn=lambda ops, q, k, v, at_q, at_k: ops.attention(q, k, v, positions=(at_q, at_k)),
            args=with_ints((2, 3, 4, 6), (2, 7, 2, 6), (2, 7, 2, 2), ints=positions),
        )
    )
    return made
