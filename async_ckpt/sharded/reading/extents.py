"""Which bytes of a file a part of a tensor is. Pure.

Guarantees: a part that lies together in the file is one run of bytes, and nothing beside it; any other part comes by
blocks, each a run that covers whole rows, and no longer than asked for unless a single element is.

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
    """Return where the elements of a part begin, row after row, and how many they are; None if others are among them.

    Args:
        sizes: of the whole tensor.
        offsets: where the part begins in each dimension.
        lengths: how far it goes.
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
    """Rows that lie together in a tensor, and what of them is wanted.

    Attributes:
        start: its first element.
        count: how many elements it has.
        shape: of the rows.
        cut: what of them is wanted: where it begins and how far it goes, in each dimension but the first.
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
        sizes: of the whole tensor.
        offsets: where the part begins in each dimension.
        lengths: how far it goes.
        most: elements that a block should have.
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
    """Where a tensor is in a file."""

    @property
    def path(self) -> str:
        """Of the file."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""

    @property
    def start(self) -> int:
        """Where what tells where its bytes are begins."""

    @property
    def head_stop(self) -> int:
        """Where that is expected to end."""

    @property
    def data(self) -> int:
        """Where the bytes are expected to begin; negative where nothing is known of it."""

    @property
    def stop(self) -> int:
        """Where what belongs to it ends."""

    @property
    def is_scattered(self) -> bool:
        """Whether its elements do not follow each other, row after row."""

    @property
    def has_tail(self) -> bool:
        """Whether what comes after the bytes says their checksum."""

    def find_data(self, head: bytes) -> int:
        """Return where the bytes begin, by what stands before them; raises Unusual."""

    def move(self, data: int) -> None:
        """Expect the bytes there."""

    def checksum(self, tail: bytes) -> int | None:
        """Return the CRC-32 of the bytes, if it is known; raises Unusual or Damaged."""

    def tensor_of(self, data: memoryview) -> torch.Tensor:
        """Return the tensor, from all that is between start and stop; raises Unusual or Damaged."""


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
        """Expect its bytes there."""
        self.data = data

    def checksum(self, tail: bytes) -> int | None:
        """Return what its archive says."""
        return checksum_in(tail, self.stop - self.start, math.prod(self.sizes) * self.dtype.itemsize)

    def tensor_of(self, data: memoryview) -> torch.Tensor:
        """Return what ``torch.load`` makes of it."""
        return load_tensor(data)


@dataclass(slots=True, kw_only=True)
class Record:
    """A tensor in a storage that is a record of a plain file of ``torch.save``.

    Attributes:
        entry: of the record.
        offset: of the tensor's first element in the storage.
        strides: of its elements there.
        is_conj: the numbers that are meant are the conjugates of those that are there.
        is_neg: the same, with their signs changed.
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
        """Return that of the record, if the tensor is all of it."""
        whole = math.prod(self.sizes) * self.dtype.itemsize == self.entry.nbytes
        return self.entry.checksum or None if whole else None

    def tensor_of(self, data: memoryview) -> torch.Tensor:
        """Return the tensor over the storage, as torch does of such a one."""
        start = self.find_data(bytes(data[: LOCAL_HEADER.size])) - self.offset * self.dtype.itemsize
        storage = torch.frombuffer(bytearray(data[start - self.start :]), dtype=torch.uint8).untyped_storage()
        tensor = torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.sizes, self.strides)
        tensor = torch._conj(tensor) if self.is_conj else tensor
        return torch._neg_view(tensor) if self.is_neg else tensor
