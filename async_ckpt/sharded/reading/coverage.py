"""Checks whether the chunks of a tensor make it up. Pure.

What does not belong here: where chunks are in files (`extents`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

__all__ = ["fault_of"]

_MOST_CELLS = 1 << 26

Box = tuple[tuple[int, ...], tuple[int, ...]]


def fault_of(size: Sequence[int], chunks: Iterable[tuple[Sequence[int], Sequence[int]]]) -> str | None:
    """Return why the chunks of a tensor do not make it up, each element once; None if they do.

    Args:
        size: of the tensor.
        chunks: the offsets and sizes of each, all within the tensor. The same one may be there more than once.
    """
    boxes = {(tuple(offsets), tuple(sizes)) for offsets, sizes in chunks if math.prod(sizes)}
    count, whole = sum(math.prod(sizes) for _, sizes in boxes), math.prod(size)
    if count != whole:
        return f"its chunks have {count} elements, but it has {whole}"
    if len(boxes) > 1 and _do_overlap(size, boxes):
        return "its chunks overlap and leave gaps"
    return None


def _do_overlap(size: Sequence[int], boxes: Iterable[Box]) -> bool:
    cut = [
        dimension
        for dimension, length in enumerate(size)
        if any(sizes[dimension] != length for _, sizes in boxes)
    ]
    if len(cut) == 1:  # as nearly always
        at = 0
        for start, length in sorted((offsets[cut[0]], sizes[cut[0]]) for offsets, sizes in boxes):
            if start != at:
                return True
            at += length
        return False
    # The edges of all chunks cut the tensor into cells; each chunk takes some, and no other may.
    places = []
    for dimension in cut:
        starts = {offsets[dimension] for offsets, _ in boxes}
        stops = {offsets[dimension] + sizes[dimension] for offsets, sizes in boxes}
        places.append({edge: place for place, edge in enumerate(sorted(starts | stops))})
    shape = [len(edges) - 1 for edges in places]
    if math.prod(shape) > _MOST_CELLS:  # more than the chunks of any device mesh make
        return True
    taken = torch.zeros(shape, dtype=torch.bool)
    for offsets, sizes in boxes:
        cells = taken[
            tuple(
                slice(edges[offsets[dimension]], edges[offsets[dimension] + sizes[dimension]])
                for dimension, edges in zip(cut, places, strict=True)
            )
        ]
        if cells.any():
            return True
        cells.fill_(True)
    return False
