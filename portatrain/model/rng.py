"""Counter-based random numbers on the host: initial weights, permutations, and random words by index.

Every function is a pure function of (seed, name, index): it has no state and depends on no order of calls and no
device. The generator is NumPy's Philox4x64-10 [1]. Word ``k`` of a key is ``random_raw(...)[k]`` of
``numpy.random.Philox(key=key)``, which is word ``k mod 4`` of the cipher at counter ``k div 4 + 1``. Any word can
therefore be computed without the ones before it.

A key is the first 128 bits, two little-endian 64-bit words, of the SHA-256 of::

    domain  0x00  seed in decimal ASCII  0x00  name in UTF-8

with the domain ``portatrain.init.1`` for initial weights, ``portatrain.words.1`` for `words` and
``portatrain.permutation.1`` for `Permutation`.

The bits are the same on every machine. Hashing and Philox are integer arithmetic, and the normal quantile uses only
float64 ``+ - * /``, whose results IEEE 754 defines to the last bit. A fused multiply-add would round once instead of
twice; to prevent it, every operation is a separate NumPy call that stores its result. No libm function is called.

[1] Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from portatrain.errors import UserError

TRUNCATED_STD = 0.8796256610342398
"""Standard deviation of the standard normal cut at -2 and 2: sqrt(1 - 4 phi(2) / (Phi(2) - Phi(-2)))."""

# x(u) = q P(q^2) / Q(q^2) with q = u - 1/2 is the quantile of the standard normal cut at -2 and 2, which is
# Phi^-1(Phi(-2) + u (Phi(2) - Phi(-2))). P and Q are the minimax pair of degree (6, 6) for the relative error on
# 0 <= q^2 <= 1/4, found by the Remez exchange algorithm in 60 decimal digits and rounded to float64. The largest
# relative error is 3.3e-11, the largest absolute error 6.6e-11 (6.8e-11 if computed in float64): a thousandth of half
# a unit in the last place of the float32 result. tests/unit/test_rng.py compares it with statistics.NormalDist.
_P = (
    2.392576026721675839711,
    -32.40637547594301944651,
    171.7094711540993965403,
    -444.5891424827937748364,
    567.1860986504556721869,
    -305.2047097925072748111,
    36.93801711637268484553,
)
_Q = (
    1.0,
    -14.49862410966035097359,
    83.68879015077248416477,
    -242.6775231608341052312,
    364.2217660852368736193,
    -256.8177304800414647467,
    60.06474929194163082786,
)

_BLOCK = 1 << 16  # values per pass: 2.5 MiB of buffers fit in cache and outweigh the cost of 35 calls
_SHORT = 160  # words of a run below which the vectorised cipher is faster than a NumPy generator
_MAX_INDEX = 1 << 62


def key_of(domain: str, seed: int, name: str) -> np.ndarray:
    """Return the Philox key, (2,) uint64, of (seed, name) in ``domain``, encoded as the top of this file says."""
    text = b"\0".join((domain.encode(), str(operator.index(seed)).encode(), name.encode(errors="surrogateescape")))
    return np.frombuffer(hashlib.sha256(text).digest()[:16], "<u8").astype(np.uint64)


class _Stream:
    """Random access to the words of one key. Do not share it between threads."""

    def __init__(self, key: np.ndarray) -> None:
        self.key = key
        self._generator = np.random.Philox(key=key)
        self._state = self._generator.state

    def read(self, start: int, count: int) -> np.ndarray:
        """Return words [start, start + count), (count,) uint64."""
        block, skip = divmod(start, 4)
        self._state["state"]["counter"][0] = block
        self._generator.state = self._state
        return self._generator.random_raw(skip + count)[skip:]

    def read_many(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Return words [start, start + count) for every start, (len(starts), count) uint64. Fast for small counts."""
        blocks = -(-(count + 3) // 4) if count > 1 else 1
        first = starts.astype(np.uint64) >> np.uint64(2)
        index = (first[:, None] + np.arange(blocks, dtype=np.uint64)).ravel()
        drawn = philox(index, self.key).reshape(len(starts), 4 * blocks)
        skip = (starts & 3)[:, None] + np.arange(count)
        return np.take_along_axis(drawn, skip, axis=1)


def philox(block: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return blocks of NumPy's Philox4x64-10 stream by their indices: (n,) uint64 -> (n, 4) uint64.

    The words are those of ``numpy.random.Philox(key=key).random_raw``. Each block is computed on its own, so scattered
    blocks cost no more than neighbouring ones.
    """
    zero = np.zeros(1, np.uint64)
    c0, c1, c2, c3 = block + np.uint64(1), zero, zero, zero
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        hi0, lo0 = _multiply(0xD2E7470EE14C6C93, c0)
        hi1, lo1 = _multiply(0xCA5A826395121157, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ np.uint64(k0), lo1, hi0 ^ c3 ^ np.uint64(k1), lo0
        k0 = (k0 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        k1 = (k1 + 0xBB67AE8584CAA73B) & 0xFFFFFFFFFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1)


def _multiply(a: int, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the high and the low word of the 128-bit products ``a * b``, computed from 32-bit halves."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1 = np.uint64(a & 0xFFFFFFFF), np.uint64(a >> 32)
    b0, b1 = b & low, b >> half
    cross = a1 * b0 + (a0 * b0 >> half)  # below 2^64: (2^32 - 1)^2 + 2^32 - 1
    other = a0 * b1 + (cross & low)
    return a1 * b1 + (cross >> half) + (other >> half), b * np.uint64(a)


def words(seed: int, stream: str, start: int, count: int) -> np.ndarray:
    """Return words [start, start + count) of the stream named ``stream``, (count,) uint64.

    Raises:
        ValueError: the range is not within [0, 2^62).
    """
    if start < 0 or count < 0 or start + count > _MAX_INDEX:
        raise ValueError(f"words [{start}, {start} + {count}) are not within [0, 2^62)")
    return _Stream(key_of("portatrain.words.1", seed, stream)).read(start, count)


def truncated_normal(
    seed: int,
    name: str,
    shape: Sequence[int],
    *,
    std: float,
    offset: Sequence[int] | None = None,
    box: Sequence[int] | None = None,
    threads: int = 1,
) -> np.ndarray:
    """Return the initial weights of a box of the logical tensor ``name``: a normal distribution cut at two sigma.

    The value with flat row-major index ``k`` in the logical tensor depends on word ``k`` of the key of (seed, name):
    ``u = (word >> 11) * 2^-53 + 2^-54``, then the quantile of the cut normal at ``u``, times ``std / TRUNCATED_STD``,
    rounded to float32. A box therefore has the same values however the tensor is sharded.

    Args:
        shape: the whole logical tensor, at most 2^62 elements.
        std: standard deviation of the values after the cut.
        offset, box: first index and extent of the box along each axis; default: the whole tensor.
        threads: number of threads; the values do not depend on it.

    Returns:
        float32 array of shape ``box``.

    Raises:
        UserError: ``std`` is negative or not finite, or the box is not inside the tensor.
    """
    shape, offset, box = _checked(name, shape, offset, box)
    if not (math.isfinite(std) and std >= 0):
        raise UserError(
            f"initial standard deviation of {name}",
            expected="a finite number of at least 0",
            got=repr(std),
            do="Correct the parameter's init=, or the sizes from which it is computed.",
        )
    out = np.empty(box, np.float32)
    if not out.size:
        return out
    work = _Work(shape, offset, box)
    key, scale = key_of("portatrain.init.1", seed, name), std / TRUNCATED_STD
    threads = max(1, min(threads, work.items))
    if threads == 1:
        work.fill(out.reshape(-1), _Stream(key), scale, 0, work.items)
        return out
    from concurrent.futures import ThreadPoolExecutor

    cuts = [work.items * t // threads for t in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(work.fill, out.reshape(-1), _Stream(key), scale, lo, hi) for lo, hi in itertools.pairwise(cuts)
        ]
        for job in jobs:
            job.result()
    return out


def _checked(
    name: str, shape: Sequence[int], offset: Sequence[int] | None, box: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shape = tuple(operator.index(n) for n in shape)
    offset = (0,) * len(shape) if offset is None else tuple(operator.index(n) for n in offset)
    if box is None:
        box = tuple(n - o for n, o in zip(shape, offset, strict=True))
    box = tuple(operator.index(n) for n in box)
    inside = len(shape) == len(offset) == len(box) and all(
        o >= 0 and b >= 0 and o + b <= n for n, o, b in zip(shape, offset, box, strict=True)
    )
    if not inside or math.prod(shape) > _MAX_INDEX:
        raise UserError(
            f"box of {name}",
            expected=f"a box inside a tensor of shape {shape} with at most 2^62 elements",
            got=f"offset {offset} and extent {box}",
            do="Give offset and box one number per axis, with offset + box inside the shape.",
        )
    return shape, offset, box


class _Work:
    """A box as runs of nearby words, divided into items of about `_BLOCK` values each.

    Axes that are contiguous in memory are merged first. The inner axes form the *run*, the same pattern of words at
    every start: these are the axes with gaps so small that drawing the unused words is faster than skipping them. The
    outer axes give the starts. An item is several whole runs, or some rows of one long run; both are contiguous in the
    output.
    """

    def __init__(self, shape: tuple[int, ...], offset: tuple[int, ...], box: tuple[int, ...]) -> None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        self.base = sum(o * s for o, s in zip(offset, strides, strict=True))
        axes: list[tuple[int, int]] = []  # (extent, stride in words)
        for n, s in zip(box, strides, strict=True):
            if n == 1:
                continue
            if axes and axes[-1][1] == n * s:
                axes[-1] = (axes[-1][0] * n, s)
            else:
                axes.append((n, s))
        split = len(axes)
        span = 1
        while split:
            n, s = axes[split - 1]
            # An unused word takes 4.5 ns, a jump 3 us, and a word by the vectorised cipher about 50 ns.
            if s - span > min(600, 10 * (span + 3)) or span > _BLOCK:
                break
            span += (n - 1) * s
            split -= 1
        self.outer, self.run = axes[:split], axes[split:]
        self.runs = math.prod(n for n, _ in self.outer)
        self.rows, self.stride = self.run[0] if self.run else (1, 1)
        self.row_shape = tuple(n for n, _ in self.run[1:])
        self.row_values = math.prod(self.row_shape)
        self.row_span = 1 + sum((n - 1) * s for n, s in self.run[1:])
        self.rows_a_draw = max(1, (2 * _BLOCK - self.row_span) // self.stride + 1)
        self.rows_an_item = min(self.rows, max(1, _BLOCK // self.row_values))
        if self.rows_an_item == self.rows:
            self.runs_an_item = max(1, _BLOCK // (self.rows * self.row_values))
            self.items_a_run, self.items = 1, -(-self.runs // self.runs_an_item)
        else:
            self.runs_an_item = 1
            self.items_a_run = -(-self.rows // self.rows_an_item)
            self.items = self.items_a_run * self.runs

    def fill(self, out: np.ndarray, stream: _Stream, scale: float, first: int, last: int) -> None:
        """Write items [first, last) into ``out``, the box flattened."""
        most = self.runs_an_item * self.rows_an_item * self.row_values
        picked = np.empty(most, np.uint64)
        buffers = np.empty((4, most), np.float64)
        a_run = self.rows * self.row_values
        for item in range(first, last):
            run, part = divmod(item, self.items_a_run)
            run *= self.runs_an_item
            runs = min(self.runs_an_item, self.runs - run)
            row = part * self.rows_an_item
            rows = min(self.rows_an_item, self.rows - row)
            starts = self._starts(run, runs) + row * self.stride
            count = rows * self.row_values
            drawn = picked[: runs * count].reshape(runs, rows, *self.row_shape)
            self._draw(drawn, stream, starts, rows)
            at = run * a_run + row * self.row_values
            _quantile(picked[: runs * count], buffers, scale, out[at : at + runs * count])

    def _starts(self, run: int, runs: int) -> np.ndarray:
        starts = np.full(runs, self.base, np.int64)
        if self.outer:
            index = np.unravel_index(np.arange(run, run + runs), tuple(n for n, _ in self.outer))
            for i, (_, s) in zip(index, self.outer, strict=True):
                starts += i * s
        return starts

    def _draw(self, into: np.ndarray, stream: _Stream, starts: np.ndarray, rows: int) -> None:
        span = (rows - 1) * self.stride + self.row_span
        strides = tuple(8 * s for _, s in self.run) or (8,)
        if span < _SHORT and len(starts) > 1:
            drawn = stream.read_many(starts, span)
            into[...] = as_strided(drawn, into.shape, (drawn.strides[0], *strides))
            return
        for i, start in enumerate(starts.tolist()):
            for row in range(0, rows, self.rows_a_draw):
                part = into[i, row : row + self.rows_a_draw]
                span = (len(part) - 1) * self.stride + self.row_span
                part[...] = as_strided(stream.read(start + row * self.stride, span), part.shape, strides)


def _quantile(word: np.ndarray, buffers: np.ndarray, scale: float, out: np.ndarray) -> None:
    """Convert words (n,) uint64 to values (n,) float32 in ``out``. Overwrites ``word`` and ``buffers``.

    The order of operations is part of the definition.
    """
    q, r, p, d = (b[: len(word)] for b in buffers)
    np.right_shift(word, np.uint64(11), out=word)
    np.copyto(q, word.view(np.int64))
    q *= 2.0**-53
    q += 2.0**-54  # u, rounded to nearest even from 54 bits
    q -= 0.5
    np.multiply(q, q, out=r)
    np.multiply(r, _P[6], out=p)
    np.multiply(r, _Q[6], out=d)
    for c in _P[5:0:-1]:
        p += c
        p *= r
    for c in _Q[5:0:-1]:
        d += c
        d *= r
    p += _P[0]
    d += _Q[0]
    p /= d
    p *= q
    p *= scale
    out[...] = p


class Permutation:
    """A bijection on [0, size) in O(1) memory, determined by (seed, name).

    A generalised Feistel network [2] over pairs (l, r) in Z_a x Z_b, with a = ceil(sqrt(size)) and
    b = ceil(size / a): even rounds add F(r) to l modulo a, odd rounds add F(l) to r modulo b. F is the splitmix64
    finaliser of the half xor a round key from Philox. A value outside [0, size) is permuted again until it is inside;
    since a b exceeds size by less than a, this happens to fewer than one value in sqrt(size).

    Args:
        size: from 1 to 2^62.
        seed, name: select the permutation.

    Raises:
        ValueError: another size.

    [2] Black, Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, sections 3 and 5.
    """

    ROUNDS = 16

    def __init__(self, size: int, seed: int, name: str) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"a permutation has from 1 to 2^62 elements, got {size}")
        self.size = size
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        key = key_of("portatrain.permutation.1", seed, name)
        self._keys = _Stream(key).read(0, self.ROUNDS)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Return the images of ``index``, integers in [0, size) of any shape, as int64 of that shape.

        Raises:
            IndexError: an index outside [0, size).
        """
        index = np.asarray(index)
        if index.size and not (int(index.min()) >= 0 and int(index.max()) < self.size):
            raise IndexError(f"indices {index.min()} to {index.max()} are not all in [0, {self.size})")
        out = self._once(index.astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(out >= np.uint64(self.size))
        while outside.size:
            out[outside] = self._once(out[outside])
            outside = outside[out[outside] >= np.uint64(self.size)]
        return out.astype(np.int64).reshape(index.shape)

    def _once(self, x: np.ndarray) -> np.ndarray:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left: np.ndarray = x // b
        right: np.ndarray = x % b
        for i, key in enumerate(self._keys):
            if i % 2 == 0:
                left = (left + _mix(right ^ key) % a) % a
            else:
                right = (right + _mix(left ^ key) % b) % b
        return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finaliser (Steele, Lea, Flood, OOPSLA 2014) of x: a bijection on 64-bit words."""

    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
