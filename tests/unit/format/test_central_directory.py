"""The zip format's directory, as far as it is not met in every file."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest

from async_ckpt.format.central_directory import NOT_UNDERSTOOD, Entry, find_directory, list_entries

GIB = 1 << 30


def archive(comment: bytes = b"") -> bytes:
    """Return an archive of two records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("x/version", b"3")
        made.writestr("x/data/0", bytes(1000))
        made.comment = comment
    return file.getvalue()


@pytest.mark.parametrize("comment", [b"", b"a comment", b"x" * 0xFFFF])
def test_what_the_standard_library_writes(comment: bytes) -> None:
    """The directory is found in any tail that holds its end, and tells what zipfile tells."""
    data = archive(comment)
    with zipfile.ZipFile(io.BytesIO(data)) as expected:
        for tail in (data, data[-len(comment) - 30 :]):
            start, stop = find_directory(tail, len(data))
            entries = list(list_entries(data[start:stop]))
            assert [(entry.name, entry.header, entry.nbytes, entry.checksum) for entry in entries] == [
                (info.filename, info.header_offset, info.file_size, info.CRC) for info in expected.infolist()
            ]


def test_sizes_beyond_32_bits() -> None:
    """Values that do not fit 32 bits are taken from the zip64 fields, those alone."""
    for values in ((5 * GIB, 5 * GIB, 6 * GIB), (100, 100, 6 * GIB), (5 * GIB, 5 * GIB, 7)):
        narrow = [min(value, 0xFFFFFFFF) for value in values]
        extra = b"".join(struct.pack("<Q", value) for value in values if value > 0xFFFFFFFF)
        extra = struct.pack("<2H", 0x4246, 3) + b"ZZZ" + struct.pack("<2H", 1, len(extra)) + extra
        fields = (
            b"PK\x01\x02",
            0,
            0,
            0,
            0,
            0,
            0,
            9,
            narrow[1],
            narrow[0],
            3,
            len(extra),
            0,
            0,
            0,
            0,
            narrow[2],
        )
        entry = struct.pack("<4s6H3L5H2L", *fields) + b"a/b" + extra
        for found in list_entries(entry * 2):
            assert (found.nbytes, found.packed_nbytes, found.header, found.name) == (*values, "a/b")


def test_an_end_beyond_32_bits() -> None:
    """A directory that lies beyond 4 GiB is found by the zip64 end, if the tail holds that."""
    nbytes = 5 * GIB + 98
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 1, 1, 60, 5 * GIB - 60)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 5 * GIB, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 60, 0xFFFFFFFF, 0)
    tail = end64 + locator + end
    assert find_directory(tail, nbytes) == (5 * GIB - 60, 5 * GIB)
    with pytest.raises(ValueError, match="zip64"):
        find_directory(tail[10:], nbytes)


@pytest.mark.parametrize("field", [12, 16], ids=["size", "offset"])
@pytest.mark.parametrize("change", [-1, 1, -100, 77, 1 << 24])
def test_a_directory_ends_where_the_file_does(field: int, change: int) -> None:
    """A wrong length or place, which could have the whole file taken for a directory, is noticed."""
    data = bytearray(archive())
    place = data.rindex(b"PK\x05\x06") + field
    number = int.from_bytes(data[place : place + 4], "little")
    data[place : place + 4] = ((number + change) % (1 << 32)).to_bytes(4, "little")
    with pytest.raises(NOT_UNDERSTOOD):
        _entries(bytes(data))


def test_an_entry_is_not_cut_short() -> None:
    """A directory that ends in the middle of an entry, even of its name, is an error."""
    data = archive()
    start, stop = find_directory(data, len(data))
    for end in range(stop - 60, stop):
        if data[end : end + 2] != b"PK":  # there the second entry begins
            with pytest.raises(NOT_UNDERSTOOD):
                list(list_entries(data[start:end]))


@pytest.mark.parametrize("data", [b"", b"PK", bytes(100), b"PK\x05\x06", archive()[:-30], archive()[30:]])
def test_what_is_no_archive(data: bytes) -> None:
    """Anything else raises one of the errors that callers expect, or makes no sense as a whole."""
    with pytest.raises(NOT_UNDERSTOOD):
        _entries(data)


def _entries(data: bytes) -> list[Entry]:
    start, stop = find_directory(data, len(data))
    return list(list_entries(data[start:stop]))
