"""The hard cases of attention that differ in data: how documents are packed, and what numbers the operands hold.

Cases with one shape and one set of options share a compiled program, so most have those of `DOCUMENTS` or `NUMBERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from portatrain.testing.kernels.attention_trials import FULL, Sizes, normal, trial
from portatrain.testing.kernels.trial import BOTH, FLOAT32, Draw, Rng, Trial

LENGTH = 129
DOCUMENTS: Sizes = (2, LENGTH, LENGTH, 4, 2, 16)
NUMBERS: Sizes = (2, 33, 33, 4, 2, 16)


def packed(*lengths: int) -> np.ndarray:
    """Return (LENGTH,): ids 1, 2, ... of documents with these lengths, of which some may be 0, then padding."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.concatenate([ids, np.zeros(LENGTH - len(ids), int)]).astype(np.int32)


def of_documents() -> list[Trial]:
    """Return the cases of packed documents."""
    rng, at = np.random.default_rng(18), np.arange(LENGTH, dtype=np.int32)
    rows: dict[str, Sequence[np.ndarray]] = {
        "one, whole and padded": (packed(129), packed(100)),
        "ragged": (packed(1, 40, 3, 60, 25), packed(17, 1, 1, 90)),
        "one token each": (at + 1, at[::-1] + 1),
        "two tokens each": (at // 2 + 1, (at + 1) // 2 + 1),
        "boundaries at 63, 64, 127, 128": (packed(63, 1, 63, 1, 1), packed(64, 64, 1)),
        "boundaries beside tiles": (packed(65, 64), packed(127, 2)),
        "one token at the end": (packed(128, 1), packed(1, 128)),
        "empty ones between": (packed(30, 0, 0, 50, 0, 49), packed(0, 0, 10, 0, 20)),
        "padding alone": (packed(), packed(1)),
        "padding in front": (packed(90)[::-1], packed(128)[::-1]),
        "ids 2^24 and 2^24 + 1": (2**24 + at // 50, 2**24 + at % 2),
        "ids around 2^31": (2**31 - 1 - at // 50, 2**31 - 1 - at // 64 * 128),
        "ids that are negative": (at // 40 - 2, -(at // 64) - 1),
        "ids that fall": (5 - at // 30, 130 - at),
        "ids that come again": (at % 2 + 1, at // 20 % 2 + 1),
        "scattered": (rng.integers(0, 4, LENGTH), rng.integers(0, 40, LENGTH)),
    }
    single = {"ids around 2^31", "ids that are negative", "ids that fall", "two tokens each", "boundaries beside tiles"}
    found = []
    for name, both in rows.items():
        ids, dtypes = np.stack(both).astype(np.int32), FLOAT32 if name in single else BOTH
        found.append(trial(f"documents, {name}", DOCUMENTS, segment_ids=ids, dtypes=dtypes))
    for name in ("ragged", "boundaries at 63, 64, 127, 128", "padding in front", "scattered"):
        ids = np.stack(rows[name]).astype(np.int32)
        found += [
            trial(f"full, documents, {name}", DOCUMENTS, FULL, segment_ids=ids, dtypes=FLOAT32),
            trial(f"window 20, documents, {name}", DOCUMENTS, {"window": 20}, segment_ids=ids, dtypes=FLOAT32),
            trial(f"soft-cap 1, documents, {name}", DOCUMENTS, {"softcap": 1.0}, segment_ids=ids, dtypes=FLOAT32),
        ]
    ids = np.stack(rows["ragged"]).astype(np.int32)
    found.append(trial("alibi, documents, ragged", DOCUMENTS, {"alibi": True}, segment_ids=ids, dtypes=FLOAT32))
    # Segments of queries and of keys that differ, some of which no key has.
    of_q, of_k = (
        np.array([[1] * 5 + [2] * 7 + [9] * 5, [3] * 17], np.int32),
        np.stack([packed(64, 60), packed(1, 2, 3)]),
    )
    for more, kinds in (({}, BOTH), ({"softcap": 1.0}, FLOAT32), ({"window": 3}, FLOAT32)):
        name = ", ".join(["full", *(f"{option} {value}" for option, value in more.items())])
        found.append(
            trial(
                f"{name}, pairs of documents, queries that see nothing",
                (2, 17, LENGTH, 4, 2, 16),
                {**FULL, **more},
                segment_ids=(of_q, of_k),
                dtypes=kinds,
            )
        )
    pair = np.stack([packed(50, 79), packed(129)])
    found.append(
        trial(
            "positions and pairs of documents",
            (2, 3, LENGTH, 4, 2, 16),
            positions=(np.array([[20, 49, 60], [0, 1, 128]], np.int32), at),
            segment_ids=(np.array([[1, 1, 2], [1, 1, 1]], np.int32), pair),
            dtypes=FLOAT32,
        )
    )
    return found


def _change(draw: Draw, change: Callable[[dict[str, np.ndarray]], Any]) -> Draw:
    def changed(rng: Rng) -> dict[str, np.ndarray]:
        found = draw(rng)
        change(found)
        return found

    return changed


def _times(**factors: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(x: dict[str, np.ndarray]) -> None:
        for name, factor in factors.items():
            x[name] *= factor

    return change


def _winner(x: dict[str, np.ndarray]) -> None:
    """Scores of 1e4 at the query's own key, and far below at every other: each key is a corner of a cube."""
    corners = np.sign(x["k"])
    for i in range(corners.shape[1]):  # the bits of the position, so that no two keys are equal
        corners[:, i, :, :6] = [1 if i >> bit & 1 else -1 for bit in range(6)]
    x["k"] = 64.0 * corners
    x["q"] = np.repeat(corners, x["q"].shape[2] // corners.shape[2], axis=2) * 40.0


def _equal(size: float) -> Callable[[dict[str, np.ndarray]], None]:
    """Scores that are all equal to size * size * D^0.5, exactly."""

    def change(x: dict[str, np.ndarray]) -> None:
        x["q"][:], x["k"][:] = size, size

    return change


def _steep(x: dict[str, np.ndarray]) -> None:
    """Scores that rise by 30 from key to key and reach 960: a running maximum changes at every key."""
    x["q"][:], x["k"][:] = 0.0, 0.0
    x["q"][..., 0], x["k"][..., 0] = 4.0, 30.0 * np.arange(x["k"].shape[1])[:, None]


def _falling(x: dict[str, np.ndarray]) -> None:
    """Scores that fall by 2 from key to key: the last weights are 1e-28."""
    x["q"][:], x["k"][:] = 0.0, 0.0
    x["q"][..., 0], x["k"][..., 0] = 4.0, -2.0 * np.arange(x["k"].shape[1])[:, None]


def _one_sign(x: dict[str, np.ndarray]) -> None:
    """Nearly equal weights, and sums in which no terms cancel: a sum in a short format goes astray."""
    x["q"] *= 0.1
    x["v"], x["g"] = np.abs(x["v"]), np.abs(x["g"])


def _hidden(x: dict[str, np.ndarray]) -> None:
    """The last 13 keys and values are huge; the documents hide them."""
    x["k"][:, 20:], x["v"][:, 20:] = 1e9 * x["k"][:, 20:], 1e9 * x["v"][:, 20:]
    x["g"][:, 20:] = 0.0


def of_numbers() -> list[Trial]:
    """Return the cases of large, small, equal and zero numbers."""
    plain = normal(NUMBERS)
    changes: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], tuple[str, ...]]] = {
        "scores of 1e4, one key wins": (_winner, BOTH),
        "scores of 1e4, all equal": (_equal(50.0), BOTH),
        "scores of -1e4, all equal": (lambda x: (_equal(50.0)(x), _times(k=-1.0)(x)), BOTH),
        "scores that rise by 30 a key": (_steep, BOTH),
        "scores that fall by 2 a key": (_falling, BOTH),
        "scores of 50": (_times(q=4.0, k=4.0), BOTH),
        "queries 0": (_times(q=0.0), BOTH),
        "keys 0": (_times(k=0.0), FLOAT32),
        "values 0": (_times(v=0.0), FLOAT32),
        "all 0": (_times(q=0.0, k=0.0, v=0.0, g=0.0), BOTH),
        "gradient 0": (_times(g=0.0), FLOAT32),
        "values of 1e-30": (_times(v=1e-30), BOTH),
        "gradients of 1e-30": (_times(g=1e-30), BOTH),
        "values of 1e15": (_times(v=1e15), BOTH),
        "queries of 1e-20, keys of 1e20": (_times(q=1e-20, k=1e20), BOTH),
        "denormals": (_times(q=1e-40, k=1e-40, v=1e-40), BOTH),
        "values of 1": (lambda x: x.update(v=np.ones_like(x["v"])), BOTH),
    }
    found = [trial(name, NUMBERS, draw=_change(plain, c), dtypes=kinds) for name, (c, kinds) in changes.items()]
    found.append(
        trial("full, scores of 1e4, one key wins", NUMBERS, FULL, draw=_change(plain, _winner), dtypes=FLOAT32)
    )
    long = (1, 384, 384, 2, 1, 16)
    found.append(trial("numbers of one sign, full, 384 tokens", long, FULL, draw=_change(normal(long), _one_sign)))
    capped = {"softcap": 30.0}
    found += [
        trial("scores of 1e4, soft-cap 30", NUMBERS, capped, draw=_change(plain, _winner)),
        trial(
            "scores of 1e4, all equal, soft-cap 30", NUMBERS, capped, draw=_change(plain, _equal(50.0)), dtypes=FLOAT32
        ),
        trial("all 0, soft-cap 30", NUMBERS, capped, draw=_change(plain, _times(q=0.0, k=0.0)), dtypes=FLOAT32),
    ]
    ids = np.where(np.arange(33) < 20, 1, 2).astype(np.int32)
    for options in ({}, FULL):
        said = "full, " if options else ""
        hidden = _change(plain, _hidden)
        found.append(
            trial(
                f"{said}documents, huge keys hidden",
                NUMBERS,
                options,
                draw=hidden,
                segment_ids=np.stack([ids, ids]),
                dtypes=FLOAT32 if options else BOTH,
            )
        )
    return found
