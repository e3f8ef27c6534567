"""Records the output of torch's writer, for versions of torch that cannot skip the bytes of storages.

Guarantees: bytes of a storage are never read, only recognized by their address; all other bytes are copied when they
are emitted, as they are in torch's own memory.

The stand-ins are storages of the right sizes over a private anonymous mapping. Nothing reads or writes it, so none of
its pages is ever allocated.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from async_ckpt.snapshot import Storages
from async_ckpt.snapshot.host_pool import aligned
from async_ckpt.snapshot.torch_format import Record, open_writer
from async_ckpt.system.addresses import address_of

__all__ = ["INLINE_BYTES", "Pictured", "Reference", "Segment", "record_writing"]

INLINE_BYTES = 1024
"""Storages up to this length are copied, so that thousands of them do not become thousands of segments."""

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # has a name from Python 3.13 on
_LONGEST_PIECE = 64  # pieces longer than this are looked at even if no storage has their length


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Bytes *start* to *stop* of a storage of the snapshot."""

    storage: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Segment: TypeAlias = bytearray | Reference


class Pictured(Protocol):
    """What the writing of a file asks a snapshot for."""

    @property
    def storages(self) -> Storages:
        """The storages, once each."""

    @property
    def alignment(self) -> int:
        """What torch is to align storages to."""

    def view(self, index: int) -> memoryview:
        """Return the bytes of a storage."""


def record_writing(snapshot: Pictured, records: Sequence[Record]) -> list[Segment]:
    """Return the segments of the file of *snapshot*, without checksums, as torch writes it over stand-ins for storages.

    Args:
        snapshot: small storages are copied, others are referred to.
        records: the records of the archive.
    """
    stand_ins = _StandIns(snapshot.storages)
    recorder = _Recorder(stand_ins, snapshot.view)
    writer = open_writer(recorder, snapshot.alignment)
    for name, content in records:
        if isinstance(content, int):
            writer.write_record(name, stand_ins.storage(content), stand_ins.sizes[content])
        else:
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return recorder.segments


class _StandIns:
    """Storages with the sizes of the real ones, but without memory.

    Args:
        storages: the real ones.
    """

    def __init__(self, storages: Storages) -> None:
        self.sizes = [storage.nbytes for storage in storages]
        self._starts: list[int] = []
        total = 0
        for nbytes in self.sizes:
            self._starts.append(total)
            total += aligned(max(1, nbytes))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, max(1, total), flags=flags)
        self._address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()

    def storage(self, index: int) -> torch.UntypedStorage:
        """Return the stand-in for a storage."""
        nbytes, start = self.sizes[index], self._starts[index]
        if nbytes == 0:
            return torch.UntypedStorage(0, device="cpu")
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=start).untyped_storage()

    def find(self, address: int, nbytes: int) -> Reference | None:
        """Return the storage that the memory at *address* stands for, if any."""
        offset = address - self._address
        if not 0 <= offset < len(self._memory):
            return None
        index = bisect_right(self._starts, offset) - 1
        start = offset - self._starts[index]
        return Reference(storage=index, start=start, stop=start + nbytes)


class _Recorder:
    """A file to torch's writer.

    Args:
        stand_ins: recognize storages by their addresses.
        bytes_of: returns the real bytes of a storage; small ones are copied, so that thousands of them do not become
            thousands of segments.
    """

    def __init__(self, stand_ins: _StandIns, bytes_of: Callable[[int], memoryview]) -> None:
        self.segments: list[Segment] = []
        self._stand_ins = stand_ins
        self._bytes_of = bytes_of
        self._sizes = frozenset(stand_ins.sizes) - {0}

    def write(self, piece: memoryview | bytes) -> int:
        """Note a piece of the file."""
        nbytes = len(piece)
        if nbytes > _LONGEST_PIECE or nbytes in self._sizes:
            found = self._stand_ins.find(address_of(piece), nbytes)
            if found is not None and nbytes > INLINE_BYTES:
                self.segments.append(found)
                return nbytes
            if found is not None:
                piece = self._bytes_of(found.storage)[found.start : found.stop]
        if self.segments and isinstance(self.segments[-1], bytearray):
            self.segments[-1] += piece
        else:
            self.segments.append(bytearray(piece))
        return nbytes

    def flush(self) -> None:
        """Do nothing; torch calls it."""
