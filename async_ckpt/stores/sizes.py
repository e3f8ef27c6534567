"""Chooses the size of an upload's parts, within the limits of a store. Pure.

What does not belong here: the limits, which each store knows, and cutting the file (`format.parts`).
"""

from __future__ import annotations

__all__ = ["fitting_part_size", "shared_part_size"]

_MIB = 1 << 20
_WORTH_BYTES = 16 << 20


def shared_part_size(nbytes: int, wanted: int, *, at_a_time: int, worth: int = _WORTH_BYTES) -> int:
    """Return *wanted*, or a size by which all connections get the same number of parts, and end at about the same time.

    Args:
        nbytes: length of the file.
        wanted: the preferred size of a part.
        at_a_time: how many parts are sent at a time.
        worth: below this size, another request costs more than another connection gains.

    Returns:
        The size in bytes; up to two mebibytes more than *wanted*, for files slightly above a round size.
    """
    unit = max(1, min(_MIB, wanted // 64))
    turns = max(1, -(-nbytes // (at_a_time * (wanted + unit))))
    share = -(-nbytes // (turns * at_a_time))
    return max(-(-share // unit) * unit, min(wanted, worth))


def fitting_part_size(
    nbytes: int, wanted: int, *, least: int, most: int, max_parts: int, multiple_of: int = 1
) -> int:
    """Return the part size nearest to *wanted* that suits a file of *nbytes* bytes.

    Args:
        nbytes: length of the file.
        wanted: the preferred size of a part.
        least: the minimum size of every part but the last.
        most: the maximum size of a part.
        max_parts: the maximum number of parts.
        multiple_of: the size of every part but the last is a multiple of this.

    Returns:
        The size in bytes of every part but the last.

    Raises:
        ValueError: the file is too large for the store.
    """
    size = max(wanted, least, -(-nbytes // max_parts))
    size = -(-size // multiple_of) * multiple_of
    most = most // multiple_of * multiple_of
    if size > most and size > -(-nbytes // max_parts):
        size = most
    if -(-nbytes // size) > max_parts or size > most:
        raise ValueError(f"{nbytes} bytes are more than {max_parts} parts of {most} bytes")
    return size
