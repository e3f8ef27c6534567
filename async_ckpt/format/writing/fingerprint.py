"""The record by which torch tells files apart: made from the names of the records before it, and from their checksums.

Loading does not look at it, so where it was made in a way not known here it is left as it was written.
"""

from __future__ import annotations

from collections.abc import Callable

from async_ckpt.format.checksum import combine
from async_ckpt.format.writing.archive import Records

__all__ = ["DIGITS", "digits", "find_fingerprint"]

DIGITS = 20
"""Of each half of the fingerprint: the names, the checksums."""

_NAME = ".data/serialization_id"


def find_fingerprint(records: Records, read: Callable[[int, int], bytes]) -> int | None:
    """Return which record depends on the checksums of all others, if torch made it in the way known here.

    It is the last record, and the only one whose checksum cannot be known before the others are.

    Args:
        records: of the archive.
        read: returns a number of bytes from a place on.
    """
    last = len(records.names) - 1
    start, stop = records.starts[last], records.stops[last]
    if records.names[last].endswith(_NAME) and stop - start == 2 * DIGITS:
        written = read(start + DIGITS, DIGITS)
        if written == digits(records, last, records.checksums.__getitem__):
            return last
    return None


def digits(records: Records, count: int, checksum: Callable[[int], int]) -> bytes:
    """Return the half of the fingerprint made from the first *count* checksums; torch leaves out empty records."""
    seed = 0
    for record in range(count):
        if records.starts[record] < records.stops[record]:
            seed = combine(seed, checksum(record))
    return f"{seed:0{DIGITS}d}".encode()
