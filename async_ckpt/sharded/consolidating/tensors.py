"""The tensors of a sharded checkpoint and their chunks. Everything is counted in bytes.

Guarantees: a tensor is refused unless its chunks make it up, each element once, and none is longer than its item.

What does not belong here: fetching chunks (`gathering`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from async_ckpt.sharded.consolidating.geometry import boxes_of, count_before, place_of
from async_ckpt.sharded.consolidating.sums import Sums
from async_ckpt.sharded.reading.extents import Item
from async_ckpt.sharded.reading.origins import Directory

__all__ = ["Chunk", "Tensor", "tensors_of"]

_MOST_BY_ONE_THREAD = 32_767  # elements; from the next on, torch shares the work out


class Tensor:
    """One tensor.

    Args:
        sizes: its sizes; the last dimension is that of the bytes of an element.
        chunks: its chunks.

    Attributes:
        nbytes: its length.
        sums: the checksums of the ranges that have been gathered.
    """

    def __init__(self, sizes: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
        self.nbytes = math.prod(sizes)
        self.chunks = chunks
        self.sums = Sums()


class Chunk:
    """A part of a tensor, which has at least one element, and is an item of the checkpoint.

    Args:
        name: the name of the tensor.
        item: its place in a file.
        sizes: the sizes of the tensor.
        offsets: where it begins in the tensor, in each dimension.
        lengths: its own sizes.

    Attributes:
        nbytes: its length.
        is_unusual: whether it has to be read as a whole, by ``torch.load``.
        checksum: the CRC-32 that its item holds, once that has been read.
        sums: the checksums of the runs that have been fetched.
        lock: guards the attributes below.
        flat: the bytes of an unusual chunk, until all of them have been used.
        left_nbytes: how many of those have not been used yet.
    """

    def __init__(
        self,
        name: str,
        item: Item,
        sizes: tuple[int, ...],
        offsets: tuple[int, ...],
        lengths: tuple[int, ...],
    ) -> None:
        self.name = name
        self.item = item
        self._sizes = sizes
        self._offsets = offsets
        self._lengths = lengths
        self.nbytes = math.prod(lengths)
        self.is_unusual = False
        self.checksum: int | None = None
        self.sums = Sums()
        self.lock = threading.Lock()
        self.flat: torch.Tensor | None = None
        self.left_nbytes = 0

    def count_before(self, at: int) -> int:
        """Return how many of its bytes come before byte *at* of the tensor."""
        return count_before(self._sizes, self._offsets, self._lengths, at)

    def place_of(self, at: int) -> int:
        """Return which byte of the tensor its byte *at* is."""
        return place_of(self._sizes, self._offsets, self._lengths, at)

    def is_together(self, start: int, stop: int) -> bool:
        """Return whether its bytes *start* to *stop* are contiguous in the tensor, too."""
        return self.place_of(stop - 1) - self.place_of(start) == stop - 1 - start

    def copy(self, start: int, data: torch.Tensor, memory: memoryview, base: int) -> None:
        """Copy some of its bytes to their places in the tensor.

        Args:
            start: the first of these bytes in the chunk.
            data: these bytes.
            memory: the memory for a range of the tensor.
            base: where in the tensor that range begins.
        """
        target, stop = torch.frombuffer(memory, dtype=torch.uint8), start + data.numel()
        for box in boxes_of(self._sizes, self._offsets, self._lengths, start, stop):
            first = box.start - start
            source = data[first : first + math.prod(box.shape)].view(box.shape)
            _spread(source, torch.as_strided(target, box.shape, box.strides, box.place - base))


def _spread(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy *source* to *target*, in pieces for which torch starts no threads: they would wait for each other."""
    count = source.numel()
    if count <= _MOST_BY_ONE_THREAD:
        target.copy_(source)
        return
    each = count // len(source)
    if each > _MOST_BY_ONE_THREAD:
        for one, other in zip(source, target, strict=True):
            _spread(one, other)
        return
    step = _MOST_BY_ONE_THREAD // each
    for first in range(0, len(source), step):
        target[first : first + step].copy_(source[first : first + step])


def tensors_of(metadata: Metadata, origin: Directory) -> list[Tensor]:
    """Return the tensors, in the order of *metadata*.

    Raises:
        CorruptCheckpointError: ``.metadata`` does not say where all of their elements are.
    """
    return [
        _tensor(described, name, origin)
        for name, described in metadata.state_dict_metadata.items()
        if isinstance(described, TensorStorageMetadata)
    ]


def _tensor(described: TensorStorageMetadata, name: str, origin: Directory) -> Tensor:
    last = described.properties.dtype.itemsize
    sizes = (*described.size, last)
    origin.check_chunks(name)
    chunks, known = [], set()
    for number, each in enumerate(described.chunks):
        index = MetadataIndex(name, each.offsets, number)
        if not each.sizes.numel() or (each.offsets, each.sizes) in known:
            continue
        known.add((each.offsets, each.sizes))
        item = origin.extent(_read_all(index, each.sizes))
        chunks.append(Chunk(name, item, sizes, (*each.offsets, 0), (*each.sizes, last)))
    return Tensor(sizes, chunks)


def _read_all(index: MetadataIndex, sizes: torch.Size) -> ReadItem:
    zeros = torch.Size([0] * len(sizes))
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=index,
        dest_offsets=zeros,
        storage_index=index,
        storage_offsets=zeros,
        lengths=sizes,
    )
