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
_HEADER, _TRAILER, _WHOLE, _RUN = "header", "trailer", "whole", "run"


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
        is_late: whether `resolve` must not be called before the bytes have been fetched.
        is_unusual: whether the tensor must be read as a whole, by ``torch.load``.
    """

    name: str
    extent: Extent
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    resolve: Callable[[], torch.Tensor]
    commit: Callable[[torch.Tensor], object]
    is_late: bool = False
    is_unusual: bool = False
    _target: torch.Tensor | None = None
    _missing_nbytes: int = 0
    _found: int | None = None
    _must_fetch_again: bool = False
    _checksum: int | None = None
    _is_all_fetched: bool = False
    _checksums: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def is_read_whole(self) -> bool:
        """Whether the tensor is read together with its header, so that no header need be fetched before."""
        return self.is_unusual or self.extent.stop - self.extent.start <= _SMALL_BYTES

    def header_segment(self) -> Segment:
        """Return the segment of the header, which says where the bytes begin."""
        nbytes = min(LONGEST_HEAD_BYTES, self.extent.stop - self.extent.start)
        return self._segment(self.extent.start, nbytes, _HEADER)

    @property
    def header_kind(self) -> tuple[object, ...]:
        """Equal for tensors whose headers have the same length, as their sizes take equally many bytes in a pickle."""
        sizes = (*self.extent.sizes, math.prod(self.extent.sizes))
        return (self.extent.dtype, *(len(pickle.dumps(size, 2)) for size in sizes))

    def read_header(self, segment: Segment) -> int | None:
        """Return the length of the header; None if it cannot be read."""
        assert segment.memory is not None
        try:
            return self.extent.find_data(bytes(segment.memory)) - self.extent.start
        except Unusual:
            self.is_unusual = True
            return None

    def expect_header(self, head_nbytes: int) -> None:
        """Expect a header with *head_nbytes* bytes."""
        self.extent.move(self.extent.start + head_nbytes)

    def segments(self) -> list[Segment]:
        """Return the segments to fetch."""
        extent = self.extent
        self._found = self._checksum = None
        self._must_fetch_again = False
        self._checksums = []
        if self.is_read_whole:
            found = [self._segment(extent.start, extent.stop - extent.start, _WHOLE)]
        else:
            found = list(self._data())
            nbytes = math.prod(extent.sizes) * extent.dtype.itemsize
            self._is_all_fetched = sum(segment.nbytes for segment in found) == nbytes
            found.append(self._segment(extent.start, extent.head_stop - extent.start, _HEADER))
            if self._is_all_fetched and extent.has_tail:
                end = extent.data + nbytes
                found.append(self._segment(end, extent.stop - end, _TRAILER))
            elif self._is_all_fetched:
                self._checksum = extent.checksum(b"")
        self._missing_nbytes = sum(segment.nbytes for segment in found)
        return found

    def receive(self, segment: Segment) -> bool:
        """Use a segment that was fetched; return whether it was the last one.

        Raises:
            Damaged: its checksum or its header is wrong.
        """
        memory = segment.memory
        assert memory is not None
        if segment.what is _HEADER:
            self._read_header(bytes(memory))
        elif segment.what is _TRAILER:
            self._read_trailer(bytes(memory))
        elif segment.what is _WHOLE:
            self._use_item(memory)
        else:
            if self._is_all_fetched:
                self._checksums.append((segment.start, segment.nbytes, crc32(memory, 0)))
            if segment.what is not _RUN:
                self._copy(segment.what, memory)
        self._missing_nbytes -= segment.nbytes
        return not self._missing_nbytes

    def finish(self) -> bool:
        """Finish once all segments were used; return False if they must be fetched again from another place.

        Raises:
            Damaged: its checksum or its header is wrong.
        """
        if self._found not in (None, self.extent.data):
            assert self._found is not None
            self.extent.move(self._found)
            self._must_fetch_again = True
        if self._must_fetch_again:
            return False
        if self._is_all_fetched and self._checksum is not None:
            value = 0
            for _, nbytes, piece in sorted(self._checksums):
                value = joined_crc32(value, piece, nbytes)
            compare(self._checksum, value)
        target = self._resolved()
        if not target.is_inference():  # tell autograd that its memory was written to
            with torch.no_grad():
                target.reshape(-1)[:0].zero_()
        self.commit(target)
        self._target = None
        return True

    # -- what to fetch

    def _data(self) -> Iterator[Segment]:
        extent, itemsize = self.extent, self.extent.dtype.itemsize
        run = None if self.is_late else run_of(extent.sizes, self.offsets, self.lengths)
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
                    f"cannot load {self.name!r}: the planner returned a tensor of shape "
                    f"{tuple(self._target.shape)} for a part of shape {self.lengths}"
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

    # -- what was fetched

    def _read_header(self, head: bytes) -> None:
        try:
            self._found = self.extent.find_data(head)
        except Unusual:
            self.is_unusual = self._must_fetch_again = True

    def _read_trailer(self, tail: bytes) -> None:
        if self._must_fetch_again or self._found not in (None, self.extent.data):
            return  # it will be fetched again from another place
        try:
            self._checksum = self.extent.checksum(tail)
        except Unusual:
            self.is_unusual = self._must_fetch_again = True
        except Damaged:
            if self._found is None:  # without the header, it is not known whether these are the right bytes
                self.is_unusual = self._must_fetch_again = True
            else:
                raise

    def _copy(self, block: Block, memory: memoryview) -> None:
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(self.extent.dtype).view(block.shape)
        place = self._resolved()[block.place] if block.place else self._resolved()
        cut = (slice(None), *block.cut)
        with torch.no_grad():
            place.copy_(rows[cut] if block.shape else rows)

    def _use_item(self, memory: memoryview) -> None:
        self._is_all_fetched = False
        tensor = whole_tensor(self.extent, memory, is_unusual=self.is_unusual)
        part = tuple(
            slice(offset, offset + length) for offset, length in zip(self.offsets, self.lengths, strict=True)
        )
        with torch.no_grad():
            self._resolved().copy_(tensor[part] if part else tensor)


def whole_tensor(extent: Extent, memory: memoryview, *, is_unusual: bool = False) -> torch.Tensor:
    """Return a tensor, given all of its bytes.

    Args:
        extent: its place in a file.
        memory: the bytes from start to stop there.
        is_unusual: whether ``torch.load`` must read it.

    Raises:
        Damaged: its checksum or its header is wrong.
    """
    tensor = extent.tensor_of(memory) if is_unusual else _usual_tensor(extent, memory)
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
            raise Damaged("it is truncated")
    except Unusual:
        return extent.tensor_of(memory)
    data = bytearray(memory[begin:end])  # a copy, and so aligned
    if checksum is not None:
        compare(checksum, crc32(data, 0))
    return torch.frombuffer(data, dtype=torch.uint8).view(extent.dtype).view(extent.sizes)


def compare(expected: int, found: int) -> None:
    """Raise Damaged unless the two CRC-32 are equal."""
    if found != expected:
        raise Damaged(f"it has the checksum {found:#010x} instead of {expected:#010x}")
