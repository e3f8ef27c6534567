"""The zip archive that torch's writer made: where its records are, and where their checksums go.

Guarantees: nothing is assumed of the archive but the zip format (with zip64) and that records are
stored, not compressed; anything else is refused with the version of torch in the message. Pure: it
reads headers through a function it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from async_ckpt.errors import AsyncCheckpointError
from async_ckpt.format.directory import (
    LOCAL_HEADER,
    NOT_UNDERSTOOD,
    data_start,
    find_directory,
    list_entries,
)

__all__ = ["Record", "find_records"]

_END_BYTES = 98  # of the three structures that end an archive without a comment
_HAS_DESCRIPTOR = 0x0008
_Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One file in the archive.

    Attributes:
        name: as in the archive.
        start: where its bytes begin.
        stop: where they end.
        checksum: what torch gave as its CRC-32.
        near: where the checksum stands beside the record: in the data descriptor behind it, or in the
            local header of an archive without descriptors.
        central: where it stands in the central directory.
    """

    name: str
    start: int
    stop: int
    checksum: int
    near: int
    central: int


def find_records(nbytes: int, read: _Read) -> tuple[list[Record], int]:
    """Find the records of an archive.

    Args:
        nbytes: length of the archive.
        read: returns a number of bytes from a place on; only asked for headers.

    Returns:
        The records in the order in which they were written, and where the central directory begins.

    Raises:
        AsyncCheckpointError: the archive is not of the kind that torch is known to write.
    """
    try:
        start, stop = _central_directory(nbytes, read)
        return list(_records(start, stop, read)), start
    except NOT_UNDERSTOOD as error:
        raise AsyncCheckpointError(
            f"torch {torch.__version__} writes checkpoints in a way that is not known here ({error}); "
            "use a tested version of torch, or wrap a CheckpointIO that calls torch.save"
        ) from error


def _central_directory(nbytes: int, read: _Read) -> tuple[int, int]:
    tail = min(nbytes, _END_BYTES)
    return find_directory(read(nbytes - tail, tail), nbytes)


def _records(start: int, stop: int, read: _Read) -> Iterator[Record]:
    for entry in list_entries(read(start, stop - start)):
        _expect(entry.method == 0, "a record is compressed")
        _expect(entry.nbytes == entry.packed_nbytes, "a stored record has two lengths")
        begin = data_start(entry.header, read(entry.header, LOCAL_HEADER.size))
        end = begin + entry.nbytes
        descriptor = bool(entry.flags & _HAS_DESCRIPTOR)
        if descriptor:
            _expect(read(end, 4) == b"PK\x07\x08", "no data descriptor")
        yield Record(
            name=entry.name,
            start=begin,
            stop=end,
            checksum=entry.checksum,
            near=end + 4 if descriptor else entry.header + 14,
            central=start + entry.at + 16,
        )


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
