"""The object that a rank writes, by reference: its items one after the other, each a file of ``torch.save``.

Guarantees: any range of bytes may be read at any time, in any order, by any number of threads, and is always the same.
Tensors are read from the snapshot only when their bytes are needed. With ISA-L, each tensor's checksum is computed only
once, even if a part needs its own checksum.

What does not belong here: which items a rank writes (`plan`), the bytes around a tensor (`archive`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

from async_ckpt.format.checksum import crc32, crc32_combine
from async_ckpt.sharded.writing.archive import Template
from async_ckpt.snapshot.regions import Region

__all__ = ["Item", "Memory", "Shard", "TensorItem"]

_CHECKSUM_BYTES = 32 << 20
"""How many bytes are read at a time for a checksum; they may have to be copied from a device."""

_SMALL_BYTES = 16 << 10
"""Pieces up to this length are joined, to send fewer of them."""


class TensorItem(NamedTuple):
    """A tensor: where its bytes are, and the file that contains them."""

    template: Template
    region: Region

    @property
    def nbytes(self) -> int:
        """The length of its file."""
        return self.template.nbytes


Item: TypeAlias = TensorItem | bytes
"""One item of the object; a pickled value is a file already."""


class Bytes(Protocol):
    """Bytes that are fetched when they are read."""

    def __getitem__(self, which: slice, /) -> memoryview:
        """Return a range of them."""


class Memory(Protocol):
    """The memory of tensors, such as a snapshot."""

    def view(self, index: int) -> Bytes:
        """Return the bytes of a storage."""


class Shard:
    """The object by reference; satisfies ``stores.base.Content``.

    Args:
        items: in the order of the object.
        memory: where the tensors' bytes are, such as a snapshot; must stay open as long as this is read.
    """

    def __init__(self, items: Sequence[Item], memory: Memory | None = None) -> None:
        self._items = items
        self._memory = memory
        self._starts: list[int] = []
        self._nbytes = 0
        for item in items:
            self._starts.append(self._nbytes)
            self._nbytes += _length(item)
        self._sums: dict[int, list[tuple[int, int, int]]] = {}  # by item: pieces in order, with their CRC-32

    @property
    def nbytes(self) -> int:
        """The length of the object in bytes."""
        return self._nbytes

    def read(self, start: int, stop: int) -> list[memoryview]:
        """Return the bytes *start* to *stop*. Computes the checksums among them: call it in a worker."""
        found: list[memoryview] = []
        small = bytearray()
        for piece in self._pieces(start, stop):
            if len(piece.view) <= _SMALL_BYTES:
                small += piece.view
                continue
            if small:
                found.append(memoryview(small).toreadonly())
                small = bytearray()
            found.append(piece.view)
        return [*found, memoryview(small).toreadonly()] if small else found

    def steps(self, start: int, stop: int, step_bytes: int) -> Iterator[list[memoryview]]:
        """Yield the bytes *start* to *stop* in order, in steps, each read as it is asked for. Call it in a worker."""
        for begin in range(start, stop, step_bytes):
            end = min(begin + step_bytes, stop)
            self._sum_cut_items(begin, end)
            yield self.read(begin, end)

    def crc32(self, start: int, stop: int) -> int:
        """Return the CRC-32 of these bytes. Blocks: call it in a worker."""
        value = 0
        for piece in self._pieces(start, stop):
            if piece.item is None or crc32_combine is None:
                value = crc32(piece.view, value)
                continue
            checksum = crc32(piece.view, 0)
            self._sums.setdefault(piece.item, []).append(
                (piece.start, piece.start + len(piece.view), checksum)
            )
            value = crc32_combine(value, checksum, len(piece.view))
        return value

    def _sum_cut_items(self, start: int, stop: int) -> None:
        """Note the checksums of the tensors of which only a piece is in the range."""
        first, last = bisect_right(self._starts, start) - 1, bisect_right(self._starts, stop - 1) - 1
        for number in {first, last} if crc32_combine is not None else ():
            item, at = self._items[number], self._starts[number]
            if isinstance(item, bytes):
                continue
            data = at + item.template.head_nbytes
            begin, end = max(start - data, 0), min(stop - data, item.template.data_nbytes)
            if begin < end and end - begin < item.template.data_nbytes:
                checksum = crc32(self._data(item, begin, end), 0)
                self._sums.setdefault(number, []).append((begin, end, checksum))

    def _pieces(self, start: int, stop: int) -> Iterator[_Piece]:
        if not 0 <= start <= stop <= self._nbytes:
            raise ValueError(f"bytes {start} to {stop} are not in an object of {self._nbytes} bytes")
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            item, at = self._items[number], self._starts[number]
            end = min(stop, at + _length(item))
            if start < end:
                yield from self._pieces_of(number, item, start - at, end - at)
            start = end
            number += 1

    def _pieces_of(self, number: int, item: Item, start: int, stop: int) -> Iterator[_Piece]:
        """Yield the bytes *start* to *stop* of one item."""
        if isinstance(item, bytes):
            yield _Piece(memoryview(item)[start:stop])
            return
        head_nbytes = item.template.head_nbytes
        data_stop = head_nbytes + item.template.data_nbytes
        checksum = partial(self._checksum, number, item)
        if start < head_nbytes:
            yield _Piece(memoryview(item.template.head(checksum))[start : min(stop, head_nbytes)])
        begin, end = max(start, head_nbytes) - head_nbytes, min(stop, data_stop) - head_nbytes
        if begin < end:
            yield _Piece(self._data(item, begin, end), number, begin)
        if stop > data_stop:
            tail = memoryview(item.template.tail(checksum()))
            yield _Piece(tail[max(start - data_stop, 0) : stop - data_stop])

    def _data(self, item: TensorItem, begin: int, end: int) -> memoryview:
        storage, start, _ = item.region
        assert self._memory is not None, "tensors come from somewhere"
        return self._memory.view(storage)[start + begin : start + end]

    def _checksum(self, number: int, item: TensorItem) -> int:
        """Return the CRC-32 of a tensor's bytes; ranges that were computed before are reused."""
        value = at = 0
        if crc32_combine is not None:
            for begin, end, checksum in sorted(self._sums.get(number, ())):
                if begin == at:
                    value, at = crc32_combine(value, checksum, end - begin), end
        for begin in range(at, item.region.nbytes, _CHECKSUM_BYTES):
            value = crc32(self._data(item, begin, min(begin + _CHECKSUM_BYTES, item.region.nbytes)), value)
        return value


class _Piece(NamedTuple):
    """Some bytes. If they are a tensor's: the number of its item, and where in the tensor they begin."""

    view: memoryview
    item: int | None = None
    start: int = 0


def _length(item: Item) -> int:
    return len(item) if isinstance(item, bytes) else item.template.nbytes
