"""Cuts a file into parts, one per storage request. Pure.

Guarantees: the parts are numbered from 0, contiguous, and cover the file; there is at least one.
"""

from __future__ import annotations

from async_ckpt.stores.base import Part

__all__ = ["plan_parts"]


def plan_parts(nbytes: int, part_size: int) -> tuple[Part, ...]:
    """Cut a file.

    Args:
        nbytes: length of the file.
        part_size: the length of every part but the last, which may be shorter.

    Returns:
        The parts in order; one empty part for an empty file.

    Raises:
        ValueError: *part_size* is not positive.
    """
    if part_size <= 0:
        raise ValueError(f"a part cannot have {part_size} bytes")
    starts = range(0, nbytes, part_size) or range(1)
    return tuple(
        Part(index=index, start=start, stop=min(start + part_size, nbytes))
        for index, start in enumerate(starts)
    )
