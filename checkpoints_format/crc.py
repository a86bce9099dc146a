"""CRC-32C (Castagnoli), the checksum of every tile, header and table.

Source: RFC 3720 section 12.1 and appendix B.4 (polynomial 0x1EDC6F41, reflected; the crc of nine
bytes "123456789" is 0xE3069283).
"""

from __future__ import annotations

from collections.abc import Sequence

import google_crc32c
import numpy as np


def crc32c(data: bytes | np.ndarray) -> int:
    """The crc of ``data``: bytes, or a contiguous uint8 array (which is not copied)."""
    return google_crc32c.value(data)


def crc32c_each(data: np.ndarray, size: int) -> list[int]:
    """The crcs of consecutive pieces of ``size`` bytes of a uint8 array; the last may be shorter."""
    whole = len(data) - len(data) % size
    # Iterating over rows costs half as much as slicing them out, which at tiles of a KiB is more than the crc itself.
    found = list(map(google_crc32c.value, data[:whole].reshape(-1, size)))
    return found if whole == len(data) else [*found, google_crc32c.value(data[whole:])]


def first_mismatch(data: np.ndarray, size: int, expected: Sequence[int]) -> int | None:
    """Index of the first piece of ``size`` bytes whose crc is not the expected one, or None."""
    got = crc32c_each(data, size)
    if got == list(expected):
        return None
    for index, (have, want) in enumerate(zip(got, expected, strict=True)):
        if have != want:
            return index
    return None
