"""CRC-32C (Castagnoli), the checksum of every tile, header and table.

Source: RFC 3720 section 12.1 and appendix B.4 (polynomial 0x1EDC6F41, reflected; the crc of nine
bytes "123456789" is 0xE3069283).
"""

from __future__ import annotations

from collections.abc import Sequence

import google_crc32c
import numpy as np


def crc32c(data: bytes | np.ndarray) -> int:
    """Return the crc of ``data``, bytes or a contiguous uint8 array, without copying it."""
    return google_crc32c.value(data)


def crc32c_each(data: np.ndarray, size: int) -> list[int]:
    """Return the crcs of consecutive pieces of ``size`` bytes of a uint8 array; the last piece may be shorter."""
    whole = len(data) - len(data) % size
    # Iterating over rows takes half the time of slicing; for tiles of 1 KiB, slicing takes longer than the crc.
    found = list(map(google_crc32c.value, data[:whole].reshape(-1, size)))
    return found if whole == len(data) else [*found, google_crc32c.value(data[whole:])]


def first_mismatch(data: np.ndarray, size: int, expected: Sequence[int]) -> int | None:
    """Return the index of the first piece of ``size`` bytes with an unexpected crc, or None."""

    got = crc32c_each(data, size)
    if got == list(expected):
        return None
    for index, (have, want) in enumerate(zip(got, expected, strict=True)):
        if have != want:
            return index
    return None
