"""Deletes an S3 location: the object, and all objects below it, as below a directory.

Guarantees: objects whose keys only begin with the same letters stay; missing objects are no error.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

from botocore.exceptions import ClientError

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location, markers_first
from async_ckpt.stores.requests import Requests
from async_ckpt.stores.s3.connection import Connection
from async_ckpt.stores.s3.errors import error_code, is_refusal

__all__ = ["Deletion"]

_log = logging.getLogger("async_ckpt.stores.s3")

# Errors of servers that cannot delete several objects by one request.
_NOT_TOGETHER = frozenset(
    {"501", "InvalidArgument", "InvalidRequest", "MalformedXML", "MissingContentMD5", "NotImplemented"}
)
_NOT_THERE = frozenset({"404", "NoSuchKey"})  # what some servers say, unlike S3


class Deletion:
    """One deletion in a bucket."""

    def __init__(
        self, location: Location, bucket: str, *, connection: Connection, requests: Requests
    ) -> None:
        self._location = location
        self._bucket = bucket
        self._connection = connection
        self._requests = requests

    async def run(self, key: str, version: dict[str, str]) -> None:
        """Delete *key*, and everything below it; with *version*, only that version."""
        if not version:
            async for keys in self._below(key):
                for some in filter(None, markers_first(keys)):
                    await self._delete_all(some)
        await self._delete_one(key, **version)

    async def _below(self, key: str) -> AsyncGenerator[list[str], None]:
        """Yield the keys below *key*, page by page."""
        more: dict[str, str] = {}
        while True:
            try:
                answer = await self._ask("list_objects_v2", Prefix=f"{key}/", **more)
            except StoreError as error:
                if is_refusal(error):
                    _log.debug("cannot list the objects below: %s", error)
                    return
                raise
            if contents := answer.get("Contents"):
                yield [each["Key"] for each in contents]
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    async def _delete_all(self, keys: list[str]) -> None:
        """Delete up to a thousand objects."""
        try:
            await self._requests.step("delete", self._location, self._delete_together, keys)
        except StoreError as error:
            if error_code(error) not in _NOT_TOGETHER:
                raise
            for key in keys:
                await self._delete_one(key)

    async def _delete_together(self, keys: list[str]) -> None:
        objects = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        answer = await self._connection.call("delete_objects", Bucket=self._bucket, Delete=objects)
        for failed in answer.get("Errors") or ():
            raise ClientError({"Error": failed}, "DeleteObjects")

    async def _delete_one(self, key: str, **version: str) -> None:
        try:
            await self._ask("delete_object", Key=key, **version)
        except StoreError as error:
            if error_code(error) not in _NOT_THERE:
                raise

    async def _ask(self, operation: str, **arguments: Any) -> Any:
        return await self._requests.step(
            "delete", self._location, self._connection.call, operation, Bucket=self._bucket, **arguments
        )
