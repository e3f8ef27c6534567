"""Reads a blob: ranges of one version of it, straight into the reader's memory.

Guarantees: every range is of the version that was opened, by its ETag; bytes that arrived before a failure are not
requested again (E3).

The client's own download holds a range in memory twice. This sends the same request through the same pipeline, and
reads the answer from the connection piece by piece.
"""

from __future__ import annotations

import errno
from http import HTTPStatus
from typing import Any

from azure.core.exceptions import HttpResponseError
from azure.core.pipeline.transport import HttpRequest

from async_ckpt.stores.base import Location
from async_ckpt.stores.requests import Requests, stall_timeout
from async_ckpt.stores.scatter import Scatter

__all__ = ["AzureSource"]


class AzureSource:
    """One version of one blob; see ``stores.base.Source``.

    Args:
        service: the client of the account.
        url: the blob's URL.
        location: the location, for messages.
        requests: makes the requests.
        nbytes: the length of the blob.
        etag: the ETag of the version to read.
        version: the id of an older version, if the URL names one.
    """

    max_concurrent_reads: int | None = None

    def __init__(
        self,
        service: Any,
        url: str,
        location: Location,
        *,
        requests: Requests,
        nbytes: int,
        etag: str,
        version: str | None,
    ) -> None:
        self.nbytes = nbytes
        self._service = service
        self._url = url
        self._location = location
        self._requests = requests
        self._headers = {"If-Match": etag, "x-ms-version": service.api_version}
        self._query = {} if version is None else {"versionid": version}
        self._closed = False

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets* from the blob."""
        scatter = Scatter(targets)

        async def go_on() -> None:
            first = start + scatter.done
            with self._requests.translating("read", self._location):
                if self._closed:
                    raise OSError(errno.EBADF, "the file has been closed")
                with stall_timeout(self._requests.stall_seconds) as moved:
                    answer = await self._ask(first, first + scatter.left)
                    try:
                        while piece := await answer.content.readany():
                            moved()
                            scatter.take(piece)
                    finally:
                        answer.close()  # at its end it has given its connection back already
                if scatter.left:
                    raise ConnectionResetError(errno.ECONNRESET, "the answer ended early")

        await self._requests.fill(scatter, go_on)

    async def aclose(self) -> None:
        """Refuse further reads; there is nothing to free."""
        self._closed = True

    async def _ask(self, start: int, stop: int) -> Any:
        """Request a range; return aiohttp's response, still unread."""
        request = HttpRequest(
            "GET", self._url, headers={**self._headers, "x-ms-range": f"bytes={start}-{stop - 1}"}
        )
        request.format_parameters(self._query)
        response = (await self._service._pipeline.run(request, stream=True)).http_response
        if response.status_code == HTTPStatus.PARTIAL_CONTENT:
            return response.internal_response
        try:
            await response.load_body()
            if response.status_code in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND):
                raise OSError(errno.ESTALE, "it was replaced or deleted while it was read")
            raise HttpResponseError(response=response)
        finally:
            response.internal_response.close()
