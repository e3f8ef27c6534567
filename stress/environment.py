"""The file systems of a round: local files, and a remote file system beside them.

Guarantees: each round has paths that no other has; what is looked at here is looked at without the service, by
fsspec and plain ``torch.load``. What may be there belongs to the checker.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import fsspec
import torch

__all__ = ["STORES", "Environment", "Local", "Memory", "environment"]

STORES = ("memory", "s3", "gcs", "azure")
_SERVERS = {"s3": "seaweedfs", "gcs": "fake_gcs", "azure": "azurite"}


class Environment(Protocol):
    """A file system."""

    @property
    def storage_options(self) -> Mapping[str, Any]:
        """What fsspec is given to reach it."""

    def fresh(self) -> str:
        """Return the URL of an empty directory."""

    def state_at(self, url: str) -> Any:
        """Return what plain torch.load finds; FileNotFoundError where there is nothing."""

    def leftovers(self) -> list[str]:
        """Return the names of temporary files and open uploads."""


@dataclass(frozen=True)
class Memory:
    """fsspec's own, in this process."""

    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def fresh(self) -> str:
        """Return the URL of an empty directory."""
        return f"memory://stress/{uuid4().hex}"

    def state_at(self, url: str) -> Any:
        """Return what plain torch.load finds."""
        return _state_at(url, self.storage_options)

    def leftovers(self) -> list[str]:
        """Return the names of files that are not checkpoints."""
        names = fsspec.filesystem("memory").store
        return [name for name in names if ".async_ckpt." in name or ".previous-" in name]


@dataclass(frozen=True)
class Local:
    """A directory on disk."""

    directory: Path
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def fresh(self) -> str:
        """Return the directory."""
        return str(self.directory)

    def state_at(self, url: str) -> Any:
        """Return what plain torch.load finds."""
        return torch.load(url, weights_only=True)

    def leftovers(self) -> list[str]:
        """Return the names of files that are not checkpoints."""
        return [str(path.relative_to(self.directory)) for path in self.directory.rglob(".async_ckpt.*")]


@dataclass(frozen=True)
class _Bucket:
    """A bucket of a real server."""

    kind: str
    url: str
    endpoint: str
    storage_options: Mapping[str, Any]

    def fresh(self) -> str:
        return f"{self.url}/{uuid4().hex}"

    def state_at(self, url: str) -> Any:
        return _state_at(url, self.storage_options)

    def leftovers(self) -> list[str]:
        if self.kind != "s3":  # what is unfinished there has no name, and goes by itself
            return []
        from stress.servers.s3 import call

        bucket = self.url.removeprefix("s3://")
        answer = call(self.endpoint, "GET", f"{bucket}?uploads=").decode()
        uploads = re.findall(r"<Upload>.*?<Key>(.*?)</Key>.*?<UploadId>(.*?)</UploadId>", answer, re.DOTALL)
        # One without parts is what remains of a process that was killed before it was told the id. It costs nothing.
        return [
            f"the open upload {key}"
            for key, upload in uploads
            if b"<PartNumber>" in call(self.endpoint, "GET", f"{bucket}/{key}?uploadId={upload}")
        ]


@contextmanager
def environment(store: str) -> Iterator[Environment]:
    """Run the server that *store* takes, if any, for the time of a block."""
    if store == "memory":
        yield Memory()
        return
    with importlib.import_module(f"stress.servers.{_SERVERS[store]}").start() as server:
        bucket = f"stress-{uuid4().hex[:16]}"
        server.make_bucket(bucket)
        url = f"{server.protocol}://{bucket}"
        found = _Bucket(store, url, server.url, server.storage_options)
        with suppress(FileNotFoundError):
            found.state_at(f"{url}/nothing")  # fsspec's own thread starts now, not in the first round
        yield found


def _state_at(url: str, storage_options: Mapping[str, Any]) -> Any:
    file_system, path = fsspec.core.url_to_fs(url, **storage_options)
    file_system.invalidate_cache()
    with file_system.open(path, "rb") as file:
        return torch.load(file, weights_only=True)
