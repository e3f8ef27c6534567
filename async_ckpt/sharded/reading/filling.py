"""Puts parts of tensors from a file into the memory of a state.

Guarantees: a part that is contiguous in the file and in the state's memory goes straight there; any other part goes by
blocks. The header before the bytes is checked: if the bytes are not where they were expected, they are read again from
where they are. A tensor that is read as a whole is verified by its checksum.

What does not belong here: which parts are wanted (`reader`), how bytes are fetched (`fetching`).
"""

from __future__ import annotations

import ctypes
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from async_ckpt.format.checksum import crc32, joined_crc32
from async_ckpt.sharded.reading.extents import Block, Extent, blocks_of, run_of
from async_ckpt.sharded.reading.fetching import BLOCK_BYTES, Segment
from async_ckpt.sharded.reading.items import LONGEST_HEAD_BYTES, Damaged, Unusual

__all__ = ["Wanted", "compare", "whole_tensor"]

_SMALL_BYTES = 64 << 10
_HEAD, _TAIL, _WHOLE, _RUN = "head", "tail", "whole", "run"


@dataclass(slots=True, kw_only=True, eq=False)
class Wanted:
    """A part of a tensor, which has at least one element.

    Attributes:
        name: the tensor's name, for messages.
        extent: the tensor's place in a file.
        offsets: where the part begins in each dimension.
        lengths: the sizes of the part.
        resolve: returns the tensor to fill.
        commit: called with that tensor once it is filled.
        late: `resolve` must not be called before the bytes are there.
        unusual: the tensor has to be read as a whole, by ``torch.load``.
    """

    name: str
    extent: Extent
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    resolve: Callable[[], torch.Tensor]
    commit: Callable[[torch.Tensor], object]
    late: bool = False
    unusual: bool = False
    _target: torch.Tensor | None = None
    _left_nbytes: int = 0
    _found: int | None = None
    _again: bool = False
    _checksum: int | None = None
    _covered: bool = False
    _sums: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def is_read_whole(self) -> bool:
        """Whether the tensor is read together with its header, so that nothing is expected of where its bytes begin."""
        return self.unusual or self.extent.stop - self.extent.start <= _SMALL_BYTES

    def head(self) -> Segment:
        """Return the segment of the header, which says where the bytes begin."""
        nbytes = min(LONGEST_HEAD_BYTES, self.extent.stop - self.extent.start)
        return self._segment(self.extent.start, nbytes, _HEAD)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for tensors with headers of one length: those whose sizes take the same number of bytes in a pickle."""
        sizes = (*self.extent.sizes, math.prod(self.extent.sizes))
        return (self.extent.dtype, *(len(pickle.dumps(size, 2)) for size in sizes))

    def learn(self, head: Segment) -> int | None:
        """Return the length of the header; None if it cannot be read."""
        assert head.memory is not None
        try:
            return self.extent.find_data(bytes(head.memory)) - self.extent.start
        except Unusual:
            self.unusual = True
            return None

    def expect(self, head_nbytes: int) -> None:
        """Expect a header of that length."""
        self.extent.move(self.extent.start + head_nbytes)

    def segments(self) -> list[Segment]:
        """Return the segments to fetch."""
        extent = self.extent
        self._found = self._checksum = None
        self._again = False
        self._sums = []
        if self.is_read_whole:
            found = [self._segment(extent.start, extent.stop - extent.start, _WHOLE)]
        else:
            found = list(self._data())
            nbytes = math.prod(extent.sizes) * extent.dtype.itemsize
            self._covered = sum(segment.nbytes for segment in found) == nbytes
            found.append(self._segment(extent.start, extent.head_stop - extent.start, _HEAD))
            if self._covered and extent.has_tail:
                end = extent.data + nbytes
                found.append(self._segment(end, extent.stop - end, _TAIL))
            elif self._covered:
                self._checksum = extent.checksum(b"")
        self._left_nbytes = sum(segment.nbytes for segment in found)
        return found

    def arrived(self, segment: Segment) -> bool:
        """Take a segment that has arrived; return whether it was the last one.

        Raises:
            Damaged: it is not what was written.
        """
        memory = segment.memory
        assert memory is not None
        if segment.what is _HEAD:
            self._look(bytes(memory))
        elif segment.what is _TAIL:
            self._expect(bytes(memory))
        elif segment.what is _WHOLE:
            self._take_whole(memory)
        else:
            if self._covered:
                self._sums.append((segment.start, segment.nbytes, crc32(memory, 0)))
            if segment.what is not _RUN:
                self._copy(segment.what, memory)
        self._left_nbytes -= segment.nbytes
        return not self._left_nbytes

    def finish(self) -> bool:
        """Finish, once everything has arrived; return False if it has to be fetched again from elsewhere.

        Raises:
            Damaged: it is not what was written.
        """
        if self._found not in (None, self.extent.data):
            assert self._found is not None
            self.extent.move(self._found)
            self._again = True
        if self._again:
            return False
        if self._covered and self._checksum is not None:
            value = 0
            for _, nbytes, piece in sorted(self._sums):
                value = joined_crc32(value, piece, nbytes)
            compare(self._checksum, value)
        target = self._resolved()
        if not target.is_inference():  # its memory was written to: let autograd know
            with torch.no_grad():
                target.reshape(-1)[:0].zero_()
        self.commit(target)
        self._target = None
        return True

    # -- what to fetch

    def _data(self) -> Iterator[Segment]:
        extent, itemsize = self.extent, self.extent.dtype.itemsize
        run = None if self.late else run_of(extent.sizes, self.offsets, self.lengths)
        memory = None if run is None else self._memory()
        if run is not None and memory is not None:
            yield self._segment(extent.data + run[0] * itemsize, run[1] * itemsize, _RUN, memory)
            return
        for block in blocks_of(extent.sizes, self.offsets, self.lengths, BLOCK_BYTES // itemsize):
            yield self._segment(extent.data + block.start * itemsize, block.count * itemsize, block)

    def _segment(self, start: int, nbytes: int, what: Any, memory: memoryview | None = None) -> Segment:
        alone = memory is None and isinstance(what, Block)
        return Segment(
            path=self.extent.path,
            start=start,
            nbytes=nbytes,
            memory=memory,
            alone=alone,
            owner=self,
            what=what,
        )

    def _resolved(self) -> torch.Tensor:
        if self._target is None:
            self._target = self.resolve().detach()
            if tuple(self._target.shape) != self.lengths:
                raise ValueError(
                    f"{self.name!r} has room for {tuple(self._target.shape)}, and {self.lengths} is to go there"
                )
        return self._target

    def _memory(self) -> memoryview | None:
        """Return the memory of the target if the bytes of the file can go there unchanged."""
        target = self._resolved()
        plain = (
            type(target) in (torch.Tensor, torch.nn.Parameter)
            and target.device.type == "cpu"
            and target.layout is torch.strided
            and target.dtype == self.extent.dtype
            and target.is_contiguous()
            and not (target.is_conj() or target.is_neg() or target.is_quantized)
        )
        if not plain:
            return None
        nbytes = target.numel() * target.element_size()
        memory: Any = (ctypes.c_char * nbytes).from_address(target.data_ptr())
        memory.owner = target  # kept alive for a read that hangs
        return memoryview(memory).cast("B")

    # -- what has arrived

    def _look(self, head: bytes) -> None:
        try:
            self._found = self.extent.find_data(head)
        except Unusual:
            self.unusual = self._again = True

    def _expect(self, tail: bytes) -> None:
        if self._again or self._found not in (None, self.extent.data):
            return  # it is elsewhere
        try:
            self._checksum = self.extent.checksum(tail)
        except Unusual:
            self.unusual = self._again = True
        except Damaged:
            if self._found is None:  # the header has not arrived: the bytes may be elsewhere
                self.unusual = self._again = True
            else:
                raise

    def _copy(self, block: Block, memory: memoryview) -> None:
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(self.extent.dtype).view(block.shape)
        place = self._resolved()[block.place] if block.place else self._resolved()
        cut = (slice(None), *block.cut)
        with torch.no_grad():
            place.copy_(rows[cut] if block.shape else rows)

    def _take_whole(self, memory: memoryview) -> None:
        self._covered = False
        tensor = whole_tensor(self.extent, memory, unusual=self.unusual)
        part = tuple(
            slice(offset, offset + length) for offset, length in zip(self.offsets, self.lengths, strict=True)
        )
        with torch.no_grad():
            self._resolved().copy_(tensor[part] if part else tensor)


def whole_tensor(extent: Extent, memory: memoryview, *, unusual: bool = False) -> torch.Tensor:
    """Return a tensor, given all of its bytes.

    Args:
        extent: its place in a file.
        memory: the bytes from start to stop there.
        unusual: have ``torch.load`` read it in any case.

    Raises:
        Damaged: it is not what was written.
    """
    tensor = extent.tensor_of(memory) if unusual else _usual_tensor(extent, memory)
    if tensor.dtype != extent.dtype or tuple(tensor.shape) != extent.sizes:
        raise Damaged(f"it is a tensor of {tuple(tensor.shape)} of {tensor.dtype}")
    return tensor


def _usual_tensor(extent: Extent, memory: memoryview) -> torch.Tensor:
    try:
        begin = extent.find_data(bytes(memory[:LONGEST_HEAD_BYTES])) - extent.start
        count = math.prod(extent.sizes)
        end = begin + count * extent.dtype.itemsize
        checksum = extent.checksum(bytes(memory[end:]))
        if end > memory.nbytes:
            raise Damaged("it is cut short")
    except Unusual:
        return extent.tensor_of(memory)
    data = bytearray(memory[begin:end])  # of its own, and with that aligned
    if checksum is not None:
        compare(checksum, crc32(data, 0))
    return torch.frombuffer(data, dtype=torch.uint8).view(extent.dtype).view(extent.sizes)


def compare(expected: int, found: int) -> None:
    """Raise Damaged unless one CRC-32 is the other."""
    if found != expected:
        raise Damaged(f"it has the checksum {found:#010x} instead of {expected:#010x}")
