"""CRC-32 as zip files use it, by ISA-L if it is installed, otherwise by zlib.

Both release the GIL for more than a few KiB. Nothing else belongs here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["combine", "crc32", "crc32_combine", "joined_crc32"]

crc32: Callable[[Any, int], int]
crc32_combine: Callable[[int, int, int], int] | None
"""Computes the CRC-32 of two joined pieces from their checksums and the second's length; ``None`` if unavailable."""
try:
    from isal.isal_zlib import crc32, crc32_combine
except ImportError:  # no wheel for this platform: the same results at a sixth of the speed
    from zlib import crc32

    crc32_combine = None

_MASK = (1 << 64) - 1
_POLYNOMIAL = 0xEDB88320  # of CRC-32, bits reversed


def joined_crc32(first: int, second: int, nbytes: int) -> int:
    """Return the CRC-32 of two pieces together; *nbytes* is the length of the second."""
    return _joined(first, second, nbytes) if crc32_combine is None else crc32_combine(first, second, nbytes)


def _joined(first: int, second: int, nbytes: int) -> int:
    """Do so as zlib does: what a bit of zeros does to a checksum is a matrix; its powers do it for all of them."""
    matrix = [_POLYNOMIAL, *(1 << bit for bit in range(31))]
    bits = nbytes * 8
    while bits:
        if bits & 1:
            first = _times(matrix, first)
        bits >>= 1
        matrix = [_times(matrix, row) for row in matrix] if bits else matrix
    return first ^ second


def _times(matrix: list[int], value: int) -> int:
    result = 0
    for row in matrix:
        if not value:
            break
        if value & 1:
            result ^= row
        value >>= 1
    return result


def combine(seed: int, value: int) -> int:
    """Combine *value* into *seed* like c10's ``hash_combine``, with which torch fingerprints files.

    Args:
        seed: the result so far, 0 at first.
        value: the next checksum.

    Returns:
        The new seed, of 64 bits.
    """
    return (seed ^ (value + 0x9E3779B9 + (seed << 6) + (seed >> 2))) & _MASK
