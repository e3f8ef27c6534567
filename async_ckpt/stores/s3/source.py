"""Reads a checkpoint in S3, by ranges.

Guarantees: every range is of the object that was opened, or reading fails. An interrupted range is resumed (E3). Bytes
go from the connection straight into the reader's memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from botocore.exceptions import ClientError

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location
from async_ckpt.stores.optional_features import CONDITIONS, OptionalFeatures
from async_ckpt.stores.requests import Requests, stall_timeout
from async_ckpt.stores.s3.connection import Connection
from async_ckpt.stores.s3.errors import refuses_header
from async_ckpt.stores.scatter import Scatter

__all__ = ["S3Source"]

_REPLACED = "it was replaced while it was read; read it again"


class S3Source:
    """An open checkpoint; made by ``S3Store.source``."""

    max_concurrent_reads = None

    def __init__(
        self,
        location: Location,
        target: dict[str, str],
        *,
        nbytes: int,
        tag: str,
        conditional: bool,
        features: OptionalFeatures,
        connection: Connection,
        requests: Requests,
    ) -> None:
        self.nbytes = nbytes
        self._location = location
        self._target = target
        self._tag = tag
        self._condition = {"IfMatch": tag} if conditional and tag else {}
        self._features = features
        self._connection = connection
        self._requests = requests

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets* from *start* on."""
        scatter = Scatter(targets)
        await self._requests.fill(scatter, self._go_on, start, scatter)

    async def aclose(self) -> None:
        """Do nothing: there is nothing to close."""

    async def _go_on(self, start: int, scatter: Scatter) -> None:
        with (
            self._requests.translating("read", self._location),
            stall_timeout(self._requests.stall_seconds) as moved,
        ):
            first = start + scatter.done
            last = first + scatter.left - 1
            answer = await self._get(f"bytes={first}-{last}")
            stream = getattr(answer["Body"], "raw_stream", answer["Body"])  # an aiohttp.ClientResponse
            try:
                self._check(answer, first)
                while scatter.left:
                    chunk = await stream.content.readany()
                    if not chunk:
                        raise ConnectionError("the answer ended too early")
                    scatter.take(chunk)
                    moved()
            except BaseException:
                stream.close()
                raise
            stream.release()

    async def _get(self, asked: str) -> Any:
        """Request a range on the condition of our ETag; without the condition if the server does not support it.

        The answer's ETag is checked in either case.
        """
        get = partial(self._connection.call, "get_object", **self._target, Range=asked)
        bucket = self._target["Bucket"]
        if not self._condition or not self._features.asks(bucket, CONDITIONS):
            return await get()
        try:
            return await get(**self._condition)
        except ClientError as error:
            if not (self._features.is_optional(CONDITIONS) and refuses_header(error)):
                raise
            refusal = error
        answer = await get()
        self._features.decline(bucket, CONDITIONS, self._location.presentable(refusal))
        return answer

    def _check(self, answer: dict[str, Any], first: int) -> None:
        if answer.get("ETag", self._tag) != self._tag:
            raise StoreError.during("read", self._location.url, OSError(_REPLACED))
        whole = first == 0 and "ContentRange" not in answer  # for the first bytes that will do as well
        if not (whole or str(answer.get("ContentRange")).startswith(f"bytes {first}-")):
            raise OSError("the server does not answer with the range it was asked for")
