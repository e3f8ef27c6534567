"""The sizes of parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.stores.sizes import fitting_part_size, shared_part_size

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


@pytest.mark.parametrize(
    ("nbytes", "wanted", "expected"),
    [
        (GIB, 32 * MIB, 32 * MIB),
        (GIB, MIB, 5 * MIB),
        (GIB, 6 * GIB, 5 * GIB),
        (5 * TIB, 32 * MIB, -(-5 * TIB // 10_000)),
        (0, 32 * MIB, 32 * MIB),
    ],
)
def test_sizes(nbytes: int, wanted: int, expected: int) -> None:
    """A part has the size that is wanted, or what comes nearest within the limits."""
    assert fitting_part_size(nbytes, wanted, least=5 * MIB, most=5 * GIB, max_parts=10_000) == expected


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, 16 * MIB),
        (40 * MIB, 16 * MIB),
        (100 * MIB + 1, 26 * MIB),
        (GIB, 128 * MIB),
        (GIB + 9000, 129 * MIB),
        (1126 * MIB, 94 * MIB),
        (5 * TIB, 129 * MIB),
    ],
)
def test_shares(nbytes: int, expected: int) -> None:
    """Files are cut so that all connections have as much to do, as far as that is worth a request."""
    assert shared_part_size(nbytes, 128 * MIB, at_a_time=4) == expected


@given(nbytes=st.integers(0, 1 << 40), wanted=st.integers(1 << 16, 1 << 30), at_a_time=st.integers(1, 32))
def test_shares_are_near_what_is_wanted(nbytes: int, wanted: int, at_a_time: int) -> None:
    """A part is never much larger than wanted, and every connection gets as many, but for the last ones' rest."""
    size = shared_part_size(nbytes, wanted, at_a_time=at_a_time)
    assert 0 < size <= wanted + 2 * min(MIB, wanted // 64)
    if size > 16 * MIB:
        assert -(-nbytes // size) <= -(-nbytes // (at_a_time * wanted)) * at_a_time


def test_too_large() -> None:
    """A file that no number of parts can hold is refused."""
    with pytest.raises(ValueError, match="more than 10 parts"):
        fitting_part_size(101, 1, least=1, most=10, max_parts=10)


@given(
    nbytes=st.integers(0, 10_000),
    wanted=st.integers(1, 500),
    least=st.integers(1, 50),
    span=st.integers(0, 500),
    max_parts=st.integers(1, 40),
    multiple=st.integers(1, 7),
)
def test_limits(nbytes: int, wanted: int, least: int, span: int, max_parts: int, multiple: int) -> None:
    """Whatever is asked for, the parts obey every limit, or the file is too large for any."""
    most = least + span + multiple
    limits = {"least": least, "most": most, "max_parts": max_parts, "multiple_of": multiple}
    try:
        size = fitting_part_size(nbytes, wanted, **limits)
    except ValueError:
        assert nbytes > (most // multiple * multiple) * max_parts
    else:
        assert least <= size <= most
        assert size % multiple == 0
        assert -(-nbytes // size) <= max_parts
