"""What a file has in common with another over the same memory, and how it is cut so that a store can copy that. Pure.

Guarantees: the bytes of an overlap are equal in both files; the parts lie side by side and cover the file, and none
but the last is shorter than the store allows.

What does not belong here: making the copies (stores), what is done where one fails (writers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from async_ckpt.stores.base import Part

__all__ = ["Overlap", "Piece", "find_overlap", "plan_copies"]

Piece: TypeAlias = "bytes | bytearray | tuple[int, int]"
"""Bytes as they are, or where in a memory that both files share they begin, and how many."""


@dataclass(slots=True, kw_only=True)
class Overlap:
    """The bytes *start* to *stop* of a file, which another has from *other_start* on."""

    start: int
    stop: int
    other_start: int


def find_overlap(pieces: Iterable[Piece], others: Sequence[Piece]) -> Overlap | None:
    """Return the longest overlap that begins and ends with shared memory.

    Args:
        pieces: the file.
        others: the other one.
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
    """Cut a file so that what it has in common with another makes parts of its own.

    Args:
        nbytes: length of the file.
        overlap: what is in common.
        part_size: bytes that a part should have, no fewer than *least*.
        least: bytes that every part but the last must have.

    Returns:
        The parts in order; by the number of each that may be copied, where it begins in the other file. No parts
        where nothing is worth it.
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
    """Return the ends of equal parts, none shorter than *part_size* if there are several."""
    count = max(1, (stop - start) // part_size)
    return [start + (stop - start) * number // count for number in range(1, count + 1)]


def _length(piece: Piece) -> int:
    return piece[1] if isinstance(piece, tuple) else len(piece)
