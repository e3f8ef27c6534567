"""How large the parts of an upload are, within what a store allows. Pure.

What does not belong here: the limits themselves, which each store knows, and the cutting (`format.parts`).
"""

from __future__ import annotations

__all__ = ["fitting_part_size", "shared_part_size"]

_MIB = 1 << 20
_WORTH_BYTES = 16 << 20  # below, another request costs more than another connection gains


def shared_part_size(nbytes: int, wanted: int, *, at_a_time: int) -> int:
    """Return *wanted*, or what lets all connections end at about the same time: they get as many parts each.

    Args:
        nbytes: length of the file.
        wanted: bytes a part should have.
        at_a_time: parts under way at the same time.

    Returns:
        Bytes; up to two mebibytes more than *wanted*, for what a file has on top of a round size.
    """
    unit = max(1, min(_MIB, wanted // 64))
    turns = max(1, -(-nbytes // (at_a_time * (wanted + unit))))
    share = -(-nbytes // (turns * at_a_time))
    return max(-(-share // unit) * unit, min(wanted, _WORTH_BYTES))


def fitting_part_size(
    nbytes: int, wanted: int, *, least: int, most: int, max_parts: int, multiple_of: int = 1
) -> int:
    """Return a part size for a file of *nbytes* bytes: *wanted*, or what comes nearest.

    Args:
        nbytes: length of the file.
        wanted: bytes a part should have.
        least: bytes every part but the last must have.
        most: bytes no part may exceed.
        max_parts: how many parts there may be.
        multiple_of: what the size of every part but the last is a multiple of.

    Returns:
        Bytes of every part but the last.

    Raises:
        ValueError: the file is larger than the store takes.
    """
    size = max(wanted, least, -(-nbytes // max_parts))
    size = -(-size // multiple_of) * multiple_of
    most = most // multiple_of * multiple_of
    if size > most and size > -(-nbytes // max_parts):
        size = most
    if -(-nbytes // size) > max_parts or size > most:
        raise ValueError(f"{nbytes} bytes are more than {max_parts} parts of {most} bytes")
    return size
