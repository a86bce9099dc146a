"""The hard cases of attention: sizes, heads, masks and positions. Those of documents and of numbers are in
`attention_data.py`. Legend as in `portatrain.model.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from portatrain.backends.choose_kernel import attention_traits
from portatrain.testing.kernels.attention_oracle import attention
from portatrain.testing.kernels.trial import BOTH, Draw, Rng, Trial

Sizes = tuple[int, int, int, int, int, int]
"""B, S, T, H, K, D."""
FULL = {"causal": False}


def normal(sizes: Sizes) -> Draw:
    b, s, t, h, k, d = sizes

    def draw(rng: Rng) -> dict[str, np.ndarray]:
        shapes = {"q": (b, s, h, d), "k": (b, t, k, d), "v": (b, t, k, d), "g": (b, s, h, d)}
        return {name: rng.normal(size=shape) for name, shape in shapes.items()}

    return draw


def trial(
    name: str,
    sizes: Sizes,
    options: Mapping[str, Any] | None = None,
    *,
    draw: Draw | None = None,
    dtypes: tuple[str, ...] = BOTH,
    **indices: Any,
) -> Trial:
    options = options or {}
    return Trial(
        operation="attention",
        name=name,
        shape=sizes,
        draw=draw or normal(sizes),
        oracle=attention,
        indices=indices,
        options=options,
        traits=attention_traits({**options, **indices}),
        dtypes=dtypes,
    )


def of_sizes() -> list[Trial]:
    """Return the cases of lengths, heads and head sizes, on and off every tile."""
    found = [
        trial(f"{n} tokens", (2, n, n, 4, 2, 16), dtypes=BOTH if n in (1, 129) else ("float32",))
        for n in (1, 2, 7, 64, 127, 128, 129)
    ]
    found += [trial("257 tokens", (1, 257, 257, 2, 1, 16)), trial("no rows", (0, 8, 8, 4, 2, 16), dtypes=("float32",))]
    found += [
        trial(
            f"heads {h}:{k}, ratio {h // k}", (2, 33, 33, h, k, 16), dtypes=BOTH if h // k in (4, 16) else ("float32",)
        )
        for h, k in ((1, 1), (3, 3), (4, 2), (6, 2), (8, 2), (12, 2), (8, 1), (16, 1))
    ]
    found += [
        trial(f"head size {d}", (2, 20, 20, 2, 1, d), dtypes=BOTH if d in (64, 80, 128) else ("float32",))
        for d in (1, 8, 64, 72, 80, 96, 128, 192, 256)
    ]
    found += [
        trial(f"full, {s} queries, {t} keys", (2, s, t, 4, 2, 16), FULL)
        for s, t in ((33, 33), (17, 129), (129, 17), (1, 129), (129, 1))
    ]
    found += [
        trial(f"causal, {s} queries, {t} keys", (2, s, t, 4, 2, 16), dtypes=("float32",))
        for s, t in ((17, 129), (129, 17))
    ]
    return found


def of_masks() -> list[Trial]:
    """Return the cases of windows, soft-caps, biases, scales and prefixes, at their edges."""
    long, short = (2, 129, 129, 4, 2, 16), (2, 33, 33, 4, 2, 16)
    found = [
        trial(f"window {w}", long, {"window": w}, dtypes=BOTH if w in (1, 64) else ("float32",))
        for w in (1, 2, 63, 64, 65, 128, 129, 130)
    ]
    found += [trial(f"full, window {w}", long, {"window": w, **FULL}) for w in (1, 32)]
    found += [
        trial("soft-cap 0.5", short, {"softcap": 0.5}),
        trial("soft-cap 30", short, {"softcap": 30.0}),
        trial("full, soft-cap 2", short, {"softcap": 2.0, **FULL}, dtypes=("float32",)),
        trial("window 8, soft-cap 1", short, {"window": 8, "softcap": 1.0}),
        trial("scale 1", short, {"scale": 1.0}, dtypes=("float32",)),
        trial("scale 0.3", short, {"scale": 0.3}),
        trial("alibi", short, {"alibi": True}),
        trial("alibi, long", long, {"alibi": True}, dtypes=("float32",)),
        trial("full, alibi of given slopes, one of them 0", short, {"alibi": (0.5, 0.1, 1.0, 0.0), **FULL}),
        trial("window 8, alibi, soft-cap 1", short, {"window": 8, "alibi": True, "softcap": 1.0}, dtypes=("float32",)),
    ]
    at = np.arange(129)
    lengths = np.stack([at < 0, at < 1, at < 64, at < 128, at < 129, at % 3 == 0]).astype(np.int32)
    six = (6, *long[1:])
    parts = np.stack([1 + at // 40, 1 + at // 64, np.ones(129), 1 + (at >= 127), 1 + at // 129, at // 50])
    found += [
        trial("prefix of 0, 1, 64, 128, 129 keys and scattered ones", six, prefix=lengths),
        trial("prefix, window 5", six, {"window": 5}, prefix=lengths, dtypes=("float32",)),
        trial("prefix, alibi", six, {"alibi": True}, prefix=lengths, dtypes=("float32",)),
        trial("prefix, documents", six, prefix=lengths, segment_ids=parts.astype(np.int32)),
    ]
    return found


def of_positions() -> list[Trial]:
    """Return the cases of given positions: caches, permutations, offsets, and rows that see nothing."""
    sizes, cache = (2, 33, 33, 4, 2, 16), (2, 3, 129, 4, 2, 16)
    rng = np.random.default_rng(17)
    at, keys = np.arange(33, dtype=np.int32), np.arange(129, dtype=np.int32)
    shuffled = np.stack([rng.permutation(at) for _ in range(2)])
    late = np.stack([[126, 127, 128], [0, 63, 64]]).astype(np.int32)
    both = np.stack([keys, keys])
    blind = np.stack([at - 16, at + 5])
    found = [
        trial("positions 0 to 32, given", sizes, positions=(at, at)),
        trial("positions from 100000", sizes, positions=(at + 100_000, at + 100_000), dtypes=("float32",)),
        trial("positions above 2^24", sizes, positions=(at + 2**24, at + 2**24), dtypes=("float32",)),
        trial("positions, shuffled", sizes, positions=(shuffled, shuffled)),
        trial("positions, shuffled, window 5", sizes, {"window": 5}, positions=(shuffled, shuffled)),
        trial("positions, repeated", sizes, positions=(at // 4, at // 4), dtypes=("float32",)),
        trial(
            "positions, shuffled, alibi", sizes, {"alibi": True}, positions=(shuffled, shuffled), dtypes=("float32",)
        ),
        trial("a cache of 129 keys", cache, positions=(keys[-3:], keys)),
        trial("a cache, each row elsewhere", cache, positions=(late, both)),
        trial("a cache, window 64", cache, {"window": 64}, positions=(late, both), dtypes=("float32",)),
        trial("a cache of one query", (2, 1, 129, 4, 2, 16), positions=(keys[-1:], keys), dtypes=("float32",)),
        trial("positions of which many see nothing", sizes, positions=(blind, np.stack([at, at[::-1]]))),
        trial("no query sees any key", sizes, positions=(at - 100, at)),
        trial("no query sees any key, soft-cap 1", sizes, {"softcap": 1.0}, positions=(at - 100, at)),
        trial("rows that see nothing, window 3", sizes, {"window": 3}, positions=(2 * blind, shuffled)),
    ]
    return found
