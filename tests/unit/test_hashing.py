"""Dropout's hash: fixed bits, the same in every array library, and good enough as noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portatrain.model import dropout_hash

int32s = st.integers(-(2**31), 2**31 - 1)


def fmix32(h: int) -> int:
    """MurmurHash3's finaliser in Python integers (Appleby 2011)."""
    h ^= h >> 16
    h = h * 0x85EBCA6B & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def bits_of(seed: int, step: int, site: int, layer: int, sample: int, offset: int) -> int:
    """The definition in unsigned Python integers, word by word."""
    mask = 0xFFFFFFFF
    h = fmix32((seed & mask) ^ 0x9E3779B9)
    for word in (seed >> 32 & mask, step, site, layer, sample & mask, sample >> 32 & mask):
        h = fmix32(h ^ word & mask)
    g = fmix32(h + offset * 0x9E3779B9 & mask)
    return fmix32(g ^ (h * 0x85EBCA6B + 1 & mask)) >> 8


def numpy_bits(seed: int, step: int, site: int, layer: int, samples: list[int], count: int) -> np.ndarray:
    def word(value: int) -> np.ndarray:
        return np.asarray(value, np.int32)

    pairs = np.array([dropout_hash.words(n) for n in samples], np.int32)
    with np.errstate(over="ignore"):
        keys = dropout_hash.sample_keys(
            np.array(dropout_hash.words(seed), np.int32), word(step), site, word(layer), pairs
        )
        return dropout_hash.random_bits(keys[:, None], np.arange(count, dtype=np.int32)[None])


@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**31 - 1),
    site=st.integers(0, 2**31 - 1),
    layer=st.integers(0, 1000),
    sample=st.integers(0, 2**62),
)
def test_bits_are_the_definition(seed: int, step: int, site: int, layer: int, sample: int) -> None:
    found = numpy_bits(seed, step, site, layer, [sample], 5)
    assert found.tolist() == [[bits_of(seed, step, site, layer, sample, k) for k in range(5)]]


def test_bits_never_change() -> None:
    """Written down once: a run that resumes under a newer version must draw the same elements."""
    found = numpy_bits(seed=2**40 + 7, step=12345, site=987654321, layer=3, samples=[0, 2**33 + 1], count=3)
    assert found.tolist() == [[623431, 14784198, 1596417], [15803518, 8058717, 11168703]]


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_libraries_agree(library: str) -> None:
    frame = pytest.importorskip(library)
    asarray: Any = frame.tensor if library == "torch" else pytest.importorskip("jax.numpy").asarray
    seed, samples = 2**62 + 3, [5, 2**31, 2**32 - 1, 2**40]

    def word(value: Any) -> Any:
        return asarray(np.asarray(value, np.int32))

    keys = dropout_hash.sample_keys(
        word(dropout_hash.words(seed)), word(77), 2**31 - 1, word(9), word([dropout_hash.words(n) for n in samples])
    )
    found = dropout_hash.random_bits(keys[:, None], word(np.arange(1000))[None])
    assert np.array_equal(np.asarray(found), numpy_bits(seed, 77, 2**31 - 1, 9, samples, 1000))


@given(st.integers(0, 2**64 - 1))
def test_words_are_two_halves(value: int) -> None:
    low, high = dropout_hash.words(value)
    assert (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 == value
    assert all(-(2**31) <= word < 2**31 for word in (low, high))


@given(int32s)
def test_mix_is_murmurs_finaliser(value: int) -> None:
    with np.errstate(over="ignore"):
        assert int(dropout_hash.mix(np.array([value], np.int32))[0]) & 0xFFFFFFFF == fmix32(value & 0xFFFFFFFF)


@pytest.mark.parametrize(("rate", "below"), [(0.0, 0), (0.1, 1677722), (0.5, 1 << 23), (1.0, 1 << 24)])
def test_threshold(rate: float, below: int) -> None:
    assert dropout_hash.threshold(rate) == below


# ---- as noise: bounds of 5 standard deviations, on fixed bits


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_met(rate: float) -> None:
    bits = numpy_bits(0, 1, 2, 3, list(range(64)), 4096)
    assert bits.min() >= 0 and bits.max() < 1 << 24
    dropped = (bits < dropout_hash.threshold(rate)).mean()
    assert abs(dropped - rate) < 5 * math.sqrt(rate * (1 - rate) / bits.size)


_VARIED: dict[str, Any] = {
    "seed": lambda k: {"seed": k},
    "seed's high word": lambda k: {"seed": k << 32},
    "step": lambda k: {"step": k},
    "site": lambda k: {"site": k},
    "layer": lambda k: {"layer": k},
    "sample": lambda k: {"samples": [k]},
    "sample's high word": lambda k: {"samples": [k << 32]},
}


@pytest.mark.parametrize("vary", _VARIED.values(), ids=_VARIED)
def test_neighbouring_words_draw_independently(vary: Any) -> None:
    """Masks of neighbouring values of any one word agree as often as independent ones, and so do shifted ones."""
    base: dict[str, Any] = {"seed": 1, "step": 1, "site": 1, "layer": 1, "samples": [1]}
    n, masks = 1 << 14, []
    for k in range(2, 6):
        masks.append(numpy_bits(**{**base, **vary(k)}, count=n)[0] < dropout_hash.threshold(0.5))
    for i, a in enumerate(masks):
        for b in masks[i + 1 :]:
            for shift in (0, 1, -1):
                agree = (a == np.roll(b, shift)).mean()
                assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_words_are_not_interchangeable() -> None:
    """Each word enters by itself: exchanging two of them changes the draw."""
    base: dict[str, Any] = {"seed": 3, "step": 5, "site": 7, "layer": 11, "samples": [13]}
    drawn = {
        numpy_bits(**{**base, a: base[b], b: base[a]}, count=8).tobytes()
        for a, b in [("seed", "step"), ("step", "site"), ("site", "layer"), ("seed", "layer"), ("step", "layer")]
    }
    assert len(drawn | {numpy_bits(**base, count=8).tobytes()}) == 6
