"""What the strict server stores, and what it is in the middle of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any
from urllib.parse import unquote

from async_ckpt.stores.checksums import as_text, crc32c

__all__ = ["ALIGNMENT", "Lost", "No", "Object", "Session", "names"]

ALIGNMENT = 256 * 1024


@dataclass
class Object:
    """One generation of an object."""

    data: bytes
    generation: int
    metadata: dict[str, str]
    updated: str = field(default_factory=lambda: f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.%fZ}")

    def describe(self, bucket: str, key: str) -> dict[str, Any]:
        """Return its description, as the JSON interface words it."""
        return {
            "name": key,
            "bucket": bucket,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metadata": self.metadata,
            "updated": self.updated,
            "crc32c": as_text(crc32c([memoryview(self.data)])),
        }


@dataclass
class Session:
    """A resumable upload; ``done`` describes the object once it is there."""

    bucket: str
    key: str
    metadata: dict[str, str]
    match: str | None
    total: int
    data: bytearray = field(default_factory=bytearray)
    done: dict[str, Any] | None = None


class Lost(Exception):
    """No answer is to be sent."""


class No(Exception):
    """What is asked is refused."""

    def __init__(self, status: int, message: str, reason: str = "invalid") -> None:
        self.status = status
        body = {"error": {"code": status, "message": message, "errors": [{"reason": reason}]}}
        self.text = json.dumps(body)


def names(rest: str) -> tuple[str, str]:
    """Take ``BUCKET/o/OBJECT`` apart."""
    bucket, _, key = rest.partition("/o")
    return unquote(bucket), unquote(key.removeprefix("/"))
