"""The store for Google Cloud Storage, with gcsfs's session and credentials.

Guarantees, beyond those of every store: a save is one resumable upload, which becomes visible with its last request;
the server checks ``overwrite=False`` with that request (``ifGenerationMatch=0``); a source reads one generation only.

What does not belong here: the upload (`upload`, `session`), requests (`client`), explaining errors (`errors`).
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import anyio

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores.base import Child, Location, Workers, aborted_on_error, markers_first
from async_ckpt.stores.gcs.client import Client, Target
from async_ckpt.stores.gcs.errors import EXISTS, Refusal, explain, refused_with
from async_ckpt.stores.gcs.session import CHUNK_MULTIPLE
from async_ckpt.stores.gcs.source import GCSSource
from async_ckpt.stores.gcs.upload import ResumableUpload
from async_ckpt.stores.requests import Pace, Requests
from async_ckpt.stores.sizes import fitting_part_size

__all__ = ["GCSStore"]

_MAX_OBJECT_BYTES = 5 << 40
_DELETIONS_AT_A_TIME = 8

_log = logging.getLogger("async_ckpt.stores.gcs")


class GCSStore:
    """The store of ``gs://`` and ``gcs://``.

    Args:
        file_system_class: gcsfs's class; its plain file system is used in any case.
        options: the options of the file system.
        workers: run blocking calls.
        retry: how often a request is repeated.
        overwrite: whether a commit may replace an existing object.
        part_size: the preferred size of a request; rounded up to a multiple of 256 KiB.
        max_concurrent_parts: how many requests that carry data run at a time, over all files.
    """

    repeats_parts = True

    def __init__(
        self,
        file_system_class: Any,
        options: Mapping[str, Any],
        *,
        workers: Workers,
        retry: RetryPolicy | None = None,
        overwrite: bool = True,
        part_size: int = 128 << 20,
        max_concurrent_parts: int = 4,
    ) -> None:
        self._workers = workers
        self._overwrite = overwrite
        self._part_size = part_size
        self._client = Client(options, workers)
        self._requests = Requests(explain, retry or RetryPolicy())
        self._pace = Pace(max_concurrent_parts)

    async def begin(self, location: Location, nbytes: int) -> ResumableUpload:
        """Begin a resumable upload; see ``Store.begin``."""
        target = await self._target("begin", location)
        if target.generation is not None:
            raise _error(
                "begin", location, errno.EINVAL, "the URL names one generation; nobody can save to it"
            )
        if nbytes > _MAX_OBJECT_BYTES:
            raise _error("begin", location, errno.EFBIG, f"{nbytes} bytes are more than an object can have")
        await self._look_before(location, target)
        upload = ResumableUpload(
            location,
            target,
            nbytes,
            part_size=fitting_part_size(
                nbytes,
                self._part_size,
                least=CHUNK_MULTIPLE,
                most=_MAX_OBJECT_BYTES,
                max_parts=_MAX_OBJECT_BYTES,  # there is no such limit
                multiple_of=CHUNK_MULTIPLE,
            ),
            overwrite=self._overwrite,
            client=self._client,
            requests=self._requests,
            pace=self._pace,
            workers=self._workers,
        )
        async with aborted_on_error(upload):
            await upload.start()
        return upload

    async def delete(self, location: Location) -> None:
        """Delete an object; if there is none, all objects below this name."""
        target = await self._target("delete", location)
        if await self._describe("delete", location, target) is not None:
            await self._requests.step("delete", location, self._delete, target)
            return
        page: str | None = None
        while True:
            keys, page = await self._children("delete", location, target, page=page)
            for some in markers_first(keys):
                await self._delete_all(location, [replace(target, key=key) for key in some])
            if page is None:
                return

    async def exists(self, location: Location) -> bool:
        """Return whether there is such an object, or one below its name."""
        target = await self._target("look at", location)
        if await self._describe("look at", location, target) is not None:
            return True
        return bool((await self._children("look at", location, target, limit=1))[0])

    async def list(
        self, location: Location, *, starting_with: str = ""
    ) -> AsyncGenerator[Sequence[Child], None]:
        """Yield what is right below a directory, a thousand names a request; see ``Store.list``."""
        target = await self._requests.again(self._connect, "list", location)
        directory = f"{target.key.rstrip('/')}/" if target.key.strip("/") else ""
        params: dict[str, Any] = {
            "prefix": directory + starting_with,
            "delimiter": "/",
            "maxResults": 1000,
            "fields": "items(name,size,updated),prefixes,nextPageToken",
        }
        while True:
            found = await self._requests.step(
                "list", location, self._client.describe, target.bucket_path, params
            )
            if page := _page(found, directory):
                yield page
            if (token := found.get("nextPageToken")) is None:
                return
            params["pageToken"] = token

    async def source(self, location: Location) -> GCSSource:
        """Open an object for reading."""
        target = await self._target("read", location)
        description = await self._describe("read", location, target)
        if description is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location.url)
        return GCSSource(
            location,
            replace(target, generation=str(description["generation"])),
            int(description["size"]),
            client=self._client,
            requests=self._requests,
            pace=self._pace,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _target(self, stage: str, location: Location) -> Target:
        """Connect, and return the object that *location* names."""
        target = await self._requests.again(self._connect, stage, location)
        if not target.key.strip("/"):
            raise _error(stage, location, errno.EISDIR, "it names a bucket, not a checkpoint in it")
        if stage == "begin" and target.key.endswith("/"):
            raise _error(stage, location, errno.EISDIR, os.strerror(errno.EISDIR))
        return replace(target, key=target.key.rstrip("/"))

    async def _connect(self, stage: str, location: Location) -> Target:
        # Not timed: finding credentials may take long, and cannot be cancelled.
        with self._requests.translating(stage, location):
            return await self._client.target(location.path)

    async def _look_before(self, location: Location, target: Target) -> None:
        """Check, before anything is sent, for errors that would otherwise come only with the commit."""
        try:
            if (await self._children("begin", location, target, limit=1, missing_ok=False))[0]:
                raise _error("begin", location, errno.EISDIR, os.strerror(errno.EISDIR))
            if not self._overwrite and await self._describe("begin", location, target) is not None:
                reason = OSError(EXISTS)
                raise CheckpointExistsError.during("begin", location.url, reason)
        except StoreError as error:
            if not refused_with(
                error, {403}
            ):  # a user who may create objects need not be allowed to read them
                raise
            _log.debug("cannot check %s before saving: %s", location.url, error)

    async def _describe(self, stage: str, location: Location, target: Target) -> dict[str, Any] | None:
        """Return the object's description; None if it does not exist."""
        params = {"generation": target.generation}
        try:
            return await self._requests.step(stage, location, self._client.describe, target.path, params)
        except FileNotFoundError:
            return None
        except StoreError as error:
            if refused_with(error, {404}):
                return None
            raise

    async def _children(
        self,
        stage: str,
        location: Location,
        target: Target,
        *,
        page: str | None = None,
        limit: int = 1000,
        missing_ok: bool = True,
    ) -> tuple[Sequence[str], str | None]:
        """Return a page of the objects below *target*, and the token of the next page."""
        params = {
            "prefix": f"{target.key}/",
            "maxResults": limit,
            "pageToken": page,
            "fields": "items/name,nextPageToken",
        }
        try:
            found = await self._requests.step(
                stage, location, self._client.describe, target.bucket_path, params
            )
        except StoreError as error:
            if missing_ok and refused_with(error, {404}):
                return [], None
            raise
        return [item["name"] for item in found.get("items", ())], found.get("nextPageToken")

    async def _delete(self, target: Target) -> None:
        try:
            await self._client.call("DELETE", target.path, params={"generation": target.generation})
        except Refusal as error:
            if error.status != 404:
                raise

    async def _delete_all(self, location: Location, targets: Sequence[Target]) -> None:
        """Delete several objects, some at a time; the first error cancels the others and is raised unchanged."""
        errors: list[Exception] = []
        remaining = iter(targets)

        async def delete_some() -> None:
            for target in remaining:
                try:
                    await self._requests.step("delete", location, self._delete, target)
                except Exception as error:
                    errors.append(error)
                    group.cancel_scope.cancel()
                    return

        async with anyio.create_task_group() as group:
            for _ in range(min(len(targets), _DELETIONS_AT_A_TIME)):
                group.start_soon(delete_some)
        if errors:
            raise errors[0]


def _page(found: Mapping[str, Any], directory: str) -> Sequence[Child]:
    """Return the children of *directory* that a page of a listing names."""
    children = [
        Child(name=prefix[len(directory) :].rstrip("/"), is_directory=True)
        for prefix in found.get("prefixes") or ()
    ]
    for item in found.get("items") or ():
        if name := item["name"][len(directory) :]:  # else it is what stands for the directory itself
            written = item.get("updated")
            children.append(
                Child(
                    name=name,
                    nbytes=int(item.get("size", 0)),
                    modified_seconds=None if written is None else _seconds(written),
                )
            )
    return children


def _seconds(written: str) -> float:
    """Read a time of RFC 3339, of which Python 3.10 takes three or six digits of a second, and no Z."""
    text = re.sub(r"\.([0-9]{1,6})[0-9]*", lambda found: f".{found[1]:0<6}", written)
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _error(stage: str, location: Location, number: int, reason: str) -> StoreError:
    return StoreError.during(stage, location.url, OSError(number, reason))
