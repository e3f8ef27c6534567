"""The store for Azure Blob Storage; checkpoints are block blobs.

Guarantees, beyond those of every store:

* A blob is uploaded as blocks, and one request that commits the list of blocks makes it visible (`upload`).
* A directory has blobs below it, or a blob that stands for it, as in accounts with a hierarchical namespace. Containers
  are neither created nor deleted.

Uploads cannot be aborted in Azure, so there are none to sweep: uncommitted blocks are invisible, are dropped by any
commit to the same name, and expire a week after the last of them was sent.

What does not belong here: accounts (`client`), errors (`errors`), reading (`source`).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from azure.core.exceptions import ResourceNotFoundError

from async_ckpt.errors import StoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores.azure.client import AzureClient
from async_ckpt.stores.azure.errors import code_of, explain
from async_ckpt.stores.azure.source import AzureSource
from async_ckpt.stores.azure.upload import AzureUpload
from async_ckpt.stores.base import Child, Location, Workers, exists_already, markers_first
from async_ckpt.stores.requests import Pace, Requests, stall_timeout
from async_ckpt.stores.sizes import fitting_part_size, shared_part_size

__all__ = ["AzureStore", "block_size"]

_log = logging.getLogger("async_ckpt.stores.azure")

_MAX_BLOCKS = 50_000
_PAGE = 1000
_MAX_BLOCK_BYTES = 4000 << 20
# Answers to a listing that this identity, or a SAS token for blobs only, may not make.
_NOT_ALLOWED = ("AuthorizationPermissionMismatch", "AuthorizationResourceTypeMismatch")
# In the metadata of a blob that stands for a directory; adlfs knows both spellings, too.
_FOLDER_MARKS = ("hdi_isfolder", "Hdi_isfolder", "is_directory")


class AzureStore:
    """The store of ``abfs://`` and ``az://``.

    Args:
        file_system_class: adlfs's class.
        options: the options of the file system.
        workers: run blocking calls.
        retry: how often a request is repeated.
        overwrite: whether a commit may replace a blob; the commit request checks it.
        part_size: the preferred size of a block.
        max_concurrent_parts: how many blocks are uploaded at a time.
    """

    repeats_parts = True

    def __init__(
        self,
        file_system_class: Any,
        options: Mapping[str, Any],
        *,
        workers: Workers,
        retry: RetryPolicy,
        overwrite: bool = True,
        part_size: int = 128 << 20,
        max_concurrent_parts: int = 4,
    ) -> None:
        self._client = AzureClient(file_system_class, options, workers=workers)
        self._requests = Requests(explain, retry)
        self._workers = workers
        self._overwrite = overwrite
        self._part_size = part_size
        self._max_concurrent_parts = max_concurrent_parts
        self._pace = Pace(max_concurrent_parts)
        self._with_versions = bool(options.get("version_aware"))

    async def begin(self, location: Location, nbytes: int) -> AzureUpload:
        """Check whether the blob may be written; nothing is sent yet."""
        blob = await self._blob("begin", location)
        with self._requests.translating("begin", location):
            part_size = block_size(nbytes, wanted=self._part_size, at_a_time=self._max_concurrent_parts)
            if self._address(location)[2] is not None:
                raise ValueError("a version of a blob cannot be written, leave ?versionid= out")
        await self._refuse_directory(location)
        if not self._overwrite and await self._properties("begin", location) is not None:
            raise exists_already("begin", location)
        return AzureUpload(
            blob,
            location,
            nbytes,
            part_size=part_size,
            overwrite=self._overwrite,
            requests=self._requests,
            pace=self._pace,
            workers=self._workers,
        )

    async def delete(self, location: Location) -> None:
        """Delete the blob, or the directory tree, at *location*."""
        properties = await self._properties("delete", location)
        if properties is None or _is_folder(properties):
            found = [blob.name for blob in await self._below("delete", location)]
            markers, others = markers_first(sorted(found, reverse=True))  # what is inside comes first
            for name in (*markers, *others):
                await self._delete_blob(location, name)
        if properties is not None:
            await self._delete_blob(location)

    async def exists(self, location: Location) -> bool:
        """Return whether a blob is at *location*, or below it."""
        if await self._properties("look at", location) is not None:
            return True
        return bool(await self._below("look at", location, most=1))

    async def list(
        self, location: Location, *, starting_with: str = ""
    ) -> AsyncGenerator[Sequence[Child], None]:
        """Yield what is right below a directory, a thousand names a request; see ``Store.list``."""
        container, _, name = location.path.partition("/")
        directory = f"{name.rstrip('/')}/" if name.strip("/") else ""
        with self._requests.translating("list", location):
            client = (await self._client.get()).get_container_client(container)

        async def ask(token: str | None) -> tuple[Sequence[Any], str | None]:
            beginning = directory + starting_with
            found = client.walk_blobs(name_starts_with=beginning, delimiter="/", results_per_page=_PAGE)
            pages: Any = found.by_page(token)
            async for page in pages:
                return [each async for each in page], pages.continuation_token or None
            return [], None

        token = None
        while True:
            found, token = await self._requests.step("list", location, ask, token)
            if page := _children(found, directory):
                yield page
            if token is None:
                return

    async def source(self, location: Location) -> AzureSource:
        """Open one version of the blob for reading."""
        blob = await self._blob("read", location)
        properties = await self._requests.step("read", location, blob.get_blob_properties)
        with self._requests.translating("read", location):
            if _is_folder(properties):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return AzureSource(
            await self._client.get(),
            blob.url,
            location,
            requests=self._requests,
            nbytes=properties.size,
            etag=properties.etag,
            version=self._address(location)[2],
        )

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    def _address(self, location: Location) -> tuple[str, str, str | None]:
        """Return the container, the blob's name, and the version, if the URL names one."""
        container, _, name = location.path.partition("/")
        version = None
        if self._with_versions:  # else it is part of the name, as adlfs has it
            name, _, version = name.partition("?versionid=")
        if not name.strip("/"):
            raise ValueError("it names a container, not a blob")
        return container, name.rstrip("/"), version or None

    async def _blob(self, stage: str, location: Location) -> Any:
        """Return a client for the blob."""
        with self._requests.translating(stage, location):
            container, name, version = self._address(location)
            service = await self._client.get()
            return service.get_blob_client(container, name, version_id=version)

    async def _properties(self, stage: str, location: Location) -> Any:
        """Return the blob's properties; ``None`` if there is no blob."""
        blob = await self._blob(stage, location)

        async def look() -> Any:
            try:
                return await blob.get_blob_properties()
            except ResourceNotFoundError as error:
                if code_of(error) == "ContainerNotFound":
                    raise
                return None

        return await self._requests.step(stage, location, look)

    async def _below(self, stage: str, location: Location, *, most: int | None = None) -> Sequence[Any]:
        """Return the first *most* blobs, or all, below the directory of that name."""
        with self._requests.translating(stage, location):
            container, name, _ = self._address(location)
            client = (await self._client.get()).get_container_client(container)

        async def look() -> list[Any]:
            found: list[Any] = []
            with (
                self._requests.translating(stage, location),
                stall_timeout(self._requests.stall_seconds) as moved,
            ):
                async for blob in client.list_blobs(name_starts_with=f"{name}/", results_per_page=most):
                    moved()
                    found.append(blob)
                    if len(found) == most:
                        break
            return found

        return await self._requests.again(look)

    async def _refuse_directory(self, location: Location) -> None:
        try:
            found = await self._below("begin", location, most=1)
        except StoreError as error:
            if code_of(error) not in _NOT_ALLOWED:
                raise
            _log.debug("not allowed to check whether a directory is there: %s", error)
            return
        if found:
            with self._requests.translating("begin", location):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    async def _delete_blob(self, location: Location, name: str | None = None) -> None:
        container, own, version = self._address(location)
        client = (await self._client.get()).get_blob_client(container, name or own, version_id=version)

        async def delete() -> None:
            try:
                await client.delete_blob()
            except ResourceNotFoundError as error:
                if code_of(error) == "ContainerNotFound":
                    raise

        await self._requests.step("delete", location, delete)


def block_size(nbytes: int, *, wanted: int, at_a_time: int) -> int:
    """Return the size of each block but the last; raise ValueError if the file is too large for Azure."""
    shared = shared_part_size(nbytes, wanted, at_a_time=at_a_time)
    return fitting_part_size(nbytes, shared, least=1, most=_MAX_BLOCK_BYTES, max_parts=_MAX_BLOCKS)


def _is_folder(properties: Any) -> bool:
    metadata = properties.metadata or {}
    return any(str(metadata.get(mark)).lower() == "true" for mark in _FOLDER_MARKS)


def _children(found: Sequence[Any], directory: str) -> Sequence[Child]:
    """Return the children of *directory* that a page of a listing names."""
    children = {}
    for each in found:
        name = each.name[len(directory) :]
        if name.endswith("/"):  # the beginning of names
            children[name] = Child(name=name.rstrip("/"), is_directory=True)
        elif name and _is_folder(each):
            children[f"{name}/"] = Child(name=name, is_directory=True)
        elif name:
            written = each.last_modified
            children[name] = Child(
                name=name,
                nbytes=each.size,
                modified_seconds=None if written is None else written.timestamp(),
            )
    return list(children.values())
