"""The evidence of a referee: gradients of parts of a batch, digests, votes of devices, and sums over processes."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends.base import Arrays, Backend
from portatrain.checkpoint.fingerprints import added_up
from portatrain.checkpoint.shared_reads import consecutive, owners_of

Vote = tuple[int, int]
"""(position of a device, digest of what it computed)."""
SMALL = 1e-3
"""A tensor whose norm is below this share of the largest one is compared relative to that share, as in the continuity
check."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one device computed for one part of a batch: mean loss, weight, and gradients of the mean loss by name."""

    loss: float
    weight: float
    grads: Arrays

    @property
    def digest(self) -> int:
        """A hash of all bits, never 0."""
        found = hashlib.blake2b(np.array([self.loss, self.weight], np.float64).tobytes(), digest_size=8)
        for _, grad in sorted(self.grads.items()):
            found.update(np.ascontiguousarray(grad).tobytes())
        return int.from_bytes(found.digest(), "little") | 1


def part_of(batch: Mapping[str, np.ndarray], part: int, parts: int) -> dict[str, np.ndarray]:
    """Return part number `part` of `parts` of the rows of every microbatch; arrays are (microbatches, rows, ...)."""
    size = next(iter(batch.values())).shape[1] // parts
    return {k: v[:, part * size : (part + 1) * size] for k, v in batch.items()}


def parts_for(rows: int, devices: int) -> int:
    """Return into how many equal parts a microbatch of `rows` is cut for `devices` devices: as many as divide it."""
    return max(n for n in range(1, devices + 1) if rows % n == 0)


def accused(votes: Iterable[Vote]) -> tuple[set[int], bool]:
    """Return (the devices that differ from the rest, whether more than half of the votes are equal).

    Without such a majority every device with a vote is accused. Nobody is if all votes are equal.
    """
    votes = list(votes)
    counts = Counter(digest for _, digest in votes)
    most, many = counts.most_common(1)[0]
    if 2 * many > len(votes):
        return {device for device, digest in votes if digest != most}, True
    return {device for device, _ in votes}, False


def distance(one: Arrays, other: Arrays) -> float:
    """Return the largest relative difference of a tensor, by 2-norms; infinity if only one side is finite."""
    norms = {name: _norm(x) for name, x in other.items()}
    if not all(math.isfinite(norm) for norm in norms.values()):
        return 0.0 if not all(math.isfinite(_norm(x)) for x in one.values()) else math.inf
    least = SMALL * max(norms.values(), default=0.0)
    found = 0.0
    for name, x in other.items():
        apart, size = _norm(np.asarray(one[name], np.float64) - x), max(norms[name], least)
        found = max(found, 0.0 if apart == 0 else apart / size if size and math.isfinite(apart) else math.inf)
    return found


def relative(one: float, other: float) -> float:
    """Return the relative difference of two numbers: 0 if neither is finite, infinity if one is not."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return 0.0 if not (math.isfinite(one) or math.isfinite(other)) else math.inf
    return 0.0 if one == other else abs(one - other) / max(abs(one), abs(other))


def whole_batch(backend: Backend, parts: Sequence[Evidence]) -> tuple[float, float]:
    """Return (mean loss, norm of the gradient) of the batch whose parts all processes have together.

    Sums over processes are of whole numbers, so that every process has the same bits.
    """
    names = sorted(parts[0].grads) if parts else []
    sizes = [parts[0].grads[name].size for name in names]
    finite = all(math.isfinite(p.loss) and all(np.isfinite(g).all() for g in p.grads.values()) for p in parts)
    if backend.agree(int(not finite)):
        return math.nan, math.nan
    longest = backend.agree(sum(sizes))  # a process may have no part
    sums = np.zeros(longest + 2)
    for p in parts:
        flat = np.concatenate([np.ravel(p.grads[name]) for name in names]).astype(np.float64)
        sums[:2] += p.loss * p.weight, p.weight
        sums[2:] += p.weight * flat
    for at in (slice(0, 2), slice(2, None)):
        sums[at] = summed(backend, sums[at])
    weight = sums[1]
    return float(sums[0] / weight), float(np.sqrt(np.sum(np.square(sums[2:])))) / float(weight)


def summed(backend: Backend, x_N: np.ndarray) -> np.ndarray:
    """Return the sums over all processes of finite float64 numbers, to 2^-50 of the largest one."""
    if backend.processes == 1:
        return x_N
    largest = backend.agree(int(math.frexp(float(np.max(np.abs(x_N), initial=0.0)))[1]))
    shift = 61 - backend.processes.bit_length() - largest
    words_N = np.rint(np.ldexp(x_N, shift)).astype(np.int64)
    return np.ldexp(added_up(backend, words_N.view(np.uint64)).view(np.int64).astype(np.float64), -shift)


def from_all(backend: Backend, mine: Mapping[int, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Return uint64 words of `shape` whose rows, by number, come from the processes that have them."""
    words = np.zeros(shape, np.uint64)
    for row, values in mine.items():
        words[row] = values
    return added_up(backend, words.reshape(-1)).reshape(shape)


def owners(backend: Backend, devices: int) -> list[int]:
    """Return the process of every position of the mesh."""
    return list(owners_of(backend) or consecutive(devices, backend.processes))


def _norm(x: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64).reshape(-1)))
