"""How large the parts of an upload are, within what a store allows. Pure.

What does not belong here: the limits themselves, which each store knows, and the cutting (`format.parts`).
"""

from __future__ import annotations

__all__ = ["fitting_part_size", "shared_part_size"]

_WORTH_BYTES = 16 << 20  # below, another request costs more than another connection gains


def shared_part_size(nbytes: int, wanted: int, *, at_a_time: int) -> int:
    """Return *wanted*, or less where some connections would have nothing to do.

    Args:
        nbytes: length of the file.
        wanted: bytes a part should have at the most.
        at_a_time: parts under way at the same time.

    Returns:
        Bytes, whole mebibytes where it is less than *wanted*.
    """
    share = -(-nbytes // at_a_time // (1 << 20)) * (1 << 20)
    return min(wanted, max(share, _WORTH_BYTES))


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
