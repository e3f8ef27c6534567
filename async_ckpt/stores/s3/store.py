"""The store for S3 and compatible servers, with s3fs's settings and aiobotocore's requests.

Guarantees, beyond those of every store: see `upload` for saves, `source` for reading, `sweep` for leftovers of killed
processes, `connection` for credentials and settings. Buckets are neither created nor deleted.

What does not belong here: the contents of those modules.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores.base import Child, Location, Workers, aborted_on_error
from async_ckpt.stores.optional_features import LISTINGS, OPTION, OptionalFeatures
from async_ckpt.stores.requests import Pace, Requests
from async_ckpt.stores.s3.connection import Connection
from async_ckpt.stores.s3.deletion import Deletion
from async_ckpt.stores.s3.errors import explain, is_refusal
from async_ckpt.stores.s3.journal import Entry, Journal, state_directory
from async_ckpt.stores.s3.sharing import LEAST_PART_BYTES, MAX_PARTS, apart_seconds, part_size_for
from async_ckpt.stores.s3.source import S3Source
from async_ckpt.stores.s3.sweep import Sweeper
from async_ckpt.stores.s3.target import Target
from async_ckpt.stores.s3.upload import S3Upload

__all__ = ["S3Store"]

_LIST = "list_objects_v2"
_EXISTS = "a checkpoint is there, and overwrite=False"
_ONE_VERSION = "the URL names one version; nobody can save to it"
_NO_FILE = (
    "Give the URL of an object: a bucket and a key, without a slash at the end and without objects below it."
)


class S3Store:
    """The store for ``s3://`` URLs.

    Args:
        file_system_class: s3fs's class, or a subclass.
        options: the options of the file system.
        workers: compute checksums, and read files.
        retry: how often a request is repeated, and how long it may stall.
        overwrite: whether a commit may replace an existing object.
        part_size: the preferred size of a part; S3 demands at least 5 MiB.
        max_concurrent_parts: how many parts are sent at a time.
        journal: records open uploads.
    """

    repeats_parts = True

    def __init__(
        self,
        file_system_class: Any,
        options: dict[str, Any],
        *,
        workers: Workers,
        retry: RetryPolicy,
        overwrite: bool = True,
        part_size: int = 128 << 20,
        max_concurrent_parts: int = 4,
        journal: Journal | None = None,
    ) -> None:
        self._workers = workers
        self._overwrite = overwrite
        self._part_size = part_size
        self._max_concurrent_parts = max_concurrent_parts
        self._requests = Requests(explain, retry)
        self._features = OptionalFeatures(options)
        self._pace = Pace(max_concurrent_parts)
        self._connection = Connection(
            file_system_class,
            {name: value for name, value in options.items() if name != OPTION},
            workers=workers,
            stall_seconds=retry.stall_seconds,
            parts=max_concurrent_parts,
            slowed=lambda: self._pace.allowed < max_concurrent_parts,
        )
        self._journal = journal or Journal(state_directory())
        self._sweeper = Sweeper(
            connection=self._connection,
            requests=self._requests,
            features=self._features,
            journal=self._journal,
            workers=workers,
        )

    async def begin(self, location: Location, nbytes: int) -> S3Upload:
        """Check whether the object may be written, sweep, and create a multipart upload if it takes several parts."""
        bucket, key, version = await self._split("begin", location)
        if version:
            raise StoreError.during("begin", location.url, OSError(_ONE_VERSION))
        try:
            part_size = part_size_for(
                nbytes, self._part_size, at_a_time=self._max_concurrent_parts, writers=location.writers
            )
        except ValueError as error:
            raise StoreError.during("begin", location.url, error) from error
        await self._check_target(location, bucket, key)
        endpoint = await self._endpoint()
        entry = functools.partial(Entry, endpoint=endpoint, bucket=bucket, key=key)
        upload = S3Upload(
            location,
            nbytes,
            Target(
                location,
                bucket,
                key,
                overwrite=self._overwrite,
                connection=self._connection,
                requests=self._requests,
                features=self._features,
                workers=self._workers,
            ),
            part_size=part_size,
            least_part_bytes=LEAST_PART_BYTES,
            max_parts=MAX_PARTS,
            requests=self._requests,
            pace=self._pace,
            apart_seconds=apart_seconds(location.writers),
            workers=self._workers,
            opened=lambda upload_id: self._workers.run(self._journal.opened, entry(upload_id=upload_id)),
            ended=lambda upload_id: self._workers.run(self._journal.ended, entry(upload_id=upload_id)),
            left=lambda upload_id: self._sweeper.leave(entry(upload_id=upload_id)),
        )
        upload.swept = await self._sweeper.sweep(location, endpoint, bucket, key)
        async with aborted_on_error(upload):
            await upload.start()
        return upload

    async def delete(self, location: Location) -> None:
        """Delete the object and all objects below it; if the URL names a version, only that version."""
        bucket, key, version = await self._split("delete", location)
        if not key:
            raise StoreError.during("delete", location.url, OSError("a bucket is never deleted"))
        deletion = Deletion(location, bucket, connection=self._connection, requests=self._requests)
        await deletion.run(key, version)

    async def exists(self, location: Location) -> bool:
        """Return whether there is an object at *location*, or below it."""
        bucket, key, version = await self._split("read", location)
        try:
            await self._ask("read", location, "head_object", Bucket=bucket, Key=key, **version)
        except FileNotFoundError:
            return await self._is_directory("read", location, bucket, key)
        return True

    async def list(
        self, location: Location, *, starting_with: str = ""
    ) -> AsyncGenerator[Sequence[Child], None]:
        """Yield what is right below a directory, a thousand names a request; see ``Store.list``."""
        bucket, key, _ = await self._split("list", location)
        directory = f"{key.rstrip('/')}/" if key.strip("/") else ""
        wanted = {"Bucket": bucket, "Prefix": directory + starting_with, "Delimiter": "/"}
        more: dict[str, str] = {}
        while True:
            answer = await self._ask("list", location, _LIST, **wanted, **more)
            if page := _children(answer, directory):
                yield page
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    async def source(self, location: Location) -> S3Source:
        """Open the object for reading; see ``Store.source``."""
        bucket, key, version = await self._split("read", location)
        target = {"Bucket": bucket, "Key": key, **version}
        answer = await self._ask("read", location, "head_object", **target)
        file_system = await self._connection.file_system()
        if file_system.version_aware and answer.get("VersionId", "null") != "null":
            target["VersionId"] = answer["VersionId"]  # it can be read to its end even if it is replaced
        return S3Source(
            location,
            target,
            nbytes=answer["ContentLength"],
            tag=answer.get("ETag", ""),
            conditional=not getattr(file_system, "local_expiry_check", False),
            features=self._features,
            connection=self._connection,
            requests=self._requests,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._connection.aclose()
        await self._workers.run(self._journal.close)

    # -- requests

    async def _ask(self, stage: str, location: Location, operation: str, **arguments: Any) -> Any:
        """Make a small request, which may be repeated."""
        return await self._requests.step(stage, location, self._connection.call, operation, **arguments)

    async def _check_target(self, location: Location, bucket: str, key: str) -> None:
        if not key or location.url.endswith("/") or await self._is_directory("begin", location, bucket, key):
            raise StoreError.during(
                "begin", location.url, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)), _NO_FILE
            )
        if not self._overwrite:
            # Checked early to avoid a useless upload; the condition of the last request decides.
            try:
                await self._ask("read", location, "head_object", Bucket=bucket, Key=key)
            except FileNotFoundError:
                return
            except StoreError as error:
                if is_refusal(error):
                    return
                raise
            raise CheckpointExistsError.during("begin", location.url, OSError(_EXISTS))

    async def _is_directory(self, stage: str, location: Location, bucket: str, key: str) -> bool:
        """Return whether there is an object below *key*; False if listing is not allowed."""
        if not self._features.asks(bucket, LISTINGS, _LIST):
            return False
        try:
            answer = await self._ask(stage, location, _LIST, Bucket=bucket, Prefix=f"{key}/", MaxKeys=1)
        except StoreError as error:
            if is_refusal(error) and self._features.decline(bucket, LISTINGS, error, _LIST):
                return False
            raise
        return bool(answer.get("Contents"))

    # -- helpers

    async def _split(self, stage: str, location: Location) -> tuple[str, str, dict[str, str]]:
        """Return the bucket, the key, and the version, if the URL names one."""
        with self._requests.translating(stage, location):
            file_system = await self._connection.file_system()
            bucket, key, version = file_system.split_path(location.path)
        return bucket, key, {"VersionId": version} if version else {}

    async def _endpoint(self) -> str:
        file_system = await self._connection.file_system()
        return str(file_system._s3.meta.endpoint_url)


def _children(answer: Any, directory: str) -> Sequence[Child]:
    """Return the children of *directory* that a page of a listing names."""
    found = [
        Child(name=each["Prefix"][len(directory) :].rstrip("/"), is_directory=True)
        for each in answer.get("CommonPrefixes") or ()
    ]
    for each in answer.get("Contents") or ():
        if name := each["Key"][len(directory) :]:  # else it is what stands for the directory itself
            written = each.get("LastModified")
            found.append(
                Child(
                    name=name,
                    nbytes=each.get("Size"),
                    modified_seconds=None if written is None else written.timestamp(),
                )
            )
    return found
