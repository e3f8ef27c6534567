"""The count of host bytes."""

from __future__ import annotations

import pytest

from async_ckpt.snapshot.budget import Budget


def test_the_limit_holds() -> None:
    """What fits is what stays within the limit beside what is held (B1)."""
    budget = Budget(100)
    budget.reserve(60)
    assert budget.fits(40)
    assert not budget.fits(41)
    assert budget.fits(90, beside=10)


def test_an_oversize_request_is_alone() -> None:
    """More than the limit fits only where nothing is held, and then nothing fits beside it (B1)."""
    budget = Budget(100)
    assert budget.fits(500)
    budget.reserve(500)
    assert not budget.fits(1)
    budget.release(500)
    budget.reserve(1)
    assert not budget.fits(500)


def test_only_what_was_reserved_is_released() -> None:
    """An error of accounting is told at once."""
    budget = Budget(100)
    budget.reserve(10)
    with pytest.raises(ValueError, match="11 of 10"):
        budget.release(11)
    for wrong in (budget.reserve, budget.release):
        with pytest.raises(ValueError, match="-1"):
            wrong(-1)
    assert (budget.held_bytes, budget.limit_bytes) == (10, 100)
