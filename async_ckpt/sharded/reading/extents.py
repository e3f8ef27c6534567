"""Finds the bytes of a file that hold a part of a tensor. Pure.

Guarantees: a part that is contiguous in the file is one run of bytes, with no other bytes in it. Any other part is cut
into blocks. Each is a run that covers whole rows, and is no longer than asked for, unless one element is.

What does not belong here: fetching the bytes (`fetching`), and where they go (`filling`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from async_ckpt.format.central_directory import LOCAL_HEADER, NOT_UNDERSTOOD, Entry, data_start
from async_ckpt.sharded.reading.items import Unusual, checksum_in, load_tensor, where_is_data

__all__ = ["Block", "Extent", "Item", "Record", "blocks_of", "run_of"]


def run_of(sizes: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> tuple[int, int] | None:
    """Return the first element and the number of elements of a part; None if the part is not contiguous.

    Args:
        sizes: the sizes of the whole tensor.
        offsets: where the part begins in each dimension.
        lengths: the sizes of the part.
    """
    start, stride, is_cut = 0, 1, False
    for size, offset, length in zip(reversed(sizes), reversed(offsets), reversed(lengths), strict=True):
        if is_cut and length != 1:
            return None
        is_cut = is_cut or length != size
        start, stride = start + offset * stride, stride * size
    return start, math.prod(lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Contiguous rows of a tensor, and the section of them that is wanted.

    Attributes:
        start: its first element.
        count: its number of elements.
        shape: the shape of the rows.
        cut: the section that is wanted, as a slice of each dimension but the first.
        place: where that goes in the part: an index for each of the first dimensions, and a range in the next.
    """

    start: int
    count: int
    shape: tuple[int, ...]
    cut: tuple[slice, ...]
    place: tuple[int | slice, ...]


def blocks_of(
    sizes: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], most: int
) -> Iterator[Block]:
    """Yield the blocks that cover a part of a tensor, in order.

    Args:
        sizes: the sizes of the whole tensor.
        offsets: where the part begins in each dimension.
        lengths: the sizes of the part.
        most: the number of elements that a block should have at most.
    """
    if not sizes:
        yield Block(start=0, count=1, shape=(), cut=(), place=())
        return
    row = math.prod(sizes[1:])
    if row <= most or len(sizes) == 1:
        cut = tuple(
            slice(offset, offset + length) for offset, length in zip(offsets[1:], lengths[1:], strict=True)
        )
        step = max(1, most // max(1, row))
        for first in range(0, lengths[0], step):
            rows = min(step, lengths[0] - first)
            yield Block(
                start=(offsets[0] + first) * row,
                count=rows * row,
                shape=(rows, *sizes[1:]),
                cut=cut,
                place=(slice(first, first + rows),),
            )
        return
    for index in range(lengths[0]):
        for block in blocks_of(sizes[1:], offsets[1:], lengths[1:], most):
            yield Block(
                start=(offsets[0] + index) * row + block.start,
                count=block.count,
                shape=block.shape,
                cut=block.cut,
                place=(index, *block.place),
            )


class Extent(Protocol):
    """The place of a tensor in a file."""

    @property
    def path(self) -> str:
        """The path of the file."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor."""

    @property
    def start(self) -> int:
        """Where its header begins, which says where its bytes are."""

    @property
    def head_stop(self) -> int:
        """Where the header is expected to end."""

    @property
    def data(self) -> int:
        """Where its bytes are expected to begin; negative if that is not known yet."""

    @property
    def stop(self) -> int:
        """Where everything that belongs to it ends."""

    @property
    def is_scattered(self) -> bool:
        """Whether its elements are not stored row after row."""

    @property
    def has_tail(self) -> bool:
        """Whether a trailer after its bytes holds their checksum."""

    def find_data(self, head: bytes) -> int:
        """Return where its bytes begin, according to the header; raises Unusual."""

    def move(self, data: int) -> None:
        """Expect its bytes at *data*."""

    def checksum(self, tail: bytes) -> int | None:
        """Return the CRC-32 of its bytes if the trailer holds it; raises Unusual or Damaged."""

    def tensor_of(self, data: memoryview) -> torch.Tensor:
        """Return the tensor, given all bytes from start to stop; raises Unusual or Damaged."""


@dataclass(slots=True, kw_only=True)
class Item:
    """A tensor that is an item of a sharded checkpoint."""

    path: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int
    data: int = -1  # not known yet
    is_scattered: bool = False
    has_tail: bool = True

    @property
    def head_stop(self) -> int:
        """Where its bytes are expected to begin."""
        return self.data

    def find_data(self, head: bytes) -> int:
        """Return where its bytes begin."""
        return self.start + where_is_data(head, self.dtype, self.sizes)

    def move(self, data: int) -> None:
        """Expect its bytes at *data*."""
        self.data = data

    def checksum(self, tail: bytes) -> int | None:
        """Return the checksum in its archive."""
        return checksum_in(tail, self.stop - self.start, math.prod(self.sizes) * self.dtype.itemsize)

    def tensor_of(self, data: memoryview) -> torch.Tensor:
        """Return the tensor as ``torch.load`` reads it."""
        return load_tensor(data)


@dataclass(slots=True, kw_only=True)
class Record:
    """A tensor in a storage that is a record of a plain file of ``torch.save``.

    Attributes:
        entry: the record's entry in the central directory.
        offset: the tensor's first element in the storage.
        strides: the tensor's strides in the storage.
        is_conj: the tensor's values are the conjugates of the stored ones.
        is_neg: the tensor's values are the negatives of the stored ones.
    """

    path: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    entry: Entry
    offset: int
    strides: tuple[int, ...]
    head_stop: int
    is_conj: bool = False
    is_neg: bool = False
    is_scattered: bool = False
    has_tail: bool = False

    @property
    def start(self) -> int:
        """Where the header of the record begins."""
        return self.entry.header

    @property
    def data(self) -> int:
        """Where the tensor is expected to begin in it."""
        return self.head_stop + self.offset * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """Where the record ends."""
        return self.head_stop + self.entry.nbytes

    def find_data(self, head: bytes) -> int:
        """Return where the tensor begins."""
        try:
            found = data_start(self.entry.header, head[: LOCAL_HEADER.size])
        except NOT_UNDERSTOOD as error:
            raise Unusual(str(error)) from error
        return found + self.offset * self.dtype.itemsize

    def move(self, data: int) -> None:
        """Expect the tensor there."""
        self.head_stop += data - self.data

    def checksum(self, tail: bytes) -> int | None:
        """Return the record's checksum if the tensor is all of it."""
        whole = math.prod(self.sizes) * self.dtype.itemsize == self.entry.nbytes
        return self.entry.checksum or None if whole else None

    def tensor_of(self, data: memoryview) -> torch.Tensor:
        """Return the tensor over a copy of the storage."""
        start = self.find_data(bytes(data[: LOCAL_HEADER.size])) - self.offset * self.dtype.itemsize
        storage = torch.frombuffer(bytearray(data[start - self.start :]), dtype=torch.uint8).untyped_storage()
        tensor = torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.sizes, self.strides)
        tensor = torch._conj(tensor) if self.is_conj else tensor
        return torch._neg_view(tensor) if self.is_neg else tensor
