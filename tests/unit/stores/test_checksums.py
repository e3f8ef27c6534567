"""The checksums of parts."""

from __future__ import annotations

import pytest

from async_ckpt.stores.checksums import as_text, crc32c

DATA = bytes(range(256)) * 5000


@pytest.mark.parametrize("step", [1000, 333_333, len(DATA)])
def test_pieces_make_no_difference(step: int) -> None:
    """The checksum of pieces is that of their bytes, wherever they are cut, writable or not."""
    pieces = [memoryview(bytearray(DATA[at : at + step])) for at in range(0, len(DATA), step)]
    assert crc32c(pieces) == crc32c([memoryview(DATA)])


def test_known_values() -> None:
    """CRC-32C has the value that its definition gives for "123456789", and can be continued."""
    pytest.importorskip("google_crc32c")
    assert crc32c([memoryview(b"123456789")]) == 0xE3069283
    assert crc32c([memoryview(b"6789")], crc32c([memoryview(b"12345")])) == 0xE3069283


def test_text() -> None:
    """Headers have the four bytes in base64, the highest first."""
    assert as_text(0xE3069283) == "4waSgw=="
    assert as_text(0) == "AAAAAA=="
