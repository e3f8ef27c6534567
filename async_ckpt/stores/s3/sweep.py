"""Sweeps abandoned multipart uploads.

Guarantees: only three kinds of uploads are aborted (D2): this store's own uploads that could not be aborted when they
failed; uploads in journals of dead processes of this host, with the same endpoint and bucket; and uploads to the key
that is about to be written that are older than ``ABANDONED_SECONDS``. Errors of the sweep never fail a save.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location, Workers
from async_ckpt.stores.optional_features import LISTINGS, OptionalFeatures
from async_ckpt.stores.requests import Requests
from async_ckpt.stores.s3.connection import Connection
from async_ckpt.stores.s3.errors import error_code, is_refusal
from async_ckpt.stores.s3.journal import Entry, Journal

__all__ = ["ABANDONED_SECONDS", "Sweeper"]

_log = logging.getLogger("async_ckpt.stores.s3")

_LIST = "list_multipart_uploads"

ABANDONED_SECONDS = 7 * 24 * 3600.0


class Sweeper:
    """Finds and aborts abandoned uploads, for one store."""

    def __init__(
        self,
        *,
        connection: Connection,
        requests: Requests,
        features: OptionalFeatures,
        journal: Journal,
        workers: Workers,
    ) -> None:
        self._connection = connection
        self._features = features
        self._requests = requests
        self._journal = journal
        self._workers = workers
        self._left: set[Entry] = set()
        self._buckets: set[str] = set()
        self._old: dict[tuple[str, str], list[Entry]] = {}  # uploads to abort, by bucket and directory

    def leave(self, entry: Entry) -> None:
        """Remember an upload of this store's that could not be aborted."""
        self._left.add(entry)

    async def sweep(self, location: Location, endpoint: str, bucket: str, key: str) -> tuple[str, ...]:
        """Abort abandoned uploads, once per bucket and directory; return their names."""
        swept = await self._sweep_left(location, bucket)
        if bucket not in self._buckets:
            self._buckets.add(bucket)
            swept += await self._sweep_journals(location, endpoint, bucket)
        directory = key.rpartition("/")[0]
        if (bucket, directory) not in self._old:
            self._old[bucket, directory] = await self._find_old(location, endpoint, bucket, directory)
        old = self._old[bucket, directory]
        for entry in [each for each in old if each.key == key]:
            old.remove(entry)
            if await self._abort(location, entry):
                swept.append(entry)
        if swept:
            _log.info("aborted abandoned uploads: %s", ", ".join(map(_name, swept)))
        return tuple(map(_name, swept))

    async def _sweep_left(self, location: Location, bucket: str) -> list[Entry]:
        swept = []
        for entry in [each for each in self._left if each.bucket == bucket]:
            if not await self._abort(location, entry):
                break  # S3 still does not answer, and a save waits
            self._left.discard(entry)
            await self._workers.run(self._journal.ended, entry)
            swept.append(entry)
        return swept

    async def _sweep_journals(self, location: Location, endpoint: str, bucket: str) -> list[Entry]:
        swept = []
        for path, entries in await self._workers.run(self._journal.abandoned):
            ours = [entry for entry in entries if (entry.endpoint, entry.bucket) == (endpoint, bucket)]
            done = [entry for entry in ours if await self._abort(location, entry)]
            await self._workers.run(self._journal.settle, path, done)
            swept += done
        return swept

    async def _find_old(self, location: Location, endpoint: str, bucket: str, directory: str) -> list[Entry]:
        if not self._features.asks(bucket, LISTINGS, _LIST):
            return []
        prefix = f"{directory}/" if directory else ""

        async def ask() -> list[Entry]:
            # One page only: a directory with a thousand open uploads needs a lifecycle rule.
            answer = await self._connection.call(_LIST, Bucket=bucket, Prefix=prefix)
            return [
                Entry(endpoint=endpoint, bucket=bucket, key=each["Key"], upload_id=each["UploadId"])
                for each in answer.get("Uploads") or ()
                if _age_seconds(each.get("Initiated")) > ABANDONED_SECONDS
            ]

        try:
            return await self._requests.once("sweep", location, ask)
        except StoreError as error:
            if is_refusal(error):
                self._features.decline(bucket, LISTINGS, error, _LIST)
            _log.debug("cannot list open uploads: %s", error)
            return []

    async def _abort(self, location: Location, entry: Entry) -> bool:
        """Abort *entry*; return whether it is gone."""

        async def ask() -> None:
            await self._connection.call(
                "abort_multipart_upload", Bucket=entry.bucket, Key=entry.key, UploadId=entry.upload_id
            )

        try:
            await self._requests.once("sweep", location, ask)
        except StoreError as error:
            if error_code(error) != "NoSuchUpload":
                _log.debug("cannot abort %s: %s", _name(entry), error)
                return False
        return True


def _age_seconds(since: datetime | None) -> float:
    return 0.0 if since is None else time.time() - since.timestamp()


def _name(entry: Entry) -> str:
    return f"{entry.key} (upload {entry.upload_id})"
