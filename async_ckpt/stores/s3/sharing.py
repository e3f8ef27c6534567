"""A rank's share of what S3 takes, where thousands of ranks write to one directory at the same time. Pure.

S3 takes 3,500 writes a second for a prefix of keys, and refuses more until it has divided the prefix, which takes it
minutes ("Best practices design patterns: optimizing Amazon S3 performance" in its user guide). Each request counts,
however large.

What does not belong here: what to do when S3 refuses a request (``stores.requests``).
"""

from __future__ import annotations

from async_ckpt.stores.sizes import fitting_part_size, shared_part_size

__all__ = ["LEAST_PART_BYTES", "MAX_PARTS", "apart_seconds", "part_size_for"]

LEAST_PART_BYTES = 5 << 20
MAX_PARTS = 10_000

_MOST_PART_BYTES = 5 << 30
_WRITES_PER_SECOND = 3000.0  # somebody else may use the prefix, too
_WORTH_BYTES = 16 << 20
_BYTES_PER_SECOND = 500e6  # what four connections of one process send


def apart_seconds(writers: int) -> float:
    """Return the least time between two requests of one of *writers* processes, in seconds."""
    return writers / _WRITES_PER_SECOND if writers > 1 else 0.0


def part_size_for(nbytes: int, wanted: int, *, at_a_time: int, writers: int) -> int:
    """Return the size of the parts in which one of *writers* processes sends an object.

    A part is no smaller than what can be sent in the time between two requests; so with many writers an object goes in
    fewer, larger parts.

    Args:
        nbytes: length of the object.
        wanted: the preferred size of a part.
        at_a_time: how many parts are sent at a time.
        writers: how many processes write at the same time.

    Returns:
        The size in bytes of every part but the last.

    Raises:
        ValueError: the object is too large for S3.
    """
    meanwhile = int(apart_seconds(writers) * _BYTES_PER_SECOND)
    return fitting_part_size(
        nbytes,
        shared_part_size(
            nbytes, max(wanted, meanwhile), at_a_time=at_a_time, worth=max(_WORTH_BYTES, meanwhile)
        ),
        least=LEAST_PART_BYTES,
        most=_MOST_PART_BYTES,
        max_parts=MAX_PARTS,
    )
