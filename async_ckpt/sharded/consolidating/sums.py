"""The CRC-32 of bytes that arrive in pieces, in any order. Pure.

What does not belong here: how a checksum is computed (`format.checksum`).
"""

from __future__ import annotations

from async_ckpt.format.checksum import joined_crc32

__all__ = ["Sums"]


class Sums:
    """The CRC-32 of pieces, and of ranges that consist of them. Threads may add pieces at the same time."""

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[int, int]] = {}

    def add(self, start: int, stop: int, value: int) -> None:
        """Note *value*, the CRC-32 of the bytes *start* to *stop*."""
        # A store may read some pieces again.
        if start < stop and self._pieces.get(start, (start, 0))[0] < stop:
            self._pieces[start] = stop, value

    def total(self, start: int, stop: int) -> int | None:
        """Return the CRC-32 of the bytes *start* to *stop*; None while a piece is missing."""
        value, at = 0, start
        while at < stop:
            end, piece = self._pieces.get(at, (stop + 1, 0))
            if end > stop:
                return None
            value, at = joined_crc32(value, piece, end - at), end
        return value
