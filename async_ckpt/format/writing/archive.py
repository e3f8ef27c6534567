"""The zip archive of torch's writer: the offsets of its records and of their checksums.

Guarantees: nothing is assumed but the zip format, with zip64, and uncompressed records; anything else is refused with
torch's version in the message. Pure: it reads headers through a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from async_ckpt.errors import AsyncCheckpointError
from async_ckpt.format.central_directory import (
    LOCAL_HEADER,
    NOT_UNDERSTOOD,
    data_start,
    find_directory,
    list_entries,
)

__all__ = ["Records", "find_records"]

_END_BYTES = 98  # of the three structures that end an archive without a comment
_HAS_DESCRIPTOR = 0x0008
_Read = Callable[[int, int], bytes]


@dataclass(slots=True, kw_only=True)
class Records:
    """The records of an archive, in the order of writing, as one list for each attribute.

    A list of objects would add one object per tensor to every pass of Python's garbage collector.

    Attributes:
        names: as in the archive.
        starts: the offsets of their bytes.
        stops: the ends of their bytes.
        checksums: the CRC-32 that torch wrote.
        checksum_offsets: the offset of the checksum in the data descriptor after the record, or in the local header of
            an archive without descriptors.
        central_offsets: the offset of the checksum in the central directory.
    """

    names: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    checksum_offsets: list[int] = field(default_factory=list)
    central_offsets: list[int] = field(default_factory=list)


def find_records(nbytes: int, read: _Read) -> tuple[Records, int]:
    """Find the records of an archive.

    Args:
        nbytes: length of the archive.
        read: returns a number of bytes from an offset; called only for headers.

    Returns:
        The records, and the offset of the central directory.

    Raises:
        AsyncCheckpointError: the archive differs from those that torch is known to write.
    """
    try:
        start, stop = _central_directory(nbytes, read)
        return _records(start, stop, read), start
    except NOT_UNDERSTOOD as error:
        raise AsyncCheckpointError(
            f"torch {torch.__version__} writes checkpoints in an unknown format ({error}); "
            "use a tested version of torch, or wrap a CheckpointIO that calls torch.save"
        ) from error


def _central_directory(nbytes: int, read: _Read) -> tuple[int, int]:
    tail = min(nbytes, _END_BYTES)
    return find_directory(read(nbytes - tail, tail), nbytes)


def _records(start: int, stop: int, read: _Read) -> Records:
    records = Records()
    for entry in list_entries(read(start, stop - start)):
        _expect(entry.method == 0, "a record is compressed")
        _expect(entry.nbytes == entry.packed_nbytes, "an uncompressed record has two lengths")
        begin = data_start(entry.header, read(entry.header, LOCAL_HEADER.size))
        end = begin + entry.nbytes
        descriptor = bool(entry.flags & _HAS_DESCRIPTOR)
        if descriptor:
            _expect(read(end, 4) == b"PK\x07\x08", "no data descriptor")
        records.names.append(entry.name)
        records.starts.append(begin)
        records.stops.append(end)
        records.checksums.append(entry.checksum)
        records.checksum_offsets.append(end + 4 if descriptor else entry.header + 14)
        records.central_offsets.append(start + entry.at + 16)
    return records


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
