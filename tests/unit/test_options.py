"""Every option, its default, and a clear message for each bad value."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from async_ckpt import CheckpointService, OptionError, RetryPolicy, ServiceOptions
from async_ckpt.options import parse_bytes

BAD: list[tuple[str, Any, str]] = [
    *[
        (name, value, "int of at least 1")
        for name in ("queue_depth", "max_concurrent_saves", "max_concurrent_parts")
        for value in (0, -1, 1.5, "2", None, True)
    ],
    ("memory_limit", 0, "more than zero"),
    ("memory_limit", -1, "more than zero"),
    ("memory_limit", "0GiB", "more than zero"),
    ("memory_limit", "8 GiBs", "unknown unit"),
    ("memory_limit", "much", "such as '8GiB'"),
    ("memory_limit", 1.5, "such as '8GiB'"),
    ("memory_limit", True, "such as '8GiB'"),
    ("overflow", "drop", "'block', 'raise', 'supersede'"),
    ("snapshot", "fork", "'auto', 'copy', 'lazy'"),
    ("snapshot", "cow", "must be one of"),
    ("verify_snapshots", 1, "must be True or False"),
    ("durability", "none", "'fsync', 'process'"),
    ("on_error", "ignore", "'raise', 'warn'"),
    ("in_place", True, "'refuse', 'allow'"),
    ("page_cache", False, "'auto', 'keep', 'drop'"),
    ("priority", "low", "'normal', 'background'"),
    ("part_size", "1KiB", "at least 64KiB"),
    ("part_size", None, "such as '8GiB'"),
    ("flush_timeout", 0, "more than zero"),
    ("flush_timeout", float("inf"), "finite"),
    ("flush_timeout", float("nan"), "finite"),
    ("flush_timeout", "1", "number of seconds"),
    ("flush_timeout", True, "number of seconds"),
    *[
        (name, value, message)
        for name in ("agreement_timeout", "silence_timeout")
        for value, message in ((0, "more than zero"), (float("inf"), "finite"), ("1", "number of seconds"))
    ],
    ("retry", 3, "RetryPolicy"),
    ("storage_options", ["key"], "mapping"),
    ("observer", "print", "callable"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_bad_value_is_refused(name: str, value: Any, message: str) -> None:
    """A value that cannot work is refused where the service is made; the message names the option and what would do."""
    with pytest.raises(OptionError, match=message) as raised:
        CheckpointService(**{name: value})
    assert str(raised.value).startswith(f"{name}=")
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("seconds", [-1, -0.5, float("inf"), float("nan"), "1", None, True])
def test_a_bad_grace_is_refused(seconds: Any) -> None:
    """A grace that no wait can be given, or that would be endless, is refused where the service is made (B2)."""
    with pytest.raises(OptionError, match="a finite number of seconds, at least zero"):
        CheckpointService(abandon_grace_seconds=seconds)


def test_no_grace_is_a_grace() -> None:
    """Zero is allowed: what does not end is left at once."""
    CheckpointService(abandon_grace_seconds=0).close()


def test_an_unknown_option_is_refused() -> None:
    """A misspelled option is refused, and the message lists the real ones."""
    with pytest.raises(OptionError, match="unknown option 'queue_dept'; the options are queue_depth"):
        CheckpointService(queue_dept=2)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (1, 1),
        ("12", 12),
        ("12B", 12),
        ("1KiB", 1024),
        ("1.5 GiB", 3 << 29),
        ("500 MB", 500_000_000),
        (" 2tib ", 2 << 40),
        ("1kb", 1000),
    ],
)
def test_bytes_are_parsed(text: int | str, nbytes: int) -> None:
    """Sizes may be ints or text with a unit, of either kind and case."""
    assert parse_bytes(text, option="x") == nbytes


def test_defaults() -> None:
    """The defaults are safe: bounded, blocking, synced to the disk, and loud."""
    options = ServiceOptions()
    assert (options.queue_depth, options.max_concurrent_saves, options.max_concurrent_parts) == (2, 1, 4)
    assert (options.overflow, options.durability, options.on_error) == ("block", "fsync", "raise")
    assert options.part_size_bytes == 128 << 20
    assert options.flush_timeout == 1800
    assert (options.agreement_timeout, options.silence_timeout) == (600, 60)
    assert 0 < options.memory_limit_bytes < 1 << 60


def test_options_are_values() -> None:
    """Options are frozen, keyword-only, comparable, and can be copied and pickled."""
    options = ServiceOptions(queue_depth=3, memory_limit="1GiB", retry=RetryPolicy(attempts=1))
    assert options == copy.deepcopy(options) == pickle.loads(pickle.dumps(options))
    assert options != ServiceOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.queue_depth = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        ServiceOptions(3)  # type: ignore[misc]


def test_a_service_shows_its_options() -> None:
    """What was not given shows its default."""
    assert CheckpointService(queue_depth=7).options == ServiceOptions(queue_depth=7)
