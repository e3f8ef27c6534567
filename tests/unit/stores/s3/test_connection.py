"""The settings of the connection to S3."""

from __future__ import annotations

import pytest
from aiobotocore.config import AioConfig

from async_ckpt.stores.s3.connection import with_our_settings


def test_ours() -> None:
    """Bodies are not hashed twice, one attempt is made, and there are connections for every part."""
    settings = with_our_settings({}, stall_seconds=30.0, parts=64)
    assert settings["s3"] == {"payload_signing_enabled": False}
    assert settings["retries"] == {"total_max_attempts": 1}
    assert settings["read_timeout"] == 30.0
    assert settings["max_pool_connections"] > 64
    AioConfig(**settings)  # knows them all


def test_the_users_count() -> None:
    """What the user set stays, but for the number of attempts, and too few connections."""
    given = {
        "s3": {"addressing_style": "path", "payload_signing_enabled": True},
        "retries": {"mode": "adaptive", "max_attempts": 9},
        "read_timeout": 3,
        "connect_timeout": 2,
        "max_pool_connections": 1,
        "request_checksum_calculation": "when_supported",
        "proxies": {"https": "http://proxy"},
    }
    settings = with_our_settings(given, stall_seconds=30.0, parts=4)
    assert settings["s3"] == given["s3"]
    assert settings["retries"] == {"mode": "adaptive", "total_max_attempts": 1}
    assert settings["max_pool_connections"] >= 4
    for name in ("read_timeout", "connect_timeout", "request_checksum_calculation", "proxies"):
        assert settings[name] == given[name]


@pytest.mark.parametrize("stall_seconds", [5.0, 50.0])
def test_waiting_is_bounded_by_the_stall(stall_seconds: float) -> None:
    """No byte of an answer is waited for longer than a stall, and no connection for more than ten seconds."""
    settings = with_our_settings({}, stall_seconds=stall_seconds, parts=4)
    assert settings["read_timeout"] == stall_seconds
    assert settings["connect_timeout"] == min(10.0, stall_seconds)
