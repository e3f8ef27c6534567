"""Finds the overlap of two files over the same memory, and cuts a file so that a store can copy the overlap. Pure.

Guarantees: the bytes of an overlap are equal in both files; the parts are contiguous and cover the file, and all but
the last have the store's minimum size.

What does not belong here: making the copies (stores), handling failures (writers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from async_ckpt.stores.base import Part

__all__ = ["Overlap", "Piece", "find_overlap", "plan_copies"]

Piece: TypeAlias = "bytes | bytearray | tuple[int, int]"
"""Literal bytes, or an offset and a length in memory that both files share."""


@dataclass(slots=True, kw_only=True)
class Overlap:
    """The bytes *start* to *stop* of a file, which the other file has from *other_start* on."""

    start: int
    stop: int
    other_start: int


def find_overlap(pieces: Iterable[Piece], others: Sequence[Piece]) -> Overlap | None:
    """Return the longest overlap that begins and ends with shared memory.

    Args:
        pieces: the pieces of the file.
        others: the pieces of the other file.
    """
    places: dict[Piece, tuple[int, int]] = {}
    at = 0
    for index, piece in enumerate(others):
        if isinstance(piece, tuple):
            places.setdefault(piece, (index, at))
        at += _length(piece)
    best: Overlap | None = None
    run: Overlap | None = None
    expected = at = 0
    for piece in pieces:
        stop = at + _length(piece)
        if run is not None and expected < len(others) and others[expected] == piece:
            expected += 1
        elif isinstance(piece, tuple) and piece in places:
            index, other_start = places[piece]
            run, expected = Overlap(start=at, stop=stop, other_start=other_start), index + 1
        else:
            run = None
        if run is not None and isinstance(piece, tuple):
            run.stop = stop
            if best is None or run.stop - run.start >= best.stop - best.start:
                best = run
        at = stop
    return best


def plan_copies(
    nbytes: int, overlap: Overlap, *, part_size: int, least: int
) -> tuple[tuple[Part, ...], dict[int, int]]:
    """Cut a file so that the overlap consists of whole parts.

    Args:
        nbytes: length of the file.
        overlap: the overlap with the other file.
        part_size: the preferred size of a part, at least *least*.
        least: the minimum size of every part but the last.

    Returns:
        The parts in order; and, by the index of each part that can be copied, its offset in the other file. No parts if
        copying is not worthwhile.
    """
    head = max(overlap.start, least)
    if overlap.stop - head < least:
        return (), {}
    edges = [0, *_cuts(0, head, part_size), *_cuts(head, overlap.stop, part_size)]
    edges += [*_cuts(overlap.stop, nbytes, part_size)] if overlap.stop < nbytes else []
    parts = tuple(
        Part(index=index, start=start, stop=stop) for index, (start, stop) in enumerate(pairwise(edges))
    )
    shift = overlap.other_start - overlap.start
    copies = {
        part.index: part.start + shift for part in parts if head <= part.start and part.stop <= overlap.stop
    }
    return parts, copies


def _cuts(start: int, stop: int, part_size: int) -> list[int]:
    """Return the ends of equal parts; if there are several, none is shorter than *part_size*."""
    count = max(1, (stop - start) // part_size)
    return [start + (stop - start) * number // count for number in range(1, count + 1)]


def _length(piece: Piece) -> int:
    return piece[1] if isinstance(piece, tuple) else len(piece)
