"""Dropout's hash: which elements are kept, as a pure function in wrapping int32 arithmetic.

The formulas use only `+ ^ * >> &` on int32 arrays, so that NumPy, JAX and torch give the same bits (torch has no
unsigned shift on every device). The finaliser is that of MurmurHash3 (Appleby 2011, fmix32).
"""

from __future__ import annotations

from typing import Any

Array = Any

_GOLDEN = -1640531527  # 0x9E3779B9 as int32
_M1 = -2048144789  # 0x85EBCA6B
_M2 = -1028477387  # 0xC2B2AE35


def _lsr(x: Array, bits: int) -> Array:
    """Logical shift right of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def mix(h: Array) -> Array:
    """fmix32: every input bit changes every output bit with probability near one half."""
    h = (h ^ _lsr(h, 16)) * _M1
    h = (h ^ _lsr(h, 13)) * _M2
    return h ^ _lsr(h, 16)


def sample_keys(seed_2: Array, step: Array, site: int, layer: Array, sample_B2: Array) -> Array:
    """(B,) int32 keys, one a sample; every word enters by itself. All arrays are int32."""
    h = mix(seed_2[0] ^ _GOLDEN)
    h = mix(h ^ seed_2[1])
    h = mix(h ^ step)
    h = mix(h ^ site)
    h = mix(h ^ layer)
    h_B = mix(h ^ sample_B2[:, 0])
    return mix(h_B ^ sample_B2[:, 1])


def tensor_key(seed_2: Array, step: Array, site: int) -> Array:
    """(1,) int32: the key of a tensor at a step. All arrays are int32."""
    h = mix(seed_2[:1] ^ (_GOLDEN + 1))  # another stream than the samples'
    h = mix(h ^ seed_2[1:])
    h = mix(h ^ step)
    return mix(h ^ site)


def random_bits(key_B1: Array, offset_1F: Array) -> Array:
    """24 random bits, (B, F) int32, for element offsets within a sample."""
    h = mix(key_B1 + offset_1F * _GOLDEN)
    return _lsr(mix(h ^ (key_B1 * _M1 + 1)), 8)


def threshold(rate: float) -> int:
    """Elements with `random_bits` below this are dropped."""
    return round(rate * (1 << 24))


def words(value: int) -> tuple[int, int]:
    """A 64-bit integer as two int32 words (low, high)."""

    def signed(word: int) -> int:
        return word - (1 << 32) if word >= 1 << 31 else word

    return signed(value & 0xFFFFFFFF), signed((value >> 32) & 0xFFFFFFFF)
