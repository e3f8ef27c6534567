"""Cutting a file into parts."""

from __future__ import annotations

import itertools
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.format.checksum import combine, crc32
from async_ckpt.format.writing.parts import plan_parts


@given(st.integers(0, 10_000), st.integers(1, 3_000))
def test_parts_cover_the_file(nbytes: int, part_size: int) -> None:
    """Parts lie side by side from the first byte to the last, all but the last of the size asked for."""
    parts = plan_parts(nbytes, part_size)
    assert [part.index for part in parts] == list(range(len(parts)))
    assert parts[0].start == 0
    assert parts[-1].stop == nbytes
    assert all(left.stop == right.start for left, right in itertools.pairwise(parts))
    assert all(part.nbytes == part_size for part in parts[:-1])


def test_an_empty_file_has_one_part() -> None:
    """Even a file without a byte is put in one request."""
    (part,) = plan_parts(0, 5)
    assert part.nbytes == 0


@pytest.mark.parametrize("part_size", [0, -1])
def test_a_part_has_a_size(part_size: int) -> None:
    """Parts without bytes would never end."""
    with pytest.raises(ValueError, match="part"):
        plan_parts(10, part_size)


@given(st.binary(), st.binary())
def test_checksums_are_those_of_zip(first: bytes, second: bytes) -> None:
    """The checksum is CRC-32, and goes on from where it was."""
    assert crc32(memoryview(second), crc32(first, 0)) == zlib.crc32(first + second)


def test_combining_stays_within_64_bits() -> None:
    """The fingerprint's seed wraps around as a 64-bit integer does."""
    assert combine((1 << 64) - 1, (1 << 32) - 1) < 1 << 64
