"""The zip archive that torch's writer made: where its records are, and where their checksums go.

Guarantees: nothing is assumed of the archive but the zip format (with zip64) and that records are
stored, not compressed; anything else is refused with the version of torch in the message. Pure: it
reads headers through a function it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from async_ckpt.errors import AsyncCheckpointError
from async_ckpt.format.directory import (
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
    """The files in an archive, in the order in which they were written; one list for each of their attributes.

    A list of objects would be one object a tensor more for Python's garbage collector to look at, in every save.

    Attributes:
        names: as in the archive.
        starts: where their bytes begin.
        stops: where they end.
        checksums: what torch gave as their CRC-32.
        nears: where the checksum stands beside the record: in the data descriptor behind it, or in the
            local header of an archive without descriptors.
        centrals: where it stands in the central directory.
    """

    names: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    nears: list[int] = field(default_factory=list)
    centrals: list[int] = field(default_factory=list)


def find_records(nbytes: int, read: _Read) -> tuple[Records, int]:
    """Find the records of an archive.

    Args:
        nbytes: length of the archive.
        read: returns a number of bytes from a place on; only asked for headers.

    Returns:
        The records, and where the central directory begins.

    Raises:
        AsyncCheckpointError: the archive is not of the kind that torch is known to write.
    """
    try:
        start, stop = _central_directory(nbytes, read)
        return _records(start, stop, read), start
    except NOT_UNDERSTOOD as error:
        raise AsyncCheckpointError(
            f"torch {torch.__version__} writes checkpoints in a way that is not known here ({error}); "
            "use a tested version of torch, or wrap a CheckpointIO that calls torch.save"
        ) from error


def _central_directory(nbytes: int, read: _Read) -> tuple[int, int]:
    tail = min(nbytes, _END_BYTES)
    return find_directory(read(nbytes - tail, tail), nbytes)


def _records(start: int, stop: int, read: _Read) -> Records:
    records = Records()
    for entry in list_entries(read(start, stop - start)):
        _expect(entry.method == 0, "a record is compressed")
        _expect(entry.nbytes == entry.packed_nbytes, "a stored record has two lengths")
        begin = data_start(entry.header, read(entry.header, LOCAL_HEADER.size))
        end = begin + entry.nbytes
        descriptor = bool(entry.flags & _HAS_DESCRIPTOR)
        if descriptor:
            _expect(read(end, 4) == b"PK\x07\x08", "no data descriptor")
        records.names.append(entry.name)
        records.starts.append(begin)
        records.stops.append(end)
        records.checksums.append(entry.checksum)
        records.nears.append(end + 4 if descriptor else entry.header + 14)
        records.centrals.append(start + entry.at + 16)
    return records


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
