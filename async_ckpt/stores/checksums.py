"""Computes the CRC-32C of pieces, and formats checksums for headers.

Guarantees: at most a small block is copied at a time, and the GIL is released after each. Call it in a worker.

For stores that verify CRC-32, prefer ``Content.crc32``: it costs a third, or nothing.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable

__all__ = ["as_text", "crc32", "crc32c"]

_BLOCK_BYTES = 256 * 1024  # google-crc32c keeps the GIL and accepts only bytes


def crc32c(pieces: Iterable[memoryview], value: int = 0) -> int:
    """Return the CRC-32C of *pieces*, continuing from *value*, the checksum of the bytes before them."""
    import google_crc32c

    for piece in pieces:
        flat = piece.cast("B")
        for start in range(0, flat.nbytes, _BLOCK_BYTES):
            value = google_crc32c.extend(value, bytes(flat[start : start + _BLOCK_BYTES]))
    return value


def crc32(pieces: Iterable[memoryview]) -> int:
    """Return the CRC-32 of *pieces*, to be compared with that of ``Content``."""
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


def as_text(value: int) -> str:
    """Return a checksum in the form of headers: base64 of its four bytes, most significant first."""
    return base64.b64encode(value.to_bytes(4, "big")).decode("ascii")
