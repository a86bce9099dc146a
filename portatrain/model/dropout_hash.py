"""The dropout hash: a pure function that decides which elements dropout keeps.

It uses only `+ ^ * >> &` on wrapping int32 arrays, so NumPy, JAX and torch give the same bits (torch lacks an unsigned
shift on some devices). The mixing function is the finaliser of MurmurHash3 (Appleby 2011, fmix32).
"""

from __future__ import annotations

from typing import Any

Array = Any

_GOLDEN = -1640531527  # 0x9E3779B9 as int32
_M1 = -2048144789  # 0x85EBCA6B
_M2 = -1028477387  # 0xC2B2AE35


def _lsr(x: Array, bits: int) -> Array:
    """Return the int32 `x` shifted right by `bits`, with zeros shifted in."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def mix(h: Array) -> Array:
    """Return fmix32 of int32 words: each input bit changes each output bit with a probability near one half."""
    h = (h ^ _lsr(h, 16)) * _M1
    h = (h ^ _lsr(h, 13)) * _M2
    return h ^ _lsr(h, 16)


def sample_keys(seed_2: Array, step: Array, site: int, layer: Array, sample_B2: Array) -> Array:
    """Return one key per sample, (B,) int32.

    Args:
        seed_2: (2,) int32, the two words of the seed.
        step: () int32.
        site: the module's `site`.
        layer: () int32.
        sample_B2: (B, 2) int32, the two words of each sample's index.
    """
    h = mix(seed_2[0] ^ _GOLDEN)
    h = mix(h ^ seed_2[1])
    h = mix(h ^ step)
    h = mix(h ^ site)
    h = mix(h ^ layer)
    h_B = mix(h ^ sample_B2[:, 0])
    return mix(h_B ^ sample_B2[:, 1])


def tensor_key(seed_2: Array, step: Array, site: int) -> Array:
    """Return the key of a tensor at a step, (1,) int32; the arguments are those of `sample_keys`."""
    h = mix(seed_2[:1] ^ (_GOLDEN + 1))  # a different stream from that of `sample_keys`
    h = mix(h ^ seed_2[1:])
    h = mix(h ^ step)
    return mix(h ^ site)


def random_bits(key_B1: Array, offset_1F: Array) -> Array:
    """Return 24 random bits per element, (B, F) int32.

    Args:
        key_B1: (B, 1) int32 keys.
        offset_1F: (1, F) int32 offsets of elements within a sample.
    """
    h = mix(key_B1 + offset_1F * _GOLDEN)
    return _lsr(mix(h ^ (key_B1 * _M1 + 1)), 8)


def threshold(rate: float) -> int:
    """Return the number below which `random_bits` of an element mean that it is dropped at `rate`."""
    return round(rate * (1 << 24))


def words(value: int) -> tuple[int, int]:
    """Return a 64-bit integer as two int32 words, (low, high)."""

    def signed(word: int) -> int:
        return word - (1 << 32) if word >= 1 << 31 else word

    return signed(value & 0xFFFFFFFF), signed((value >> 32) & 0xFFFFFFFF)
