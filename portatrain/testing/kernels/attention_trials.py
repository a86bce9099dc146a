"""The hard cases of attention: sizes, heads, masks and positions. Those of documents and of numbers are in
`attention_data.py`. Legend as in `portatrain.model.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from portatrain.backends.choose_kernel import attention_traits
from portatrain.testing.kernels.attention_oracle import attention
from portatrain.testing.kernels.trial import BOTH, FLOAT32, Draw, Rng, Trial

Sizes = tuple[int, int, int, int, int, int]
"""B, S, T, H, K, D."""
FULL = {"causal": False}


def normal(sizes: Sizes, *, value_size: int | None = None, sinks: bool = False) -> Draw:
    b, s, t, h, k, d = sizes
    dv = d if value_size is None else value_size

    def draw(rng: Rng) -> dict[str, np.ndarray]:
        shapes = {"q": (b, s, h, d), "k": (b, t, k, d), "v": (b, t, k, dv), **({"sinks": (h,)} if sinks else {})}
        return {name: rng.normal(size=shape) for name, shape in {**shapes, "g": (b, s, h, dv)}.items()}

    return draw


def trial(
    name: str,
    sizes: Sizes,
    options: Mapping[str, Any] | None = None,
    *,
    draw: Draw | None = None,
    dtypes: tuple[str, ...] = BOTH,
    value_size: int | None = None,
    sinks: bool = False,
    **indices: Any,
) -> Trial:
    options = options or {}
    given = {**options, **indices, "sinks": True if sinks else None}
    return Trial(
        operation="attention",
        name=name,
        shape=sizes,
        draw=draw or normal(sizes, value_size=value_size, sinks=sinks),
        keywords=("sinks",) if sinks else (),
        oracle=attention,
        indices=indices,
        options=options,
        traits=attention_traits(given, (sizes[5], sizes[5] if value_size is None else value_size)),
        dtypes=dtypes,
    )


def _single(name: str, sizes: Sizes, options: Mapping[str, Any] | None = None, **indices: Any) -> Trial:
    """Return a case that is tried in float32 alone: beside one of both dtypes it adds nothing in bfloat16 but time."""
    return trial(name, sizes, options, dtypes=FLOAT32, **indices)


def of_sizes() -> list[Trial]:
    """Return the cases of lengths, heads and head sizes, on and off every tile."""
    found = [_single(f"{n} tokens", (2, n, n, 4, 2, 16)) for n in (1, 2, 7, 127, 128)]
    found += [
        trial("129 tokens", (2, 129, 129, 4, 2, 16)),
        _single("257 tokens", (1, 257, 257, 2, 1, 16)),
        _single("no rows", (0, 8, 8, 4, 2, 16)),
        trial("heads 16:1, ratio 16", (2, 33, 33, 16, 1, 16)),
    ]
    found += [
        _single(f"heads {h}:{k}, ratio {h // k}", (2, 33, 33, h, k, 16))
        for h, k in ((1, 1), (3, 3), (4, 2), (6, 2), (8, 2), (12, 2), (8, 1))
    ]
    found += [trial(f"head size {d}", (2, 20, 20, 2, 1, d)) for d in (80, 128)]
    found += [_single(f"head size {d}", (2, 20, 20, 2, 1, d)) for d in (1, 64, 96, 192, 256)]
    found += [
        _single(f"full, {s} queries, {t} keys", (2, s, t, 4, 2, 16), FULL) for s, t in ((33, 33), (129, 17), (129, 1))
    ]
    found += [
        trial("full, 17 queries, 129 keys", (2, 17, 129, 4, 2, 16), FULL),
        _single("causal, 17 queries, 129 keys", (2, 17, 129, 4, 2, 16)),
        _single("causal, 129 queries, 17 keys", (2, 129, 17, 4, 2, 16)),
    ]
    return found


def of_masks() -> list[Trial]:
    """Return the cases of windows, soft-caps, biases, scales and prefixes, at their edges."""
    long, short = (2, 129, 129, 4, 2, 16), (2, 33, 33, 4, 2, 16)
    found = [_single(f"window {w}", long, {"window": w}) for w in (1, 2, 63, 65, 128, 129)]
    found += [
        trial("window 64", long, {"window": 64}),
        _single("full, window 1", long, {"window": 1, **FULL}),
        _single("full, window 32", long, {"window": 32, **FULL}),
        _single("soft-cap 0.5", short, {"softcap": 0.5}),
        trial("soft-cap 30", short, {"softcap": 30.0}),
        _single("full, soft-cap 2", short, {"softcap": 2.0, **FULL}),
        _single("window 8, soft-cap 1", short, {"window": 8, "softcap": 1.0}),
        trial("scale 0.3", short, {"scale": 0.3}),
        trial("alibi", short, {"alibi": True}),
        _single("alibi, 129 tokens", long, {"alibi": True}),
        _single("full, alibi of given slopes, one of them 0", short, {"alibi": (0.5, 0.1, 1.0, 0.0), **FULL}),
        _single("window 8, alibi, soft-cap 1", short, {"window": 8, "alibi": True, "softcap": 1.0}),
    ]
    at = np.arange(129)
    lengths = np.stack([at < 0, at < 1, at < 64, at < 128, at < 129, at % 3 == 0]).astype(np.int32)
    six = (6, *long[1:])
    parts = np.stack([1 + at // 40, 1 + at // 64, np.ones(129), 1 + (at >= 127), 1 + at // 129, at // 50])
    found += [
        trial("prefix of 0, 1, 64, 128, 129 keys and scattered ones", six, prefix=lengths),
        _single("prefix, window 5", six, {"window": 5}, prefix=lengths),
        _single("prefix, alibi", six, {"alibi": True}, prefix=lengths),
        _single("prefix, documents", six, prefix=lengths, segment_ids=parts.astype(np.int32)),
    ]
    return found


def of_sinks() -> list[Trial]:
    """Return the cases of sinks, and of value heads of another size."""
    long, short, cache = (2, 129, 129, 4, 2, 16), (2, 33, 33, 4, 2, 16), (2, 3, 129, 4, 2, 16)
    at = np.arange(129, dtype=np.int32)
    ids, blind = np.stack([1 + at // 50, at // 100]), np.stack([at[:3] - 2, at[:3] + 60])

    def of_size(size: float) -> Draw:
        def draw(rng: Rng) -> dict[str, np.ndarray]:
            return {**normal(short, sinks=True)(rng), "sinks": np.array([size, -size, size / 2, 0.0])}

        return draw

    return [
        trial("sinks", short, sinks=True),
        _single("sinks of 20", short, draw=of_size(20.0), sinks=True),
        _single("sinks of 1e4", short, draw=of_size(1e4), sinks=True),
        _single("sinks, 129 tokens, window 64", long, {"window": 64}, sinks=True),
        _single("sinks, full", short, FULL, sinks=True),
        _single("sinks, soft-cap 0.5", short, {"softcap": 0.5}, sinks=True),
        _single("sinks, scale 0.3", short, {"scale": 0.3}, sinks=True),
        _single("sinks, heads 16:1, ratio 16", (2, 33, 33, 16, 1, 16), sinks=True),
        trial("sinks, documents", long, sinks=True, segment_ids=ids),
        _single("sinks, rows that see nothing", cache, sinks=True, positions=(blind, np.stack([at, at]))),
        trial("value heads of 8", short, value_size=8),
        _single("value heads of 33", short, value_size=33),
        _single("value heads of 128 beside 192", (2, 20, 20, 2, 2, 192), value_size=128),
        _single("value heads of 24, sinks, window 8", short, {"window": 8}, value_size=24, sinks=True),
    ]


def of_positions() -> list[Trial]:
    """Return the cases of given positions: caches, permutations, offsets, and rows that see nothing."""
    sizes, cache = (2, 33, 33, 4, 2, 16), (2, 3, 129, 4, 2, 16)
    rng = np.random.default_rng(17)
    at, keys = np.arange(33, dtype=np.int32), np.arange(129, dtype=np.int32)
    shuffled = np.stack([rng.permutation(at) for _ in range(2)])
    late = np.stack([[126, 127, 128], [0, 63, 64]]).astype(np.int32)
    both = np.stack([keys, keys])
    blind = np.stack([at - 16, at + 5])
    far = np.stack([at, at]) - 100
    return [
        _single("positions 0 to 32, given", sizes, positions=(at, at)),
        _single("positions from 100000", sizes, positions=(at + 100_000, at + 100_000)),
        _single("positions above 2^24", sizes, positions=(at + 2**24, at + 2**24)),
        _single("positions, repeated", sizes, positions=(at // 4, at // 4)),
        trial("positions, shuffled", sizes, positions=(shuffled, shuffled)),
        trial("positions of which many see nothing", sizes, positions=(blind, np.stack([at, at[::-1]]))),
        trial("no query sees any key", sizes, positions=(far, shuffled)),
        _single("no query sees any key, soft-cap 1", sizes, {"softcap": 1.0}, positions=(far, shuffled)),
        _single("positions, shuffled, window 5", sizes, {"window": 5}, positions=(shuffled, shuffled)),
        _single("rows that see nothing, window 5", sizes, {"window": 5}, positions=(2 * blind, shuffled)),
        _single("positions, shuffled, alibi", sizes, {"alibi": True}, positions=(shuffled, shuffled)),
        _single("a cache of 129 keys", cache, positions=(keys[-3:], keys)),
        trial("a cache, each row elsewhere", cache, positions=(late, both)),
        _single("a cache, window 64", cache, {"window": 64}, positions=(late, both)),
        _single("a cache of one query", (2, 1, 129, 4, 2, 16), positions=(keys[-1:], keys)),
    ]
