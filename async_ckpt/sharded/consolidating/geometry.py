"""Where the elements of a chunk are in the tensor that it is a part of. Pure.

A chunk is a box in the tensor, and its elements have the same order as in the tensor. Hence the elements of a chunk
that fall into any range of the tensor are one range of the chunk too, and can be fetched as one run.

To count in bytes, add a last dimension for the bytes of an element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Box", "boxes_of", "count_before", "place_of"]


@dataclass(frozen=True, slots=True)
class Box:
    """Elements that are contiguous in a chunk, and have fixed strides in the tensor.

    Attributes:
        start: the first of them in the chunk.
        shape: their shape.
        place: the first of them in the tensor.
        strides: their strides in the tensor.
    """

    start: int
    shape: tuple[int, ...]
    place: int
    strides: tuple[int, ...]


def count_before(sizes: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], at: int) -> int:
    """Return how many elements of a chunk, which is not empty, come before element *at* of its tensor.

    Args:
        sizes: the sizes of the tensor.
        offsets: where the chunk begins in each dimension.
        lengths: the sizes of the chunk.
        at: an element of the tensor, or the number of its elements.
    """
    whole, chunk, count = math.prod(sizes), math.prod(lengths), 0
    if at >= whole:
        return chunk
    for size, offset, length in zip(sizes, offsets, lengths, strict=True):
        whole //= size
        chunk //= length
        index, at = divmod(at, whole)
        index -= offset
        if index < 0:
            return count
        if index >= length:
            return count + length * chunk
        count += index * chunk
    return count


def place_of(sizes: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], at: int) -> int:
    """Return which element of the tensor is the chunk's element *at*."""
    place, stride = 0, 1
    for size, offset, length in zip(reversed(sizes), reversed(offsets), reversed(lengths), strict=True):
        at, index = divmod(at, length)
        place += (index + offset) * stride
        stride *= size
    return place


def boxes_of(
    sizes: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], start: int, stop: int
) -> Iterator[Box]:
    """Yield the boxes that make up the elements *start* to *stop* of a chunk: at most two for each dimension.

    Args:
        sizes: the sizes of the tensor.
        offsets: where the chunk begins in each dimension.
        lengths: the sizes of the chunk.
        start: the first element.
        stop: the end, exclusive.
    """
    inner = [math.prod(lengths[dimension + 1 :]) for dimension in range(len(lengths))]
    strides = tuple(math.prod(sizes[dimension + 1 :]) for dimension in range(len(sizes)))
    while start < stop:
        # The outermost dimension of which a whole slice begins here and fits.
        dimension = next(
            each for each, count in enumerate(inner) if not start % count and count <= stop - start
        )
        index = start // inner[dimension] % lengths[dimension]
        count = min((stop - start) // inner[dimension], lengths[dimension] - index)
        place = place_of(sizes, offsets, lengths, start)
        yield Box(start, (count, *lengths[dimension + 1 :]), place, strides[dimension:])
        start += count * inner[dimension]
