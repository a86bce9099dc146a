"""portatrain.model.rng: frozen bits, an oracle in plain Python integers and floats, and statistics."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portatrain.errors import UserError
from portatrain.model import rng
from portatrain.model.rng import Permutation, truncated_normal, words

MASK = 2**64 - 1


def philox_block(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 of the paper, one block, in Python integers."""
    c = [counter >> (64 * i) & MASK for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k0, p1 & MASK, (p0 >> 64) ^ c[3] ^ k1, p0 & MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return c


def key_by_hand(domain: bytes, seed: int, name: str) -> tuple[int, int]:
    digest = hashlib.sha256(domain + b"\0" + str(seed).encode() + b"\0" + name.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def value_by_hand(seed: int, name: str, k: int, std: float) -> np.float32:
    """One initial weight, in Python integers and floats, in the documented order of operations."""
    word = philox_block(k // 4 + 1, key_by_hand(b"portatrain.init.1", seed, name))[k % 4]
    q = ((word >> 11) * 2.0**-53 + 2.0**-54) - 0.5
    r = q * q
    p, d = r * rng._P[6], r * rng._Q[6]
    for i in range(5, 0, -1):
        p, d = (p + rng._P[i]) * r, (d + rng._Q[i]) * r
    return np.float32((p + rng._P[0]) / (d + rng._Q[0]) * q * (std / rng.TRUNCATED_STD))


def hex32(values: np.ndarray, count: int = 6) -> str:
    return values.ravel()[:count].astype(">f4").tobytes().hex()


GOLDEN_WEIGHTS = [
    # seed, name, shape, std, offset, box, the first values as big-endian float32
    (0, "w", (4,), 0.02, None, None, "bcb2c44e3cf57c003c3229eb3cf465cb"),
    (*(1, "params/blocks/attn/wq", (2, 3, 5), 1.0, None, None), "bf26a790bf90bb51bf5c43563d535367bdf06dc23fef6218"),
    (2**63 - 1, "é", (7, 1000, 3), 0.5, (6, 990, 1), (1, 2, 2), "3ed064da3ed2715a3d462e073ec27327"),
    (*(-5, "big", (2**30, 2**30), 1 / 32, (2**30 - 2, 2**30 - 2), (2, 2)), "ba017f063d3d9fafbb59ed90bc82d926"),
]


@pytest.mark.parametrize(("seed", "name", "shape", "std", "offset", "box", "want"), GOLDEN_WEIGHTS)
def test_weights_never_change(seed, name, shape, std, offset, box, want):
    assert hex32(truncated_normal(seed, name, shape, std=std, offset=offset, box=box)) == want


@pytest.mark.parametrize(
    ("seed", "stream", "start", "want"),
    [
        (0, "s", 0, [0x0394734BA5DC82CA, 0x179AF4CE9DD3C8BC, 0x91B4298F882AFD79]),
        (7, "data", 2**61 + 1, [0x1045FC0E4D7B0CA1, 0x13566CE908E71DE5, 0x8413927FD7BDDA03]),
    ],
)
def test_words_never_change(seed, stream, start, want):
    assert words(seed, stream, start, 3).tolist() == want
    key = key_by_hand(b"portatrain.words.1", seed, stream)
    assert want == [philox_block(k // 4 + 1, key)[k % 4] for k in range(start, start + 3)]


@pytest.mark.parametrize(
    ("size", "seed", "name", "want"),
    [
        (10, 0, "p", [0, 2, 9, 6, 3, 8, 5, 7, 4, 1]),
        (1000003, 1, "q", [659162, 956563, 254277, 310448, 19443, 544834, 725832, 589057]),
        (2**62, 5, "r", [987858293430538279, 2649643645480406105, 2749506444979988642]),
    ],
)
def test_permutations_never_change(size, seed, name, want):
    assert Permutation(size, seed, name)(np.arange(len(want))).tolist() == want


def test_philox_answers_as_published():
    # Random123's kat_vectors: philox4x64 10, counter 0, key 0. Counter 0 is block -1 of NumPy's stream.
    got = rng.philox(np.array([MASK], np.uint64), np.zeros(2, np.uint64))[0]
    want = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert got.tolist() == want == philox_block(0, (0, 0))


@pytest.mark.parametrize("key", [(0, 0), (1, 2), (MASK, MASK), (0x0123456789ABCDEF, 0xFEDCBA9876543210)])
def test_three_philoxes_agree(key):
    packed = np.array(key, np.uint64)
    numpys = np.random.Philox(key=packed).random_raw(400)
    assert np.array_equal(rng.philox(np.arange(100, dtype=np.uint64), packed).ravel(), numpys)
    assert numpys[:40].tolist() == [w for b in range(10) for w in philox_block(b + 1, key)]
    far = 2**58 - 3
    numpys = np.random.Philox(key=packed, counter=[far, 0, 0, 0]).random_raw(8)
    assert np.array_equal(rng.philox(np.array([far, far + 1], np.uint64), packed).ravel(), numpys)


@pytest.mark.parametrize("start", [0, 1, 5, 2**40 - 1, 2**62 - 9])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 9])
def test_words_by_any_cut(start, count):
    whole = words(3, "cut", start, 9)
    assert np.array_equal(words(3, "cut", start, count), whole[:count])
    assert np.array_equal(words(3, "cut", start + count, 9 - count), whole[count:])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 150])
def test_many_short_reads(count):
    stream = rng._Stream(np.array([5, 6], np.uint64))
    starts = np.array([0, 1, 2, 3, 4, 7, 997, 2**40 + 1, 2**60 + 3])
    assert stream.read_many(starts, count).tolist() == [stream.read(s, count).tolist() for s in starts.tolist()]


def test_weights_agree_with_the_oracle():
    shape = (9, 11)
    got = truncated_normal(42, "a/b", shape, std=0.3).ravel()
    assert got.tolist() == [value_by_hand(42, "a/b", k, 0.3) for k in range(99)]
    big = (2**20, 2**20, 2**20)
    at = (2**20 - 1, 17, 2**20 - 3)
    got = truncated_normal(42, "a/b", big, std=0.3, offset=at, box=(1, 2, 2)).ravel()
    flat = [(at[0] * 2**20 + at[1] + i) * 2**20 + at[2] + j for i in (0, 1) for j in (0, 1)]
    assert got.tolist() == [value_by_hand(42, "a/b", k, 0.3) for k in flat]


# Shapes whose boxes reach every path: merged axes, drawn gaps, short runs, long runs, rows of one long run.
SHAPES = [
    (30,),
    (1, 1),
    (7, 5, 3),
    (2, 3, 4, 5),
    (40, 1, 33),
    (3, 200, 70),
    (5, 2000),
    (60, 1501),
    (9, 5, 2501),
    (2, 2, 3000),
    (200_003,),
]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_box_by_itself(data):
    shape = data.draw(st.sampled_from(SHAPES))
    box, offset = [], []
    for n in shape:
        offset.append(data.draw(st.integers(0, n - 1)))
        box.append(data.draw(st.integers(0, n - offset[-1])))
    threads = data.draw(st.integers(1, 3))
    whole = _whole(shape)
    with pytest.MonkeyPatch.context() as patch:
        # Small blocks cut a small box into as many items and draws as the real one cuts a large box.
        patch.setattr(rng, "_BLOCK", data.draw(st.sampled_from([8, 64, 1 << 16])))
        got = truncated_normal(9, "t", shape, std=1.0, offset=offset, box=box, threads=threads)
    want = whole[tuple(slice(o, o + b) for o, b in zip(offset, box, strict=True))]
    assert got.dtype == np.float32
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()


_WHOLE: dict[tuple[int, ...], np.ndarray] = {}


def _whole(shape: tuple[int, ...]) -> np.ndarray:
    """The whole tensor by the plainest path: one run of NumPy's own words, transformed at once."""
    if shape not in _WHOLE:
        size = math.prod(shape)
        word = np.random.Philox(key=rng.key_of("portatrain.init.1", 9, "t")).random_raw(size)
        out = np.empty(size, np.float32)
        rng._quantile(word, np.empty((4, size)), 1.0 / rng.TRUNCATED_STD, out)
        _WHOLE[shape] = out.reshape(shape)
    return _WHOLE[shape]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("box", [(64, 4096), (64, 1), (64, 100), (64, 300), (40, 2500)])
def test_large_boxes_and_threads(box, threads):
    shape = (64, 4096)
    got = truncated_normal(9, "t", shape, std=1.0, offset=(0, 0), box=box, threads=threads)
    assert got.tobytes() == _whole(shape)[: box[0], : box[1]].tobytes()


@pytest.mark.parametrize("block", [8, 64, 1 << 16])
@pytest.mark.parametrize(
    ("shape", "offset", "box"),
    [
        ((40, 1, 33), (0, 0, 3), (40, 1, 2)),  # gaps drawn, one draw a row or many
        ((40, 7, 5), (1, 2, 1), (39, 4, 3)),  # rows of several axes
        ((70_000, 12), (9, 5), (69_000, 2)),  # several items and draws at the real block
        ((300, 1501), (0, 3), (300, 3)),  # short runs by the vectorised cipher
        ((30, 1501), (0, 3), (30, 200)),  # runs by NumPy's generator
    ],
)
def test_every_way_of_cutting_the_work(monkeypatch, block, shape, offset, box):
    want = _whole(shape)[tuple(slice(o, o + b) for o, b in zip(offset, box, strict=True))]
    monkeypatch.setattr(rng, "_BLOCK", block)
    got = truncated_normal(9, "t", shape, std=1.0, offset=offset, box=box)
    assert got.tobytes() == want.tobytes()


def test_quantile_against_the_standard_library():
    # u from the tails, the middle and evenly, as words; the oracle is NormalDist (AS241, about 1e-16).
    u = np.concatenate((np.linspace(0, 1, 4001)[1:-1], 2.0 ** -np.arange(2, 53), 1 - 2.0 ** -np.arange(2, 53)))
    word = (u * 2.0**53).astype(np.uint64) << np.uint64(11)
    exact_u = (word >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54
    tail = 0.5 * math.erfc(math.sqrt(2))
    normal = statistics.NormalDist()
    want = np.array([normal.inv_cdf(tail + v * (1 - 2 * tail)) for v in exact_u])
    got = np.empty(len(u), np.float64)
    rng._quantile(word, np.empty((4, len(u))), 1.0, got)
    # The greatest relative error of the exact P / Q, plus what float64 adds: two Horner schemes of degree 6
    # (Higham, Accuracy and Stability, 5.1: 12 roundings, and at most 6 more of the argument q^2, times the
    # sum of moduli), three operations after them, and the oracle's own argument, by the slope of its quantile.
    r = (exact_u - 0.5) ** 2
    moduli = sum(np.polyval(np.abs(c[::-1]), r) / np.abs(np.polyval(c[::-1], r)) for c in (rng._P, rng._Q))
    slope = math.sqrt(2 * math.pi) * np.exp(want**2 / 2)
    bound = np.abs(want) * (3.27e-11 + 2.0**-53 * (18 * moduli + 3)) + 2.0**-53 * slope
    assert (np.abs(got - want) <= bound).all()
    assert bound.max() < 2.0**-24 / 100  # nothing beside half a unit in the last place of a float32


@pytest.mark.parametrize(("top", "q"), [(2**52 - 1, -(2.0**-54)), (2**52, 0.0), (2**52 + 1, 2.0**-52)])
def test_the_middle_shows_how_u_is_rounded(top, q):
    # Ties to even: 2^52 2^-53 + 2^-54 is 1/2, and the next u is 1/2 + 2^-52.
    got = np.empty(1, np.float32)
    rng._quantile(np.array([top << 11 | 7], np.uint64), np.empty((4, 1)), 1.0, got)
    assert got[0] == np.float32(rng._P[0] * q)


def test_truncated_std_is_that_of_the_distribution():
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    assert math.isclose(rng.TRUNCATED_STD, math.sqrt(1 - 4 * density / math.erf(math.sqrt(2))), rel_tol=1e-15)


def test_distribution_of_weights():
    n = 1_000_000
    x = truncated_normal(0, "dist", (n,), std=0.5).astype(np.float64)
    bound = 2 * 0.5 / rng.TRUNCATED_STD
    assert np.abs(x).max() <= np.float32(bound)
    assert abs(x.mean()) < 5 * 0.5 / math.sqrt(n)
    # The variance of x^2 is below that of the normal, 2 std^4, hence of the std below std / sqrt(2 n).
    assert abs(x.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * n)
    tail = 0.5 * math.erfc(math.sqrt(2))
    cuts = [statistics.NormalDist().inv_cdf(tail + i / 100 * (1 - 2 * tail)) for i in range(1, 100)]
    counts = np.histogram(x * rng.TRUNCATED_STD / 0.5, [-3, *cuts, 3])[0]
    assert _chi_square_sigma(counts, n / 100) < 5


def _chi_square_sigma(counts: np.ndarray, expected: float) -> float:
    """How many standard deviations chi^2 lies from its mean."""
    freedom = len(counts) - 1
    return abs(float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


def test_names_and_seeds_make_other_values():
    base = truncated_normal(0, "a", (64,), std=1.0)
    for seed, name in [(1, "a"), (0, "b"), (0, ""), (-1, "a"), (10, "a")]:
        assert not np.intersect1d(base, truncated_normal(seed, name, (64,), std=1.0)).size


@pytest.mark.parametrize(
    ("shape", "std", "offset", "box", "match"),
    [
        ((4, 4), -1.0, None, None, "at least 0, got -1.0"),
        ((4, 4), math.nan, None, None, "got nan"),
        ((4, 4), 1.0, (3, 0), (2, 4), "inside the shape"),
        ((4, 4), 1.0, (0, -1), (2, 2), "inside the shape"),
        ((4, 4), 1.0, (0, 0), (2,), "one number per axis"),
        ((2**32, 2**31), 1.0, (0, 0), (1, 1), "2\\^62"),
    ],
)
def test_bad_boxes(shape, std, offset, box, match):
    with pytest.raises(UserError, match=match):
        truncated_normal(0, "bad", shape, std=std, offset=offset, box=box)


@pytest.mark.parametrize(("shape", "box"), [((), ()), ((0, 3), (0, 3)), ((3, 4), (0, 2)), ((5,), (1,))])
def test_small_boxes(shape, box):
    assert truncated_normal(0, "s", shape, std=1.0, box=box, offset=(0,) * len(shape)).shape == box


PRIMES = (2, 3, 5, 7, 11, 13, 97, 101, 997, 1009, 10007)
NEAR_POWERS = tuple(2**k + d for k in range(1, 15) for d in (-1, 0, 1))


@pytest.mark.parametrize("size", sorted({1, *PRIMES, *NEAR_POWERS, 100_000}))
def test_permutation_is_a_bijection(size):
    for name in ("a", "b"):
        assert np.array_equal(np.sort(Permutation(size, 1, name)(np.arange(size))), np.arange(size))


@given(size=st.integers(1, 2**62), data=st.data())
@settings(max_examples=60, deadline=None)
def test_permutation_seeks_anywhere(size, data):
    at = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    permutation = Permutation(size, 3, "far")
    got = permutation(np.array(at, np.int64))
    assert got.dtype == np.int64
    assert ((got >= 0) & (got < size)).all()
    assert len(set(got.tolist())) == len(at)
    assert got[::-1].tolist() == [int(permutation(np.array([i], np.uint64))[0]) for i in reversed(at)]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_of_a_few_is_as_likely(size):
    draws = 50 * math.factorial(size)
    seen = Counter(tuple(Permutation(size, seed, "few")(np.arange(size)).tolist()) for seed in range(draws))
    assert len(seen) == math.factorial(size)
    assert _chi_square_sigma(np.array(list(seen.values())), 50) < 5


@pytest.mark.parametrize("size", [2**61 + 7, 10**9 + 7, 12_345])
def test_permutation_looks_uniform(size):
    n = min(size, 100_000)
    got = Permutation(size, 2, "uniform")(np.arange(n))
    steps = Permutation(size, 2, "uniform")(np.arange(1, n)).astype(object) - got[:-1].astype(object)
    places = (got.astype(np.float64) / size * 50).astype(int)
    if size > n:  # of a whole permutation every place is there anyway
        assert _chi_square_sigma(np.bincount(places, minlength=50), n / 50) < 5
    pairs = places[:-1] * 50 + places[1:]
    assert _chi_square_sigma(np.bincount(pairs, minlength=2500), (n - 1) / 2500) < 5
    assert len({int(s) % size for s in steps}) > 0.6 * min(n, size)  # a shift or an affine map repeats its steps


def test_permutations_of_two_seeds_are_unrelated():
    size = 10_007
    a, b = (Permutation(size, seed, "x")(np.arange(size)) for seed in (0, 1))
    assert (a == b).sum() < 10  # Poisson of mean 1
    assert (a == np.arange(size)).sum() < 10


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_permutation_sizes(size):
    with pytest.raises(ValueError, match="from 1 to 2"):
        Permutation(size, 0, "bad")


def test_permutation_refuses_what_lies_outside():
    with pytest.raises(IndexError, match="10 to 10"):
        Permutation(10, 0, "bad")(np.array([10]))
    assert Permutation(10, 0, "bad")(np.array([], np.int64)).shape == (0,)
