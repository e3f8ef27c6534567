"""How ranks that write to one directory share what S3 takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.stores.s3.sharing import LEAST_PART_BYTES, MAX_PARTS, apart_seconds, part_size_for

MIB = 1 << 20
WANTED = 128 * MIB


def test_a_single_writer_waits_for_nobody() -> None:
    """Who writes alone sends as it likes, in parts as they were."""
    assert apart_seconds(1) == 0.0
    assert part_size_for(1 << 30, WANTED, at_a_time=4, writers=1) == WANTED
    assert part_size_for(64 * MIB, WANTED, at_a_time=4, writers=1) == 16 * MIB


@pytest.mark.parametrize("writers", [8, 256, 4096])
def test_together_they_stay_below_what_s3_takes(writers: int) -> None:
    """S3 refuses more than 3,500 writes a second for a prefix."""
    assert writers / apart_seconds(writers) < 3500


def test_many_writers_send_larger_parts() -> None:
    """With 4,096 ranks an object of 64 MiB goes in one request, and one of 2 GiB in four."""
    assert part_size_for(64 * MIB, WANTED, at_a_time=4, writers=4096) >= 64 * MIB
    assert -(-(2 << 30) // part_size_for(2 << 30, WANTED, at_a_time=4, writers=4096)) == 4


@given(nbytes=st.integers(0, 5 << 40), wanted=st.integers(1, 8 << 30), writers=st.integers(1, 1 << 20))
def test_sizes_are_what_s3_takes(nbytes: int, wanted: int, writers: int) -> None:
    """However many ranks there are, parts have sizes that S3 takes."""
    size = part_size_for(nbytes, wanted, at_a_time=4, writers=writers)
    assert LEAST_PART_BYTES <= size <= 5 << 30
    assert -(-nbytes // size) <= MAX_PARTS
