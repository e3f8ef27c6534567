"""The central directory of a zip archive: its entries and their offsets. Pure.

Guarantees: nothing is assumed beyond the zip format, with zip64. A directory that is not understood raises one of
`NOT_UNDERSTOOD`, and never gives a wrong result.

What does not belong here: torch's use of archives (`archive`), reading files (`file`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["LOCAL_HEADER", "NOT_UNDERSTOOD", "Entry", "data_start", "find_directory", "list_entries"]

NOT_UNDERSTOOD = (ValueError, struct.error, IndexError)
LOCAL_HEADER = struct.Struct("<4s5H3L2H")

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_SATURATED = 0xFFFFFFFF
_ZIP64_EXTRA = 0x0001


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of the directory.

    Attributes:
        name: the record's name.
        flags: the zip format's general purpose flags.
        method: the compression method; 0 is none.
        checksum: the record's CRC-32.
        nbytes: its length.
        packed_nbytes: its length in the archive.
        header: the offset of its local header.
        at: the offset of the entry in the directory.
    """

    name: str
    flags: int
    method: int
    checksum: int
    nbytes: int
    packed_nbytes: int
    header: int
    at: int


def find_directory(tail: bytes | memoryview, nbytes: int) -> tuple[int, int]:
    """Find the directory of an archive of *nbytes* bytes, given its tail.

    Args:
        tail: the last bytes of the archive, however many.
        nbytes: length of the archive.

    Returns:
        The offsets of the directory's beginning and end.

    Raises:
        ValueError: there is no directory, or a longer tail is needed.
    """
    tail = bytes(tail[-(_END.size + 0xFFFF + _END64.size + _END64_LOCATOR.size) :])  # the longest comment
    base = nbytes - len(tail)
    at = tail.rfind(b"PK\x05\x06")
    _expect(at >= 0, "no end of central directory")
    end = base + at
    *_, size, offset, _ = _END.unpack_from(tail, at)
    at -= _END64_LOCATOR.size
    if at >= 0 and tail.startswith(b"PK\x06\x07", at):  # it counts wherever it is, to torch as well
        _, _, where, _ = _END64_LOCATOR.unpack_from(tail, at)
        _expect(where >= base, "zip64's end of the central directory is further away")
        magic, *_, size, offset = _END64.unpack_from(tail, where - base)
        _expect(magic == b"PK\x06\x06", "no zip64 end of central directory")
        end = where
    else:
        _expect(_SATURATED not in (size, offset), "no zip64 locator")
    # Otherwise, a wrong number could make nearly the whole file count as the directory.
    _expect(offset + size == end, "the central directory is not where it should be")
    return offset, offset + size


def list_entries(directory: bytes | memoryview) -> Iterator[Entry]:
    """Return the entries of a directory, in order.

    Raises:
        ValueError, struct.error: it is no directory.
    """
    at = 0
    while at < len(directory):
        fields = _CENTRAL.unpack_from(directory, at)
        name_length, extra_length, comment_length = fields[10:13]
        _expect(fields[0] == b"PK\x01\x02", "a record has no header")
        name_start = at + _CENTRAL.size
        name_stop = name_start + name_length
        nbytes, packed, header = fields[9], fields[8], fields[16]
        if _SATURATED in (nbytes, packed, header):
            nbytes, packed, header = _wide(
                nbytes, packed, header, directory[name_stop : name_stop + extra_length]
            )
        yield Entry(
            name=bytes(directory[name_start:name_stop]).decode(),
            flags=fields[3],
            method=fields[4],
            checksum=fields[7],
            nbytes=nbytes,
            packed_nbytes=packed,
            header=header,
            at=at,
        )
        at = name_stop + extra_length + comment_length
    _expect(at == len(directory), "the last entry is cut short")


def data_start(header: int, local_header: bytes | memoryview) -> int:
    """Return the offset of a record's bytes, given its local header, which is at *header*."""
    magic, *_, name_length, extra_length = LOCAL_HEADER.unpack(local_header)
    _expect(magic == b"PK\x03\x04", "no local header")
    return header + LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _wide(nbytes: int, packed: int, header: int, extra: bytes | memoryview) -> tuple[int, int, int]:
    """Replace values that do not fit 32 bits by those of the zip64 extra field."""
    values = [nbytes, packed, header]
    while extra:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == _ZIP64_EXTRA:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            values = [next(wide, value) if value == _SATURATED else value for value in values]
        extra = extra[4 + length :]
    return values[0], values[1], values[2]


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
