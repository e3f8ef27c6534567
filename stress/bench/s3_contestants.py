"""Who is measured against an S3 server: ways to bring a state there, and bare uploads of a file's bytes.

Guarantees: everyone gets the same endpoint and credentials, the usual way: from fsspec's configuration (obstore,
which knows no fsspec, as arguments). Everything else is at its default, unless the name says otherwise.
What does not belong here: clocks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stress.bench.contestants import CONTESTANTS, Contestant
from stress.bench.s3_report import LIGHTNING, OBSTORE, OURS, PUT_FILE

__all__ = ["UPLOADERS", "BareUpload", "configure", "make"]


def configure(storage_options: Mapping[str, Any]) -> None:
    """Let whoever takes ``s3://`` URLs through fsspec find the server."""
    import fsspec.config

    fsspec.config.conf["s3"] = dict(storage_options)


class BareUpload(Contestant):
    """Sends a file's bytes that exist already; neither a snapshot nor the making of the file is counted."""

    def __init__(self, storage_options: Mapping[str, Any]) -> None:
        self._options = storage_options

    def prepare(self, state: Any, file: Path) -> None:
        """Make the bytes; *file* may be used."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._data = buffer.getvalue()


class S3fsPutFile(BareUpload):
    """``S3FileSystem.put_file``, of a file in the page cache."""

    def prepare(self, state: Any, file: Path) -> None:
        """Make the file."""
        torch.save(state, file)
        self._file = file

    def save(self, state: Any, path: Any) -> None:
        """Upload."""
        import s3fs

        s3fs.S3FileSystem(**self._options).put_file(str(self._file), path)


class Obstore(BareUpload):
    """``obstore.put`` of bytes in memory; no checksum, no hash of the payload."""

    _store: Any = None

    def save(self, state: Any, path: Any) -> None:
        """Upload."""
        import obstore

        bucket, _, key = path.removeprefix("s3://").partition("/")
        self._store = self._store or self._connect(bucket)
        obstore.put(self._store, key, self._data)

    def _connect(self, bucket: str) -> Any:
        from obstore.store import S3Store

        return S3Store(
            bucket,
            endpoint=self._options["endpoint_url"],
            access_key_id=self._options["key"],
            secret_access_key=self._options["secret"],
            region=self._options["client_kwargs"]["region_name"],
            client_options={"allow_http": True},
            unsigned_payload=True,
        )


UPLOADERS: dict[str, Callable[..., Contestant]] = {
    OURS: CONTESTANTS["async_ckpt"],
    LIGHTNING: CONTESTANTS["Lightning"],
    PUT_FILE: S3fsPutFile,
    OBSTORE: Obstore,
}


def make(name: str, storage_options: Mapping[str, Any], **options: Any) -> Contestant:
    """Return the contestant called *name*; *options* are for ours."""
    if name in (PUT_FILE, OBSTORE):
        return UPLOADERS[name](storage_options)
    return UPLOADERS[name](**options)
