"""The zip archive that torch's writer made: where its records are, and where their checksums go.

Guarantees: nothing is assumed of the archive but the zip format (with zip64) and that records are
stored, not compressed; anything else is refused with the version of torch in the message. Pure: it
reads headers through a function it is given.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from async_ckpt.errors import AsyncCheckpointError

__all__ = ["Record", "find_records"]

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_SATURATED = 0xFFFFFFFF
_HAS_DESCRIPTOR = 0x0008
_ZIP64_EXTRA = 0x0001
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
    except (ValueError, struct.error, IndexError) as error:
        raise AsyncCheckpointError(
            f"torch {torch.__version__} writes checkpoints in a way that is not known here ({error}); "
            "use a tested version of torch, or wrap a CheckpointIO that calls torch.save"
        ) from error


def _central_directory(nbytes: int, read: _Read) -> tuple[int, int]:
    where = nbytes - _END.size
    magic, *_, size, offset, comment = _END.unpack(read(where, _END.size))
    _expect(magic == b"PK\x05\x06" and not comment, "no end of central directory")
    if _SATURATED in (size, offset):
        where -= _END64_LOCATOR.size
        magic, _, where64, _ = _END64_LOCATOR.unpack(read(where, _END64_LOCATOR.size))
        _expect(magic == b"PK\x06\x07", "no zip64 locator")
        magic, *_, size, offset = _END64.unpack(read(where64, _END64.size))
        _expect(magic == b"PK\x06\x06", "no zip64 end of central directory")
    return offset, offset + size


def _records(start: int, stop: int, read: _Read) -> Iterator[Record]:
    directory = read(start, stop - start)
    at = 0
    while at < len(directory):
        fields = _CENTRAL.unpack_from(directory, at)
        magic, flags, method, checksum = fields[0], fields[3], fields[4], fields[7]
        name_length, extra_length, comment_length = fields[10:13]
        _expect(magic == b"PK\x01\x02" and method == 0, "a record is compressed or has no header")
        name_start = at + _CENTRAL.size
        name_stop = name_start + name_length
        extra = directory[name_stop : name_stop + extra_length]
        size, packed, header = _sizes(fields[9], fields[8], fields[16], extra)
        _expect(size == packed, "a stored record has two lengths")
        begin = header + _local_length(header, read)
        descriptor = bool(flags & _HAS_DESCRIPTOR)
        if descriptor:
            _expect(read(begin + size, 4) == b"PK\x07\x08", "no data descriptor")
        yield Record(
            name=directory[name_start:name_stop].decode(),
            start=begin,
            stop=begin + size,
            checksum=checksum,
            near=begin + size + 4 if descriptor else header + 14,
            central=start + at + 16,
        )
        at = name_stop + extra_length + comment_length


def _sizes(size: int, packed: int, header: int, extra: bytes) -> tuple[int, int, int]:
    """Replace the values that do not fit 32 bits by those of the zip64 extra field."""
    values = [size, packed, header]
    while extra:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == _ZIP64_EXTRA:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            values = [next(wide, value) if value == _SATURATED else value for value in values]
        extra = extra[4 + length :]
    return values[0], values[1], values[2]


def _local_length(header: int, read: _Read) -> int:
    magic, *_, name_length, extra_length = _LOCAL.unpack(read(header, _LOCAL.size))
    _expect(magic == b"PK\x03\x04", "no local header")
    return _LOCAL.size + int(name_length) + int(extra_length)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
